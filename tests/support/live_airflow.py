"""A real Airflow on a home of its own: its components as processes, and its REST interface."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from airflow_dicom_get.testing.servers import free_port

SCRIPTS = Path(__file__).parents[2] / "scripts"
READY_SECONDS = 120
ENDED = ("success", "failed", "upstream_failed", "skipped", "removed")


def eventually(what: str, look: Callable[[], Any], seconds: float = 60, every: float = 0.3) -> Any:
    """Look until there is something to see; ``AssertionError`` if there never is."""
    until = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(every)
    return seen


def _demo_home(folder: Path) -> Any:
    """The module that `make ui` stands on, with another folder."""
    spec = importlib.util.spec_from_file_location(f"home_of_{folder.name}", SCRIPTS / "demo_home.py")
    assert spec is not None
    assert spec.loader is not None
    home: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(home)
    home.FOLDER = folder
    home.AIRFLOW_HOME, home.LOGS = folder / "airflow", folder / "logs"
    for path in (home.AIRFLOW_HOME, home.LOGS):
        path.mkdir()
    return home


class LiveAirflow:
    """Airflow with an administrator ``admin`` and a viewer ``viewer``, who have the same password.

    Parameters
    ----------
    folder : Path
        Where its home and its logs go.
    dags : Path
        The folder of its DAGs.
    environment : mapping, optional
        More variables for its components.
    host : str, optional
        The address on which its API server listens. Default: 127.0.0.1.
    """

    def __init__(
        self, folder: Path, *, dags: Path, environment: Mapping[str, str] | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.address = f"http://{host}:{free_port()}"
        self.home = _demo_home(folder)
        self.environment: dict[str, str] = self.home.airflow_environment(
            {
                "AIRFLOW__API__BASE_URL": self.address,
                "AIRFLOW__API__HOST": host,
                "AIRFLOW__API__PORT": self.address.rpartition(":")[2],
                "AIRFLOW__API__WORKERS": "1",
                "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
                "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.address}/execution/",
                "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin,viewer:viewer",
                **(environment or {}),
            }
        )
        passwords = dict.fromkeys(("admin", "viewer"), self.home.password())
        (self.home.AIRFLOW_HOME / "passwords.json").write_text(json.dumps(passwords), encoding="utf-8")
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.runs: list[Run] = []
        """That were triggered, and not ended by `end_runs`."""
        self._tokens: dict[str, str] = {}

    # --- its processes -----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.home.airflow("db", "migrate", environment=self.environment, log=self.home.LOGS / "setup.log")
            self.start(*self.home.COMPONENTS)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *names: str) -> None:
        """Start components, and wait until all that should run are well."""
        for name in names:
            command = [sys.executable, "-m", "airflow", *self.home.COMPONENTS[name]]
            log = self.home.LOGS / f"{name}.log"
            self.processes[name] = self.home.launch(command, environment=self.environment, log=log)
        eventually("Airflow is ready", self._well, READY_SECONDS)

    def _well(self) -> bool:
        for name, process in self.processes.items():
            assert process.poll() is None, f"{name} ended by itself; see {self.home.LOGS}"
        return bool(self.home.healthy(self.address))

    def stop(self, *names: str) -> None:
        """Stop components as an operator would: SIGTERM, and SIGKILL to what is left after ten seconds."""
        chosen = names or tuple(self.processes)
        self.home.stop([self.processes.pop(name) for name in chosen])

    def kill(self, name: str) -> None:
        """SIGKILL to a component and all that it started, as if its host had gone."""
        process = self.processes.pop(name)
        for pid in self.home.session_members(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def run(self, *arguments: str) -> str:
        """Run a Python program on this home."""
        done = subprocess.run(
            [sys.executable, *arguments], env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    # --- its REST interface ------------------------------------------------------------------------

    def token(self, user: str = "admin") -> str:
        """The token of a user."""
        import httpx

        if user not in self._tokens:
            body = {"username": user, "password": self.home.password()}
            answer = httpx.post(f"{self.address}/auth/token", json=body, timeout=30)
            self._tokens[user] = answer.json()["access_token"]
        return self._tokens[user]

    def answer(self, method: str, path: str, *, user: str = "admin", **more: Any) -> Any:
        """Send a request, and give the answer whatever it is."""
        import httpx

        headers = {"Authorization": f"Bearer {self.token(user)}"}
        return httpx.request(method, f"{self.address}{path}", headers=headers, timeout=60, **more)

    def call(self, method: str, path: str, *, user: str = "admin", **more: Any) -> Any:
        """Call a route below ``/api/v2``, and give its JSON."""
        answer = self.answer(method, f"/api/v2{path}", user=user, **more)
        assert answer.status_code < 400, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        return answer.json() if answer.content else None

    def connect(self, conn_id: str, **fields: Any) -> None:
        """Make or replace a connection."""
        body = {"connection_id": conn_id, **fields, "extra": json.dumps(fields.get("extra", {}))}
        actions = [{"action": "create", "action_on_existence": "overwrite", "entities": [body]}]
        done = self.call("PATCH", "/connections", json={"actions": actions})
        assert not done["create"]["errors"], done

    def make_pool(self, name: str, slots: int) -> None:
        """Make or replace a pool."""
        body = {"name": name, "slots": slots, "include_deferred": False}
        actions = [{"action": "create", "action_on_existence": "overwrite", "entities": [body]}]
        done = self.call("PATCH", "/pools", json={"actions": actions})
        assert not done["create"]["errors"], done

    def trigger(self, dag_id: str, **conf: Any) -> Run:
        """Start a run without a logical date, once the DAG is known."""
        eventually(dag_id, lambda: self.answer("GET", f"/api/v2/dags/{dag_id}").status_code == 200)
        body = {"logical_date": None, "conf": conf}
        run = Run(self, dag_id, self.call("POST", f"/dags/{dag_id}/dagRuns", json=body)["dag_run_id"])
        self.runs.append(run)
        return run

    def end_runs(self) -> None:
        """End the runs that a test left when it failed: they would retrieve from the PACS of the next one."""
        runs, self.runs = self.runs, []
        for run in runs:
            if run.state() not in ENDED:
                self.call("PATCH", run.path, json={"state": "failed"})


@dataclass(frozen=True)
class Run:
    """One run of a DAG, through the REST interface."""

    airflow: LiveAirflow
    dag_id: str
    run_id: str

    @property
    def path(self) -> str:
        """Its place below ``/api/v2``."""
        return f"/dags/{self.dag_id}/dagRuns/{self.run_id}"

    def state(self) -> str:
        """The state of the run."""
        return str(self.airflow.call("GET", self.path)["state"])

    def wait(self, seconds: float = 120) -> str:
        """Wait for its end; gives the state."""
        return str(eventually("the end of the run", lambda: self._over(self.state()), seconds, every=0.5))

    @staticmethod
    def _over(state: str) -> str:
        return state if state in ENDED else ""

    def tasks(self, task_id: str) -> list[dict[str, Any]]:
        """All task instances of a task."""
        found: list[dict[str, Any]] = []
        while True:
            params = {"limit": 100, "offset": len(found), "task_id": task_id, "order_by": "map_index"}
            page = self.airflow.call("GET", f"{self.path}/taskInstances", params=params)
            found += page["task_instances"]
            if len(found) >= page["total_entries"] or not page["task_instances"]:
                return found

    def task(self, task_id: str, map_index: int = -1) -> dict[str, Any]:
        """One task instance."""
        return next((one for one in self.tasks(task_id) if one["map_index"] == map_index), {})

    def wait_task(self, task_id: str, states: Iterable[str], *, map_index: int = -1, seconds: float = 60) -> Any:
        """Wait until a task instance is in one of some states; gives it."""
        states = tuple(states)

        def look() -> Any:
            one = self.task(task_id, map_index)
            return one if one.get("state") in states else None

        return eventually(f"{task_id} is {' or '.join(states)}", look, seconds)

    def mark(self, task_id: str, state: str, map_index: int = -1) -> None:
        """Set the state of a task instance."""
        index = "" if map_index < 0 else f"/{map_index}"
        self.airflow.call("PATCH", f"{self.path}/taskInstances/{task_id}{index}", json={"new_state": state})

    def clear(self, task_id: str, map_index: int = -1) -> None:
        """Clear a task instance, so that it runs again."""
        which = task_id if map_index < 0 else [task_id, map_index]
        body = {"dry_run": False, "dag_run_id": self.run_id, "task_ids": [which], "only_failed": False}
        self.airflow.call("POST", f"/dags/{self.dag_id}/clearTaskInstances", json=body)

    def log(self, task_id: str, try_number: int = 1, map_index: int = -1) -> str:
        """The log of one try, as text."""
        params = {"map_index": map_index, "full_content": True}
        path = f"/api/v2{self.path}/taskInstances/{task_id}/logs/{try_number}"
        return str(self.airflow.answer("GET", path, params=params).text)

    def xcom(self, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
        """An XCom as it is stored; None if there is none."""
        path = f"/api/v2{self.path}/taskInstances/{task_id}/xcomEntries/{key}"
        answer = self.airflow.answer("GET", path, params={"map_index": map_index, "deserialize": False})
        return answer.json()["value"] if answer.status_code == 200 else None

    def summary(self, task_id: str = "get", map_index: int = -1) -> dict[str, Any]:
        """The summary that a task left."""
        found = self.xcom(task_id, "summary", map_index)
        assert isinstance(found, dict), f"{task_id} [{map_index}] left no summary"
        return found
