"""Retrievals that end in a bucket or at another node, and what others need for the same in two steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from clients import DICOM_GET, Bench, Run, give_back
from sources import Source

from airflow_dicom_get.storage.bucket import REQUESTS_PER_SLOT
from airflow_dicom_get.testing.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, FaultProxy, Juicefs
from airflow_dicom_get.testing.servers import Storescp, find_binary

Runs = Mapping[str, Callable[[Source], Run]]
SLOTS = 8
"""Our ``max_concurrency``."""
AT_A_TIME = SLOTS * REQUESTS_PER_SLOT
"""Requests that we have under way then, and others too."""
DELAY = 0.025


def missing(names: list[str]) -> str | None:
    """The first of the programs that is not installed."""
    for name in names:
        if find_binary(name) is None and not Path(sys.executable).with_name(name).exists():
            return name
    return None


def both(first: Run, second: Run) -> Run:
    """Two steps, one after the other, as one run."""
    return Run(first.wall + second.wall, first.user + second.user, first.system + second.system)


class Forward:
    """Deliveries to storescp as Debian ships it."""

    def __init__(self, bench: Bench, target: Storescp) -> None:
        self.bench, self.target = bench, target

    @property
    def runs(self) -> Runs:
        """Clients by their keys."""
        return {
            "forward": self.warm,
            "forward_process": self.process,
            "tuned": self.bench.tuned_getscu,
            "two_steps": self.two_steps,
        }

    def warm(self, source: Source) -> Run:
        """``GetScu`` in the worker, from node to node."""
        options = {"manifest_root": str(self.bench.fresh())}
        return self._checked(self.bench.retrieve(source, f"dicom://{self.target.node}", options), source)

    def process(self, source: Source) -> Run:
        """``dicom-get get`` as a process, from node to node."""
        where = ["--to", f"dicom://{self.target.node}", "--state", str(self.bench.fresh())]
        run = self.bench.command([DICOM_GET, "get", source.node, "--study", source.study, *where, "--json"])
        self.bench.check_result(source)
        return self._checked(run, source)

    def two_steps(self, source: Source) -> Run:
        """Tuned getscu to disk, then tuned storescu from there."""
        first = self.bench.tuned_getscu(source, keep=True)
        command = ["storescu", "-pdu", str(131072), "+sd", "-aec", self.target.ae_title]
        command += [self.target.host, str(self.target.port), str(self.bench.out)]
        return both(first, self._checked(self.bench.command(command, {"TCP_NODELAY": "1"}), source))

    def _checked(self, run: Run, source: Source) -> Run:
        self.bench.check_files(source, self.target.received, "forwarding")
        give_back(self.target.received)
        return run


class Bucket:
    """Deliveries to a bucket of juicefs' gateway, by its address or by a proxy's that delays each request."""

    def __init__(self, bench: Bench, server: Juicefs, config: dict[str, Any]) -> None:
        self.bench, self.server, self.config = bench, server, config
        self.folder = bench.folder  # of the files to upload, while there are any

    def near(self) -> Runs:
        """Clients that show the rate."""
        return {"s3": self.warm, "s3_process": self.process, "boto3_8": self.boto3_slots, "boto3": self.boto3}

    def far(self) -> Runs:
        """Clients that show what waiting for each request costs."""
        return {"s3": self.warm, "s3transfer": self.s3transfer, "one_by_one": self.one_by_one}

    @contextmanager
    def files(self, source: Source) -> Iterator[None]:
        """The source's files in a folder, for clients that only upload."""
        self.bench.tuned_getscu(source, keep=True)
        self.folder = self.bench.out
        yield
        give_back(self.folder)

    def warm(self, source: Source) -> Run:
        """``GetScu`` in the worker."""
        self.bench.fresh()
        options = {"s3_config": {**self.config, "max_concurrency": SLOTS}}
        return self._checked(self.bench.retrieve(source, f"s3://{BUCKET}/run", options), source)

    def process(self, source: Source) -> Run:
        """``dicom-get get`` as a process."""
        self.bench.fresh()
        command = [DICOM_GET, "get", source.node, "--study", source.study, "--to", f"s3://{BUCKET}/run", "--json"]
        command += ["--s3-endpoint-url", self.config["endpoint"], "--s3-region", self.config["region"]]
        run = self.bench.command(command, {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY})
        self.bench.check_result(source)
        return self._checked(run, source)

    def boto3(self, source: Source) -> Run:
        """boto3 alone, the files put by as many threads as we have requests under way."""
        return self._upload(source, self.folder, at_a_time=AT_A_TIME)

    def boto3_slots(self, source: Source) -> Run:
        """boto3 alone, the files put by fewer threads, which is faster where the service is near."""
        return self._upload(source, self.folder, at_a_time=SLOTS)

    def one_by_one(self, source: Source) -> Run:
        """boto3 alone, one file after the other; what it takes to retrieve them is not counted."""
        return self._upload(source, self.folder, at_a_time=1)

    def s3transfer(self, source: Source) -> Run:
        """Tuned getscu to disk, then s3transfer with as many threads."""
        first = self.bench.tuned_getscu(source, keep=True)
        return both(first, self._upload(source, self.bench.out, at_a_time=0))

    def _upload(self, source: Source, folder: Path, *, at_a_time: int) -> Run:
        upload = {"config": self.config, "bucket": BUCKET, "at_a_time": at_a_time, "threads": AT_A_TIME}
        answer = self.bench.job({"upload": upload, "folder": str(folder)})
        return self._checked(Run(answer["wall"], answer["user"], answer["system"]), source)

    def _checked(self, run: Run, source: Source) -> Run:
        objects = self.server.objects("run/")
        sizes = [size for key, size in objects.items() if "/_manifests/" not in key]
        if len(sizes) != source.instances or min(sizes) < source.size:
            raise RuntimeError(f"{len(sizes)} objects from {source.title}, not {source.instances} in full")
        client = self.server.client()
        with ThreadPoolExecutor(AT_A_TIME) as pool:  # the gateway wants an MD5 for many in one request
            list(pool.map(lambda key: client.delete_object(Bucket=BUCKET, Key=key), objects))
        return run


@contextmanager
def buckets(bench: Bench, folder: Path) -> Iterator[tuple[Bucket, Bucket]]:
    """The gateway as it is, and behind a delay."""
    with ExitStack() as stack:
        server = stack.enter_context(Juicefs(folder))
        proxy = stack.enter_context(FaultProxy(server, lambda *_: DELAY))
        yield Bucket(bench, server, server.config), Bucket(bench, server, proxy.config)
