"""The few calls of Airflow's REST interface that a notebook needs, with nothing but the standard library."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.errors import ManifestError

_PAGE = 100
_SECONDS = 60.0


class _NoRedirect(HTTPRedirectHandler):
    """A redirection would carry the token to wherever it points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class RestApi:
    """Reads XComs at one Airflow.

    Parameters
    ----------
    base_url : str
        Address of its web interface.
    token : str
        Of its API.
    ca_file : str or None
        File with the certificate authorities to trust.

    Raises
    ------
    InvalidOption
        The address or the token is none.
    """

    def __init__(self, base_url: str, token: str, ca_file: str | None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise invalid(
                "base_url", f"{shown(base_url)} is not a valid address", "For example, give http://host:8080."
            )
        if not token.isascii() or not token.isprintable() or not token:
            raise invalid("token", "is not a token", "POST /auth/token returns one.")
        self._base = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        context = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
        self._opener = build_opener(_NoRedirect, *([HTTPSHandler(context=context)] if context else []))

    def latest_run(self, dag_id: str) -> str:
        """The run that began last."""
        found = self._get(f"dags/{_part(dag_id)}/dagRuns", {"order_by": "-start_date", "limit": 1})["dag_runs"]
        if not found:
            raise ManifestError(f"The DAG {shown(dag_id)} has no run.", hint="Trigger a run first.", uri=None)
        return str(found[0]["dag_run_id"])

    def entries(self, dag_id: str, run_id: str, task_id: str | None, key: str) -> Iterator[dict[str, Any]]:
        """The entries of XCom under a key, without their values."""
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances/{_part(task_id or '~')}/xcomEntries"
        offset = 0
        while True:
            page = self._get(path, {"xcom_key": key, "limit": _PAGE, "offset": offset})
            entries = page["xcom_entries"]
            yield from entries
            offset += len(entries)
            if not entries or offset >= page["total_entries"]:
                return

    def value(self, dag_id: str, run_id: str, entry: Mapping[str, Any]) -> Any:
        """The value of an entry, as XCom holds it; None for one that nests deeper than JSON is read."""
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances/{_part(entry['task_id'])}"
        query = {"map_index": entry["map_index"], "deserialize": "false", "stringify": "false"}
        try:
            return self._get(f"{path}/xcomEntries/{_part(entry['key'])}", query)["value"]
        except ManifestError as error:
            if isinstance(error.__cause__, RecursionError):
                return None  # some task's: it is no manifest, and takes no other from anybody
            raise

    def _get(self, path: str, query: Mapping[str, Any]) -> Any:
        address = f"{self._base}/api/v2/{path}?{urlencode(query)}"
        try:
            with self._opener.open(Request(address, headers=self._headers), timeout=_SECONDS) as answer:
                return json.load(answer)
        except RecursionError as error:
            raise ManifestError(
                f"Airflow at {shown(self._base)} answers with JSON that nests too deep.",
                hint="Give run_id: the conf of the latest run may nest so.",
                uri=None,
            ) from error
        except HTTPError as error:
            with error:
                raise _refused(error.code, path) from None
        except (URLError, OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            raise ManifestError(
                f"Airflow at {shown(self._base)} does not answer: {type(why).__name__}.",
                hint="Check base_url, and that Airflow is running.",
                uri=None,
            ) from error


def _refused(code: int, path: str) -> ManifestError:
    what, hint = {
        401: ("does not accept the token", "It may have expired: POST /auth/token returns a new one."),
        403: ("does not let you read that", "Ask for permission to read this DAG and its XComs."),
        404: ("does not have that", "Check dag_id, run_id and task_id."),
    }.get(code, (f"answers with {code}", "Check its log."))
    return ManifestError(f"Airflow {what} ({path.partition('?')[0]}).", hint=hint, uri=None)


def _part(text: str) -> str:
    return quote(text, safe="~")
