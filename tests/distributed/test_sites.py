"""One Airflow and two sites, each with an edge worker that alone reaches its PACS; all into one bucket.

One worker is killed while it retrieves, the API server is away for a while, and the cable of a site is pulled out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.testing.s3_servers import SECRET_KEY, S3Server
from airflow_dicom_get.testing.sample_data import big_study
from tests.support import networks
from tests.support.distributed import IMPATIENT, S3_SERVICES, CountingPacs, connection_to
from tests.support.live_airflow import ENDED, LiveAirflow, eventually
from tests.support.postgres import Postgres

DAGS = Path(__file__).parent / "site_dags"
STUDIES = int(os.environ.get("STUDIES", "300")) // 5
"""At each site. A fifth of the other half's, since two events more are waited for."""
INSTANCES, PIXELS, PAUSE = 12, 16384, 0.5
SLOTS = 3
AWAY = 30
"""Seconds for which a cable is out, and for which the API server is away at least."""
LONGEST_AWAY = 90
"""Seconds in which what runs has to go on almost to its end while the API server is away; tasks time out after 120."""
HEARTBEAT = 5
"""Seconds; by default 30. After five of them without a word a worker is lost, and its name is free again."""
EXECUTOR = "LocalExecutor,airflow.providers.edge3.executors.EdgeExecutor"
HAS_EDGE = any(distributions(name="apache-airflow-providers-edge3"))
MISSING = networks.missing() if HAS_EDGE else "not installed: the extra edge"
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


class Hospital:
    """A site with its PACS, and what is installed there: the environment of its worker, and a copy of the DAGs."""

    def __init__(self, name: str, site: networks.Site, pacs: CountingPacs, studies: list[str]) -> None:
        self.name, self.site, self.pacs, self.studies = name, site, pacs, studies
        self.environment: dict[str, str] = {}
        self.log = Path()
        self.worker: subprocess.Popen[str] | None = None
        self.started = datetime.now(UTC)

    @property
    def connection(self) -> dict[str, Any]:
        """To its PACS, which has the same address at each site, up to the port."""
        return {"conn_type": "dicom", "host": "127.0.0.1", "port": self.pacs.port, "login": "PACS"}

    def install(self, folder: Path, airflow: LiveAirflow, more: Mapping[str, str]) -> None:
        """Set up the worker, with nothing of the centre but the address and the secret of its API server."""
        shutil.copytree(DAGS, folder / "dags")
        self.log = folder / "worker.log"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONWARNINGS": "ignore",
            "AIRFLOW_HOME": str(folder),
            "AIRFLOW__CORE__EXECUTOR": EXECUTOR,
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__API_AUTH__JWT_SECRET": airflow.environment["AIRFLOW__API_AUTH__JWT_SECRET"],
            "AIRFLOW__EDGE__API_URL": f"{airflow.address}/edge_worker/v1/rpcapi",
            "AIRFLOW__EDGE__HEARTBEAT_INTERVAL": str(HEARTBEAT),
            "AIRFLOW__EDGE__JOB_POLL_INTERVAL": "1",
            # How long a request may take on a busy machine; by default ten seconds, and then the worker ends.
            "AIRFLOW__API_AUTH__JWT_LEEWAY": "60",
            # By default three, after which a task is ended: within a minute.
            "AIRFLOW__WORKERS__MAX_FAILED_HEARTBEATS": "20",
            **more,
        }

    def start(self, airflow: LiveAirflow) -> None:
        """Start the worker."""
        worker = [sys.executable, "-m", "airflow", "edge", "worker", "--queues", self.name]
        worker += ["--edge-hostname", f"{self.name}-1", "--concurrency", str(SLOTS)]
        command = self.site.inside(*worker)
        self.started = datetime.now(UTC)
        self.worker = airflow.home.launch(command, environment=self.environment, log=self.log)

    def stop(self, airflow: LiveAirflow) -> None:
        """Stop the worker, if it runs."""
        if self.worker is not None:
            airflow.home.stop([self.worker])

    def kill(self, airflow: LiveAirflow) -> None:
        """SIGKILL to the worker and all that it started, as if its host had gone."""
        assert self.worker is not None
        for pid in airflow.home.session_members(self.worker.pid):
            os.kill(pid, 9)
        self.worker.wait()

    def keep_up(self, airflow: LiveAirflow) -> None:
        """Start the worker again if it has ended, as the service manager of a host does."""
        assert self.worker is not None
        if self.worker.poll() is not None:
            self.start(airflow)

    def kept_up(self, airflow: LiveAirflow) -> bool:
        """Whether Airflow knows of the worker as it was last started; see `keep_up`."""
        self.keep_up(airflow)
        workers = airflow.answer("GET", "/edge_worker/ui/worker").json()["workers"]
        heard = next((one["last_heartbeat"] for one in workers if one["worker_name"] == f"{self.name}-1"), None)
        return heard is not None and datetime.fromisoformat(heard) > self.started

    def hold(self, associations: int = SLOTS) -> None:
        """Let its PACS stop in all associations until the order ``go``, and wait for so many."""
        self.pacs.counted("hold")
        what = f"{self.name} is retrieving over {associations} associations"
        eventually(what, lambda: self.pacs.counted()["open"] >= associations, 120)

    def sent(self) -> int:
        """How many instances its PACS has sent."""
        return len(self.pacs.counted()["sent"])

    def idle(self) -> bool:
        """Whether its PACS has no association."""
        return bool(self.pacs.counted()["open"] == 0)

    @property
    def total(self) -> int:
        """How many instances its PACS holds."""
        return len(self.studies) * INSTANCES


