"""What may be configured: addresses, options, and their checks before any traffic."""
