"""The app of the page: its routes, who may see what, and the headers of every answer.

All that the signatures below name is imported at the top of the module: FastAPI reads them from there, and would
take a parameter whose type it cannot find for one of the query, which leaves a route open.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import AccessView, DagAccessEntity, DagDetails
from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_dag, requires_access_view
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as AnyHTTPException

from airflow_dicom_get.manifest.files import safe_name
from airflow_dicom_get.plugins import database, listing, reading, task_page, texts
from airflow_dicom_get.plugins.urls import URL_PREFIX

HEADERS = {
    # Whatever runs in this frame can act as the user, so nothing runs but the one script.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'self'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

_HERE = Path(__file__).parent
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
_ASSETS = {path.name: path.read_bytes() for path in (_HERE / "static").iterdir() if path.suffix in _TYPES}
_VERSIONS = {name: hashlib.sha256(content).hexdigest()[:12] for name, content in _ASSETS.items()}

_templates = Environment(
    loader=FileSystemLoader(_HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters.update(texts.FILTERS)

app = FastAPI(
    dependencies=[Depends(requires_access_view(AccessView.PLUGINS))],
    docs_url=None,
    redoc_url=None,
    openapi_url=None,
)

_of_dag = Depends(requires_access_dag("GET", DagAccessEntity.XCOM))


@app.middleware("http")
async def _add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await call_next(request)
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


_REFUSALS = {
    401: "You are not signed in, or your session has ended. Reload this page to sign in.",
    403: "You do not have permission to see this. Ask an administrator of this Airflow.",
    404: "This page does not exist.",
}


@app.exception_handler(AnyHTTPException)
async def _refuse(request: Request, error: AnyHTTPException) -> Response:
    text = _REFUSALS.get(error.status_code, error.detail)
    if "text/html" not in request.headers.get("accept", ""):
        return JSONResponse({"detail": text}, error.status_code, error.headers)
    # Nothing but text: without a session there are no stylesheets either.
    page = '<!doctype html><html lang="en"><meta name="color-scheme" content="light dark"><title>DICOM</title>{}'
    return HTMLResponse(page.format(f"<p>{escape(str(text))}</p></html>"), error.status_code, error.headers)


def _render(request: Request, name: str, view: object, status: int = 200) -> HTMLResponse:
    root = request.scope.get("root_path", "").rstrip("/")

    def task_url(task: database.Task) -> str:
        places = "/".join(f"{kind}/{quote(value, safe='')}" for kind, value in _places(task))
        return f"{root}/{places}/{task.map_index}"

    def airflow_url(task: database.Task, *, run_only: bool = False) -> str:
        places = _places(task)[:2] if run_only else _places(task)
        url = root.removesuffix(URL_PREFIX) + "".join(f"/{kind}/{quote(value, safe='')}" for kind, value in places)
        return url if run_only or task.map_index < 0 else f"{url}/mapped/{task.map_index}"

    def asset(file: str) -> str:
        return f"{root}/assets/{file}?v={_VERSIONS[file]}"

    page = _templates.get_template(name)
    html = page.render(root=root, task_url=task_url, airflow_url=airflow_url, asset=asset, view=view)
    return HTMLResponse(html, status)


def _places(task: database.Task) -> list[tuple[str, str]]:
    return [("dags", task.dag_id), ("runs", task.run_id), ("tasks", task.task_id)]


# --- the list ------------------------------------------------------------------------------------------


def _readable(dag_ids: list[str], user: Any) -> list[str]:
    """Those of the DAGs whose XComs the user may read."""
    manager: Any = get_auth_manager()
    return [
        dag_id
        for dag_id, team in database.teams_of(dag_ids).items()
        if manager.is_authorized_dag(
            method="GET",
            access_entity=DagAccessEntity.XCOM,
            details=DagDetails(id=dag_id, team_name=team),
            user=user,
        )
    ]


_LISTS = reading.Turns(reading.AT_ONCE)


@app.get("/")
async def retrievals(
    request: Request,
    user: GetUserDep,
    dag_id: str = "",
    verdict: str = "",
    source: str = "",
    since: str = "",
    until: str = "",
    page: str = "1",
) -> HTMLResponse:
    """All retrievals of the DAGs that the user may see."""
    chosen = listing.Choice.of(dag_id=dag_id, verdict=verdict, source=source, since=since, until=until, page=page)

    def shown() -> HTMLResponse:
        dag_ids = _readable(database.dags_with_runs(chosen.begin, chosen.end), user)
        return _render(request, "list.html", listing.view_of(chosen, dag_ids), 400 if chosen.complaint else 200)

    # A list of many runs takes seconds: who asks for many lists waits, and takes no thread of Airflow's for that.
    try:
        async with AsyncExitStack() as entered:
            async with asyncio.timeout(reading.SECONDS):
                await entered.enter_async_context(_LISTS.of(user.get_id()))
            return await run_in_threadpool(shown)
    except TimeoutError:
        raise HTTPException(503, "Too many lists are asked for at a time. Try again in a moment.") from None


# --- one task instance ---------------------------------------------------------------------------------


def _task(dag_id: str, run_id: str, task_id: str, map_index: str) -> database.Task:
    # Airflow's own routes take ~ for "any"; here it would pass by the check of the DAG.
    if "~" in (dag_id, run_id, task_id):
        raise HTTPException(404)
    # A task that is not mapped has no map index in Airflow's addresses, and the placeholder stays.
    if map_index == "{MAP_INDEX}":
        map_index = "-1"
    if not re.fullmatch(r"-1|[0-9]{1,9}", map_index):
        raise HTTPException(404)
    task = database.task(dag_id, run_id, task_id, int(map_index))
    if task is None:
        raise HTTPException(404)
    return task


_TASK = "/dags/{dag_id}/runs/{run_id}/tasks/{task_id}/{map_index}"


@app.get(_TASK, dependencies=[_of_dag])
async def task_instance(
    request: Request, user: GetUserDep, dag_id: str, run_id: str, task_id: str, map_index: str
) -> HTMLResponse:
    """What one task retrieved, and all that it did not, with the reasons."""
    task = await run_in_threadpool(_task, dag_id, run_id, task_id, map_index)
    view = await run_in_threadpool(task_page.view_of, task)
    if view.has_manifest:
        contents = await reading.contents_of(task, user.get_id())
        view = replace(view, contents=contents, complaint="" if contents else reading.NOT_SHOWN)
    return await run_in_threadpool(_render, request, "task.html", view)


@app.get(f"{_TASK}/progress", dependencies=[_of_dag])
def progress(dag_id: str, run_id: str, task_id: str, map_index: str) -> JSONResponse:
    """Where a task stands."""
    return JSONResponse(task_page.progress_of(_task(dag_id, run_id, task_id, map_index)))


@app.get(f"{_TASK}/manifest.csv", dependencies=[_of_dag])
async def manifest(user: GetUserDep, dag_id: str, run_id: str, task_id: str, map_index: str) -> StreamingResponse:
    """The whole manifest, for a spreadsheet."""
    task = await run_in_threadpool(_task, dag_id, run_id, task_id, map_index)
    pieces = await reading.csv_of(task, user.get_id())
    if pieces is None:
        raise HTTPException(409, reading.NOT_SHOWN)
    name = safe_name(f"{task.dag_id}-{task.run_id}-{task.task_id}-{task.map_index}.csv")
    return StreamingResponse(
        pieces,
        media_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


# --- stylesheet and script -----------------------------------------------------------------------------


@app.get("/assets/{name}")
def asset(name: str) -> Response:
    """One of our own files. By a route: a mount would answer without a session."""
    if name not in _ASSETS:
        raise HTTPException(404)
    # Its address holds its digest.
    headers = {"Cache-Control": "private, max-age=86400, immutable"}
    return Response(_ASSETS[name], media_type=_TYPES[Path(name).suffix], headers=headers)