@pytest.fixture
def centre() -> Iterator[networks.Centre]:
    """Before all else: what is started after it is in its network."""
    with networks.Centre() as network:
        yield network


@pytest.fixture(params=S3_SERVICES)
def store(request, tmp_path, centre) -> Iterator[S3Server]:
    """An S3 service at the centre, with the bucket ``dicom``."""
    with S3_SERVICES[request.param](tmp_path / "s3", networks.CENTRE) as server:
        yield server


@pytest.fixture
def hospitals(tmp_path, centre, serve) -> dict[str, Hospital]:
    """Two sites, with a PACS on the loopback interface of each."""
    made = {}
    for name in ("north", "south"):
        held = tmp_path / name / "pacs"
        studies = [big_study(held / f"{n:03}", INSTANCES, PIXELS, name=f"{name} {n}") for n in range(STUDIES)]
        site = centre.site()
        made[name] = Hospital(name, site, serve(held, PAUSE, site.inside()), studies)
    return made


@pytest.fixture
def airflow(tmp_path, store, hospitals) -> Iterator[LiveAirflow]:
    """Airflow at the centre, a worker at each site, and a pool for each PACS.

    The north keeps the connection to its PACS to itself; that of the south, and the bucket's, are in the database.
    """
    with ExitStack() as stack:
        environment = IMPATIENT | stack.enter_context(Postgres()).environment
        environment |= {
            # Longer than anything is away.
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "120",
            "AIRFLOW__CORE__EXECUTOR": EXECUTOR,
            "AIRFLOW__CORE__PARALLELISM": str(2 * SLOTS + 2),
            "AIRFLOW__API_AUTH__JWT_LEEWAY": "60",
            "AIRFLOW__EDGE__API_ENABLED": "True",
            "AIRFLOW__EDGE__HEARTBEAT_INTERVAL": str(HEARTBEAT),
        }
        folder = tmp_path / "airflow"
        folder.mkdir()
        live = LiveAirflow(folder, dags=DAGS, environment=environment, host=networks.CENTRE)
        stack.enter_context(live)
        live.connect("bucket", **connection_to(store))
        live.connect("pacs_south", **hospitals["south"].connection)
        own = {"north": {"AIRFLOW_CONN_PACS_NORTH": json.dumps(hospitals["north"].connection)}, "south": {}}
        for name, hospital in hospitals.items():
            live.make_pool(f"pacs_{name}", SLOTS)
            hospital.install(tmp_path / name, live, own[name])
            stack.callback(hospital.stop, live)
            hospital.start(live)
        yield live


def reaches(port: int, *before: str) -> bool:
    """Whether something listens on a port of the loopback interface of a network."""
    look = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
    return subprocess.run([*before, sys.executable, "-c", look], capture_output=True).returncode == 0


