"""Airflow's simple auth manager, but that viewers may see no DAG whose name begins with ``secret``."""

from __future__ import annotations

from typing import Any

from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager


class ByDag(SimpleAuthManager):
    """See the module."""

    def is_authorized_dag(self, *, user: Any, details: Any = None, **more: Any) -> bool:
        """As Airflow's own, with the one exception."""
        hidden = user.role == "viewer" and details is not None and str(details.id).startswith("secret")
        return not hidden and super().is_authorized_dag(user=user, details=details, **more)
