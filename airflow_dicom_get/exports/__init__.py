"""The verb ``export``: manifests as what other tools read, one module a form."""
