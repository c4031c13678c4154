"""What `make demo` and `make ui` share: a folder of their own with a PACS, an Airflow home and what is retrieved."""

from __future__ import annotations

import json
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
# Another one for the tests, which leave yours as it is.
FOLDER = Path(os.environ.get("DICOM_DEMO_FOLDER") or ROOT / ".demo")
PACS_DATA = FOLDER / "pacs"
AIRFLOW_HOME = FOLDER / "airflow"
RETRIEVED = FOLDER / "retrieved"
LOGS = FOLDER / "logs"
DAG_ID = "retrieve_studies"
AE_TITLE = "DEMO"
POOL = "pacs"
SLOTS = 2
# The api-server comes first: the others report to it.
COMPONENTS = {
    "api-server": ["api-server"],
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
    # The log servers of scheduler and triggerer would listen on every interface.
    "triggerer": ["triggerer", "--skip-serve-logs"],
}


class DemoError(Exception):
    """The demo cannot go on; the text says what failed and where more stands."""


def shown(path: Path) -> str:
    """A path as the user sees it from the project's folder."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def make_folders() -> None:
    """Make the demo's folder, for its owner alone: it holds a password and keys."""
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    for folder in (AIRFLOW_HOME, LOGS):
        folder.mkdir(exist_ok=True)
    if not PACS_DATA.is_dir():
        from airflow_dicom_get.testing.sample_data import write_demo_data

        # Under its name only when whole: an interrupted first run must not leave half a PACS.
        half = FOLDER / "pacs.part"
        half.mkdir(exist_ok=True)
        write_demo_data(half)
        half.rename(PACS_DATA)


def _kept_secrets() -> dict[str, str]:
    """Password and keys of this Airflow home: made once, kept in a file."""
    file = AIRFLOW_HOME / "secrets.json"
    if not file.exists():
        from cryptography.fernet import Fernet

        values = {
            "password": secrets.token_urlsafe(9),
            "jwt": secrets.token_hex(32),
            "fernet": Fernet.generate_key().decode(),
        }
        file.touch(mode=0o600)
        file.write_text(json.dumps(values), encoding="utf-8")
    kept: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return kept


def password() -> str:
    """The password of the user ``admin``."""
    return _kept_secrets()["password"]


def airflow_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment in which Airflow runs on the demo's home, whatever Airflow the caller has configured."""
    kept = _kept_secrets()
    passwords = AIRFLOW_HOME / "passwords.json"
    passwords.touch(mode=0o600)
    passwords.write_text(json.dumps({"admin": kept["password"]}), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    environment |= {
        "AIRFLOW_HOME": str(AIRFLOW_HOME),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__FERNET_KEY": kept["fernet"],
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "AIRFLOW__API_AUTH__JWT_SECRET": kept["jwt"],
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "10",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{AIRFLOW_HOME / 'airflow.db'}",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(AIRFLOW_HOME / "logs"),
        "PYTHONWARNINGS": "ignore",
    }
    return environment | dict(extra or {})


def airflow(*arguments: str, environment: Mapping[str, str], log: Path, timeout: float = 300) -> None:
    """Run one Airflow command to its end, its output into `log`.

    Raises
    ------
    DemoError
        If it fails, runs into `timeout`, or waits for the retry of a failed task; quotes and names the log.
    """
    process = launch([sys.executable, "-m", "airflow", *arguments], environment=environment, log=log)
    until = time.monotonic() + timeout
    try:
        while (status := process.poll()) is None:
            time.sleep(0.2)
            if time.monotonic() > until or "[up_for_retry]" in log.read_text(errors="replace"):
                break
    finally:
        stop([process])
    if status != 0:
        raise DemoError(f"`airflow {' '.join(arguments[:2])}` failed; its log is {shown(log)}{_complaint(log)}")


def _preparation() -> str:
    """What the database is made for: another Airflow migrates it."""
    return f"Airflow {version('apache-airflow-core')}, pool {POOL} of {SLOTS}"


def prepared() -> bool:
    """Whether this Airflow has its database, and in it the pool that the DAGs name."""
    stamp = AIRFLOW_HOME / "prepared"
    return (
        (AIRFLOW_HOME / "airflow.db").exists()
        and stamp.exists()
        and stamp.read_text(encoding="utf-8") == _preparation()
    )


def prepare_database(environment: Mapping[str, str], log: Path) -> None:
    """Make or migrate Airflow's database, and make the pool that the DAGs name."""
    airflow("db", "migrate", environment=environment, log=log)
    # A task whose pool does not exist waits forever.
    airflow("pools", "set", POOL, str(SLOTS), "associations of the PACS", environment=environment, log=log)
    (AIRFLOW_HOME / "prepared").write_text(_preparation(), encoding="utf-8")


def _complaint(log: Path) -> str:
    """The lines of a log that say why: those that name an exception, else the last ones."""
    lines = log.read_text(errors="replace").splitlines()
    named = [line for line in lines if re.match(r"([a-z_]\w*\.)*[A-Z]\w+: ", line)]
    return "".join(f"\n    {line:.300}" for line in (named or lines)[-5:])


def healthy(address: str) -> bool:
    """Whether all four components report in."""
    try:
        with urlopen(f"{address}/api/v2/monitor/health", timeout=5) as answer:
            states = json.load(answer)
    except (URLError, OSError, ValueError):
        return False
    return all(states.get(name, {}).get("status") == "healthy" for name in ("scheduler", "dag_processor", "triggerer"))


def launch(
    command: Sequence[str], *, environment: Mapping[str, str], log: Path, stdout: int | None = None
) -> subprocess.Popen[str]:
    """Start a program in a session of its own, which `stop` ends. Ctrl-C in the terminal does not reach it."""
    with log.open("a", encoding="utf-8") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file if stdout is None else stdout,
            stderr=file,
            text=True,
            start_new_session=True,
        )


def stop(processes: Sequence[subprocess.Popen[str]], patience: float = 10) -> None:
    """End programs and what they started: SIGTERM to each, a common time to go, then SIGKILL to their sessions."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        for pid in session_members(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # It went by itself.
        process.wait()


def session_members(leader: int) -> list[int]:
    """The processes of a session. Airflow puts each task into a process group of its own, but not into a session."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The fields after the name, which may hold anything: state, parent, group, session.
            session = int(stat.read_text().rpartition(")")[2].split()[3])
        except (OSError, ValueError):
            continue
        if session == leader:
            members.append(int(stat.parent.name))
    return members


@contextmanager
def pacs(misbehave: str | None = None) -> Iterator[tuple[str, str]]:
    """Serve the demo's studies, or a study made up that is served badly.

    Gives the node, ``[AE@]host:port``, and the line in which the PACS said that it is ready.
    """
    log = LOGS / "pacs.log"
    serve = ["--misbehave", misbehave] if misbehave else ["--dir", str(PACS_DATA), "--ae-title", AE_TITLE]
    command = [sys.executable, "-m", "airflow_dicom_get.cli.main", "pacs", "--port", "0", *serve]
    process = launch(command, environment=os.environ, log=log, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            ready = process.stdout.readline().strip() if selector.select(30) else ""
        node = re.search(r"\S+:\d+\b", ready)
        if node is None:
            raise DemoError(f"The embedded PACS did not start; see {shown(log)}")
        yield node[0], ready
    finally:
        stop([process])


def end_by_signals() -> None:
    """Turn SIGTERM and SIGHUP into the KeyboardInterrupt of Ctrl-C, so that all of them clean up alike.

    SIGINT too: a shell starts background jobs with it ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
