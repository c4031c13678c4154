"""Where the page is."""

from __future__ import annotations

URL_PREFIX = "/dicom-get"
"""Of its app, in the API server."""