@pytest.mark.timeout(3000)
def test_one_airflow_and_two_sites(airflow, store, hospitals):
    north, south = hospitals.values()
    for here, there in ((north, south), (south, north)):
        assert reaches(here.pacs.port, *here.site.inside())
        assert not reaches(here.pacs.port, *there.site.inside())
        assert not reaches(here.pacs.port)

    began = time.monotonic()
    run = airflow.trigger("two_sites")

    def share(hospital, part):
        def sent():
            for one in hospitals.values():
                one.keep_up(airflow)
            return hospital.sent() >= part * hospital.total

        return sent

    def over():
        for one in hospitals.values():
            one.keep_up(airflow)
        return run.state() in ENDED

    # 1. The worker of the north is lost while it retrieves with all it has.
    eventually("a quarter of the north is sent", share(north, 1 / 4), 1200)
    north.hold()
    listening, outside = north.site.sockets()
    north.kill(airflow)
    killed = time.monotonic()
    north.pacs.counted("go")
    eventually("the worker of the north is back", lambda: north.kept_up(airflow), 300, every=5)
    back = time.monotonic() - killed
    refused = north.log.read_text("utf-8").count("is already active")

    # 2. The API server is away, and what runs goes on without it.
    eventually("a third of the south is sent", share(south, 1 / 3), 1200)
    south.hold()
    airflow.stop("api-server")
    stopped, before = time.monotonic(), south.sent()
    south.pacs.counted("go")
    time.sleep(AWAY)
    goes_on = "what ran goes on while the API server is away"
    eventually(goes_on, lambda: south.sent() - before >= SLOTS * (INSTANCES - 3), LONGEST_AWAY - AWAY)
    away, meanwhile = time.monotonic() - stopped, south.sent() - before
    airflow.start("api-server")

    # 3. The cable of the south is out: neither Airflow nor the bucket are in its reach, only the PACS.
    eventually("half of the south is sent", share(south, 1 / 2), 1200)
    south.hold(1)
    south.site.cut()
    south.pacs.counted("go")
    time.sleep(AWAY)
    south.site.mend()
    assert not share(south, 1)(), "the cable was out after the end"
    eventually("both workers are there", lambda: north.kept_up(airflow) and south.kept_up(airflow), 300, every=5)

    eventually("the end of the run", over, 1800, every=2)
    assert run.state() == "success"
    seconds = time.monotonic() - began

    # Nothing listens at a site but its PACS, and that inside; the worker calls Airflow and the bucket, and nobody else.
    assert listening == {f"127.0.0.1:{north.pacs.port}"}
    assert outside <= {airflow.address.removeprefix("http://"), f"{store.host}:{store.port}"}

    for name, hospital in hospitals.items():
        counted, tasks = hospital.pacs.counted(), run.tasks(f"{name}.get")
        tries = {one["map_index"]: one["try_number"] for one in tasks}
        sent = Counter(counted["sent"])
        print(
            f"\n{name}: {STUDIES} studies of {INSTANCES} on {type(store).__name__}: {seconds:.0f} s, "
            f"{sum(sent.values())} C-STOREs for {len(sent)} instances, peak {counted['peak']} associations, "
            f"{counted['total']} in all; tries: {dict(Counter(tries.values()))}"
        )
        # All is held, each task says so, and each was done at its site.
        assert len(tasks) == STUDIES
        assert {(one["state"], one["hostname"], one["queue"]) for one in tasks} == {("success", f"{name}-1", name)}
        summaries = [run.summary(f"{name}.get", index) for index in tries]
        assert {(one["verdict"], one["completed"], one["failed"]) for one in summaries} == {("complete", INSTANCES, 0)}
        held = [key.split("/") for key in store.objects(f"{name}/") if key.endswith(".dcm")]
        assert Counter(study for _, study, *_ in held) == dict.fromkeys(hospital.studies, INSTANCES)
        assert len(sent) == hospital.total

        # What had been confirmed was not retrieved again.
        items = run.xcom(f"{name}.find")
        again = {items[index]["study_instance_uid"] for index, number in tries.items() if number > 1}
        twice = {uid for uid, times in sent.items() if times > 1}
        if store.metadata:
            # No more than the instance that was under way in each association.
            assert sum(sent.values()) - len(sent) <= sum(tries.values()) - STUDIES + SLOTS
        else:
            # Besides, what no ledger in the bucket told yet: at most five seconds of the studies that were lost.
            assert twice <= {one.removesuffix(".dcm") for _, study, _, one in held if study in again}
        assert counted["peak"] <= SLOTS
        # The report was made at the centre, where no PACS is in reach.
        assert run.task(f"{name}.report")["executor"] is None
        assert run.xcom(f"{name}.report")["verdict"] == "complete"
        assert SECRET_KEY not in run.log(f"{name}.get", 1, 0)

    for hospital in hospitals.values():
        eventually("no association is left", hospital.idle, 10)

    assert max(one["try_number"] for one in run.tasks("north.get")) > 1, "no task was lost with the worker"
    known = {one["connection_id"] for one in airflow.call("GET", "/connections")["connections"]}
    assert known == {"bucket", "pacs_south"}
    print(
        f"worker back after {back:.0f} s, refused {refused} times; {meanwhile} instances in {away:.0f} s "
        "without the API server"
    )
