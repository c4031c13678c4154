"""Retrievals into buckets: real services over HTTP, faults on the way, and what is left after them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu, read_manifest
from airflow_dicom_get.config.groups import S3Config
from airflow_dicom_get.errors import ManifestError, S3Error
from airflow_dicom_get.manifest.frames import combine_manifests, load_manifest
from airflow_dicom_get.sinks import s3, s3_objects
from airflow_dicom_get.sinks import s3_places as places
from airflow_dicom_get.sinks.s3_uploads import PART_SIZE
from airflow_dicom_get.storage import bucket as s3_client
from airflow_dicom_get.storage.bucket import REQUESTS_PER_SLOT
from airflow_dicom_get.testing.archive import SERIES_UID, SOP_INSTANCE, STUDY_UID, read_header
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.s3_servers import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    FaultProxy,
    Juicefs,
    Moto,
    S3Server,
    free_port,
    header_of,
)
from airflow_dicom_get.testing.sample_data import big_study
from airflow_dicom_get.verify import verify
from tests.support.holdings import Holding, hold
from tests.support.relay import Relay

Pacs = Callable[..., EmbeddedPacs]
_CHOOSER = random.Random(os.environ.get("KILL_SEED", "1"))
MOMENTS = [_CHOOSER.random() for _ in range(int(os.environ["KILLS"]))] if "KILLS" in os.environ else [0.3, 0.9]
"""At which part of a run's requests it is killed."""
LARGE = 12 << 20


SLOWED = ["juicefs", "moto"] if "FAULTS" in os.environ else ["moto"]
"""Where the answers come from the proxy and most of the time is waited: `make test-kills` tries both."""


@pytest.fixture(params=["juicefs", "moto"])
def service(request: pytest.FixtureRequest) -> S3Server:
    server: S3Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]


@pytest.fixture
def proxy(service: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(service) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Holding:
    """150 images of 200 KB."""
    folder = tmp_path_factory.mktemp("many")
    return hold(folder, big_study(folder, 150, 200_000, name="many", series=3))


@pytest.fixture(scope="session")
def two_sizes(tmp_path_factory: pytest.TempPathFactory) -> Holding:
    """60 instances of 200 KB in one study, and two of 12 MiB, which go in parts, in another."""
    folder = tmp_path_factory.mktemp("two-sizes")
    big_study(folder / "small", 60, 200_000, name="small")
    big_study(folder / "large", 2, LARGE, name="large")
    return hold(folder)


@pytest.fixture
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_OUTAGE", 2.0)
    monkeypatch.setattr(s3_client, "ATTEMPTS", 2)
    monkeypatch.setattr(s3_client, "READ_TIMEOUT", 2)


def node_of(pacs: EmbeddedPacs) -> str:
    return f"{pacs.ae_title}@127.0.0.1:{pacs.port}"


def get(pacs: EmbeddedPacs | str, study: str | list[str], prefix: str, config: dict[str, Any], **options: Any) -> Any:
    node = pacs if isinstance(pacs, str) else node_of(pacs)
    scu = GetScu(node, destination=f"s3://{BUCKET}/{prefix}", s3_config=config, **options)
    return scu.get_study({"StudyInstanceUID": study})


def instances(service: S3Server, prefix: str) -> dict[str, str]:
    """Keys of the instances by their SOP Instance UIDs."""
    keys = service.objects(f"{prefix}/")
    return {key.rpartition("/")[2].removesuffix(".dcm"): key for key in keys if key.endswith(".dcm")}


def assert_holds(
    service: S3Server,
    prefix: str,
    holding: Holding,
    config: dict[str, Any],
    result: Any,
    *,
    left_in_parts: bool = False,
) -> None:
    """All is there as it was sent, listed with its digest, and nothing else is."""
    keys = instances(service, prefix)
    assert keys.keys() == holding.entries.keys()
    rows = read_manifest(result.manifest_uri, config).set_index("sop_instance_uid")
    assert rows.index.is_unique
    assert set(rows.index) == set(keys)
    for sop, key in keys.items():
        content = service.read(key)
        row = rows.loc[sop]
        assert content[row.dataset_offset :] == holding.dataset(sop), sop
        assert (row.sha256, row.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
        assert row.uri == f"s3://{BUCKET}/{key}"
        assert row.state in ("stored", "held")
    assert left_in_parts or not [key for key in service.uploads() if key.startswith(prefix)]


@pytest.mark.parametrize(
    ("config", "environment", "recorded"),
    [
        ({}, {}, "s3://a-bucket/x/a%20b"),
        ({"region": "cn-north-1"}, {}, "s3://a-bucket/x/a%20b"),
        ({"endpoint": "https://Minio:9000"}, {}, "s3://minio:9000/a-bucket/x/a%20b"),
        ({"endpoint": "https://minio"}, {}, "s3://minio:443/a-bucket/x/a%20b"),
        ({"endpoint": "http://[::1]:9000"}, {}, "s3://[::1]:9000/a-bucket/x/a%20b"),
        ({}, {"AWS_ENDPOINT_URL_S3": "http://minio"}, "s3://minio:80/a-bucket/x/a%20b"),
        ({"profile": "nobodys"}, {}, "s3://a-bucket/x/a%20b"),
    ],
)
def test_ledgers_name_the_service_of_a_bucket(
    config: dict[str, Any], environment: dict[str, str], recorded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert s3_client.Bucket("a-bucket", S3Config(**config)).recorded_as("x/a b") == recorded


class TestThereAndBack:
    def test_every_real_file(self, service: S3Server, prefix: str, mixed: Holding, embedded: Pacs) -> None:
        result = get(embedded(mixed.folder), mixed.study, prefix, service.config)
        assert (result.verdict, result.completed, result.skipped) == ("complete", len(mixed.entries), 0)
        assert_holds(service, prefix, mixed, service.config, result)
        again = get(embedded(mixed.folder), mixed.study, prefix, service.config)
        assert (again.verdict, again.skipped, again.bytes) == ("complete", len(mixed.entries), 0)
        assert_holds(service, prefix, mixed, service.config, again)

    def test_the_long_form_and_bare_data_sets(
        self, service: S3Server, prefix: str, ct: Holding, embedded: Pacs
    ) -> None:
        config = {**service.config, "bucket": BUCKET, "prefix": f"/{prefix}/a b/"}
        scu = GetScu(
            node_of(embedded(ct.folder)),
            storage_backend="S3",
            s3_config=config,
            store_with_file_meta=False,
            associations=2,
        )
        result = scu.get_study({"StudyInstanceUID": ct.study})
        assert result.verdict == "complete"
        assert result.destination == f"s3://{BUCKET}/{prefix}/a b"
        assert result.manifest_uri is not None
        assert result.manifest_uri.startswith(f"s3://{BUCKET}/{prefix}/a%20b/_manifests/2")
        keys = instances(service, f"{prefix}/a b")
        assert {sop: service.read(key) for sop, key in keys.items()} == {sop: ct.dataset(sop) for sop in ct.entries}
        planned = scu.plan({"StudyInstanceUID": ct.study})
        assert (planned.held, planned.missing) == (len(ct.entries), 0)

    def test_the_shell(self, service: S3Server, prefix: str, ct: Holding, embedded: Pacs, tmp_path: Path) -> None:
        environment = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "HOME": str(tmp_path)}

        def shell(*arguments: str) -> dict[str, Any]:
            done = subprocess.run(
                [sys.executable, "-m", "airflow_dicom_get.cli", "get", node_of(pacs), *arguments,
                 "--to", f"s3://{BUCKET}/{prefix}", "--s3-endpoint-url", service.endpoint, "--s3-region", "us-east-1",
                 "--json"],
                capture_output=True, text=True, check=False, env={**os.environ, **environment},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert SECRET_KEY not in done.stdout + done.stderr
            told: dict[str, Any] = json.loads(done.stdout)
            return told

        pacs = embedded(ct.folder)
        first = shell("--study", ct.study)
        assert (first["verdict"], first["completed"]) == ("complete", len(ct.entries))
        lost = sorted(instances(service, prefix).values())[:3]
        for key in lost:
            service.client().delete_object(Bucket=BUCKET, Key=key)
        again = shell("--study", ct.study)
        assert (again["completed"], again["skipped"]) == (len(ct.entries), len(ct.entries) - 3)
        nothing = shell("--manifest", again["manifest"])
        assert (nothing["verdict"], nothing["skipped"], nothing["bytes"]) == ("complete", len(ct.entries), 0)

    def test_manifests_in_a_bucket(
        self, service: S3Server, prefix: str, ct: Holding, embedded: Pacs, tmp_path: Path
    ) -> None:
        root = f"s3://{BUCKET}/{prefix}/state"
        options: dict[str, Any] = {"manifest_root": root, "s3_config": service.config}
        node = node_of(embedded(ct.folder))
        results = [
            GetScu(node, destination=tmp_path, **options).get_study({"StudyInstanceUID": ct.study}) for _ in range(2)
        ]
        assert [r.verdict for r in results] == ["complete", "complete"]
        assert [r.skipped for r in results] == [0, len(ct.entries)]
        assert not (tmp_path / "_manifests").exists()
        combined = combine_manifests([r.manifest_uri for r in results], f"{root}/all", service.config)
        assert combined["rows"] == 2 * len(ct.entries)
        assert len(load_manifest(combined, service.config)) == 2 * len(ct.entries)
        with pytest.raises(ManifestError, match="NoSuchKey"):
            read_manifest(f"{root}/none.parquet", service.config)

    @pytest.mark.parametrize("how", ["removed", "without its digest"])
    def test_what_is_recorded_of_another_object_costs_no_reading_each_night(
        self, service: S3Server, proxy: FaultProxy, prefix: str, ct: Holding, embedded: Pacs, how: str
    ) -> None:
        """Fetched again with another head, or recorded with its digest later on."""
        pacs = embedded(ct.folder)
        first: dict[str, Any] = {"checksum": None} if how == "without its digest" else {}
        assert get(pacs, ct.study, prefix, proxy.config, **first).verdict == "complete"
        if how == "removed":
            for key in instances(service, prefix).values():
                service.client().delete_object(Bucket=BUCKET, Key=key)
        title = {"calling_ae_title": "ANOTHER"}
        again = get(pacs, ct.study, prefix, proxy.config, resume=False, **title)
        assert (again.verdict, again.skipped) == ("complete", 0)
        before = len(proxy.requests)
        night = get(pacs, ct.study, prefix, proxy.config, **title)
        assert (night.verdict, night.skipped) == ("complete", len(ct.entries))
        assert [path for method, path in proxy.requests[before:] if method == "GET" and ".dcm" in path] == []

    def test_records_that_contradict_each_other_are_decided_once(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs
    ) -> None:
        """As earlier versions left them."""
        pacs, folder = embedded(ct.folder), f"{prefix}/_manifests/.ledger/{ct.study}/"
        assert get(pacs, ct.study, prefix, moto.config).verdict == "complete"
        (key,) = moto.objects(folder)
        lines = [json.loads(line) for line in moto.read(key).splitlines()]
        other = [{**x, "sha256": 64 * "0"} if x.get("state") == "taken" else x for x in lines]
        body = "".join(json.dumps(x) + "\n" for x in other)
        moto.client().put_object(Bucket=BUCKET, Key=f"{folder}2020.000001.jsonl", Body=body.encode())
        with FaultProxy(moto) as proxy:
            read = []
            for _ in range(2):
                before = len(proxy.requests)
                night = get(pacs, ct.study, prefix, proxy.config)
                assert (night.verdict, night.skipped) == ("complete", len(ct.entries))
                read.append(sum(verb == "GET" and ".dcm" in path for verb, path in proxy.requests[before:]))
        assert read == [len(ct.entries), 0]

    @pytest.mark.parametrize("adopt", [False, True])
    def test_a_power_cut_tears_no_file_whose_record_waits_for_the_bucket(
        self, moto: Moto, prefix: str, tmp_path: Path, adopt: bool
    ) -> None:
        """Killed at its third sync; of what was not synced, the power cut leaves the first page."""
        script = (
            "import json, os, signal, sys\n"
            "from airflow_dicom_get import GetScu\n"
            "from airflow_dicom_get.storage import files\n"
            "class Cut(files.Disk):\n"
            "    left = 3\n"
            "    def sync_data(self, fd):\n"
            "        self.left -= 1\n"
            "        if not self.left:\n"
            "            os.kill(os.getpid(), signal.SIGKILL)\n"
            "        super().sync_data(fd)\n"
            "        with open(sys.argv[4], 'a') as log:\n"
            "            log.write(f'{os.fstat(fd).st_ino}\\n')\n"
            "files.disk = Cut()\n"
            "GetScu(sys.argv[1], **json.loads(sys.argv[2])).get_study({'StudyInstanceUID': sys.argv[3]})\n"
        )
        root = f"s3://{BUCKET}/{prefix}/state"
        options: dict[str, Any] = {"destination": str(tmp_path / "to"), "manifest_root": root}
        options["s3_config"] = moto.config
        with MisbehavingPacs(series=1, instances=6, size=40_000) as pacs:
            node, synced = f"PACS@127.0.0.1:{pacs.port}", tmp_path / "synced"
            done = subprocess.run(
                [sys.executable, "-c", script, node, json.dumps(options), pacs.study_uid, str(synced)], check=False
            )
            assert done.returncode == -signal.SIGKILL
            safe = set(map(int, synced.read_text().split()))
            for path in (tmp_path / "to").rglob("*.dcm"):
                if path.stat().st_ino not in safe:
                    with path.open("r+b") as file:
                        file.seek(4096)
                        file.write(bytes(path.stat().st_size - 4096))
            result = GetScu(node, **options, adopt=adopt).get_study({"StudyInstanceUID": pacs.study_uid})
            assert (result.verdict, result.errors) == ("complete", [])
            held = {path.stem: path.read_bytes() for path in (tmp_path / "to").rglob("*.dcm")}
            assert held.keys() == set(pacs.uids)
            assert all(content.endswith(pacs.dataset(uid)) for uid, content in held.items())

    def test_ledgers_in_a_folder(
        self, service: S3Server, prefix: str, ct: Holding, embedded: Pacs, tmp_path: Path
    ) -> None:
        pacs = embedded(ct.folder)
        for skipped in (0, len(ct.entries)):
            result = get(pacs, ct.study, prefix, service.config, manifest_root=tmp_path)
            assert (result.verdict, result.skipped) == ("complete", skipped)
        assert len(list(tmp_path.glob(".ledger/*/*.jsonl"))) == 1

    def test_records_of_one_service_say_nothing_of_another(
        self, juicefs: Juicefs, prefix: str, embedded: Pacs, tmp_path: Path
    ) -> None:
        """Two services have a bucket of the same name, and ledgers in one folder."""
        holding = hold(tmp_path / "source", big_study(tmp_path / "source", 2, 2000, name="two services"))
        pacs, root = embedded(holding.folder), tmp_path / "root"
        with Juicefs(tmp_path / "juicefs") as other:
            assert get(pacs, holding.study, prefix, juicefs.config, manifest_root=root).verdict == "complete"
            key = min(instances(juicefs, prefix).values())
            changed = juicefs.read(key)[:-2] + b"zz"
            other.client().put_object(Bucket=BUCKET, Key=key, Body=changed)
            result = get(pacs, holding.study, prefix, other.config, manifest_root=root)
            assert (result.verdict, result.skipped, result.conflicts) == ("partial", 0, 1)
            assert set(result.manifest["destination"]) == {f"s3://{BUCKET}/{prefix}"}
            assert other.read(key) == changed
            compared = verify(
                study=holding.study, destination=f"s3://{BUCKET}/{prefix}", s3_config=juicefs.config, manifest_root=root
            )
            assert (compared.exit_code, {row.reason for row in compared.rows}) == (0, {None})
            for at in (juicefs, other):
                again = get(pacs, holding.study, prefix, at.config, manifest_root=root)
                assert again.skipped == (2 if at is juicefs else 1)

    @pytest.mark.parametrize("below", ["", "/year=2024/a b"])
    def test_tags_of_what_is_held(self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs, below: str) -> None:
        """Also below a prefix that its address escapes."""
        pacs, tags = embedded(ct.folder), ("StudyInstanceUID", "PatientID")
        first, again = (get(pacs, ct.study, prefix + below, moto.config, tags=tags) for _ in range(2))
        assert again.skipped == len(ct.entries)
        for name in tags:
            assert again.manifest[name].notna().all()
            assert again.manifest[name].tolist() == first.manifest[name].tolist()

    def test_encryption_and_storage_class(self, moto: Moto, prefix: str, embedded: Pacs, tmp_path: Path) -> None:
        study = big_study(tmp_path, 1, 10 << 20)
        wanted = {"sse": "aws:kms", "kms_key_id": "a-key", "storage_class": "STANDARD_IA"}
        result = get(embedded(tmp_path), study, prefix, {**moto.config, **wanted})
        assert result.verdict == "complete"
        for key in moto.objects(f"{prefix}/"):
            told = moto.client().head_object(Bucket=BUCKET, Key=key)
            found = (told["ServerSideEncryption"], told["SSEKMSKeyId"], told["StorageClass"])
            assert found == tuple(wanted.values()), key

    def test_what_an_object_says_holds_no_patient(self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs) -> None:
        get(embedded(ct.folder), ct.study, prefix, moto.config)
        for sop, key in list(instances(moto, prefix).items())[:5]:
            said = moto.client().head_object(Bucket=BUCKET, Key=key)["Metadata"]
            assert said["sha256"] == hashlib.sha256(moto.read(key)).hexdigest()
            assert said["transfer-syntax"] == ct.entries[sop].syntax
            named = (said["study"], said["series"], said["sop-instance"])
            assert "/".join((prefix, *named)) + ".dcm" == key
            assert said.keys() <= {
                "sha256", "study", "series", "sop-instance", "sop-class", "transfer-syntax", "dataset-offset",
                "modality", "series-number", "instance-number", "truncated", "other-patient",
            }  # fmt: skip

    def test_boto3_is_imported_for_buckets_alone(self, ct: Holding, embedded: Pacs, tmp_path: Path) -> None:
        code = (
            "import sys\nfrom airflow_dicom_get import GetScu\n"
            f"GetScu({node_of(embedded(ct.folder))!r}, destination={str(tmp_path)!r}).get_study("
            f"{{'StudyInstanceUID': {ct.study!r}}}).raise_for_verdict()\n"
            "assert not {'boto3', 'botocore', 's3transfer'} & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestFaults:
    @pytest.mark.parametrize("service", SLOWED, indirect=True)
    @pytest.mark.parametrize("answer", [(500, "InternalError"), (503, "ServiceUnavailable")])
    def test_every_third_request_fails(
        self, service: S3Server, proxy: FaultProxy, prefix: str, ct: Holding, embedded: Pacs, answer: tuple[int, str]
    ) -> None:
        proxy.fault = lambda number, method, path: answer if number % 3 == 0 else None
        result = get(embedded(ct.folder), ct.study, prefix, proxy.config)
        assert result.verdict == "complete"
        assert_holds(service, prefix, ct, service.config, result)

    @pytest.mark.parametrize("service", SLOWED, indirect=True)
    def test_the_service_asks_to_slow_down(
        self, service: S3Server, proxy: FaultProxy, prefix: str, ct: Holding, embedded: Pacs
    ) -> None:
        came: list[float] = []
        answers: list[bool] = []

        def fault(number: int, method: str, path: str) -> Any:
            now = time.monotonic()
            recent = sum(now - moment < 0.5 for moment in came)
            answers.append(recent > 10)
            came.append(now)
            return (503, "SlowDown") if recent > 10 else None

        proxy.fault = fault
        result = get(embedded(ct.folder), ct.study, prefix, proxy.config)
        assert result.verdict == "complete"
        assert_holds(service, prefix, ct, service.config, result)
        assert 0 < sum(answers) < len(answers) / 2

    @pytest.mark.parametrize("way", ["cancel", "operation"])
    def test_it_asks_to_slow_down_for_ever_and_the_end_is_heard(
        self, service: S3Server, proxy: FaultProxy, prefix: str, many: Holding, embedded: Pacs, way: str
    ) -> None:
        """Also by what waits for its place: none of it is sent any more."""
        scu = GetScu(
            node_of(embedded(many.folder)),
            destination=f"s3://{BUCKET}/{prefix}",
            s3_config=proxy.config,
            deadlines={"operation": 4.0 if way == "operation" else None},
        )
        refused: list[str] = []

        def fault(number: int, method: str, path: str) -> Any:
            if method != "PUT" or ".dcm" not in path:
                return None
            refused.append(path)
            if way == "cancel" and len(refused) == 40:
                scu.cancel("enough")
            return 503, "SlowDown"

        proxy.fault = fault
        before = time.monotonic()
        result = scu.get_study({"StudyInstanceUID": many.study})
        assert time.monotonic() - before < 40, "a request in two seconds would take minutes"
        reasons = set(result.manifest["reason"])
        if way == "cancel":
            assert (result.verdict, result.reason, result.completed) == ("cancelled", "enough", 0)
            in_flight = S3Config().max_concurrency * REQUESTS_PER_SLOT
            assert len(refused) <= 40 + in_flight, "what waits for its place is sent no more"
            assert reasons == {"cancelled"}
        else:
            assert (result.verdict, result.reason, result.completed) == ("failed", "deadline", 0)
            assert reasons == {"deadline"}
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("dicom-get-s3")]

    def test_answers_get_lost(
        self, service: S3Server, proxy: FaultProxy, prefix: str, embedded: Pacs, tmp_path: Path
    ) -> None:
        big_study(tmp_path, 2, 18 << 20, name="late")
        holding = hold(tmp_path, big_study(tmp_path, 6, 100_000, name="late"))
        proxy.fault = lambda number, method, path: "late" if ".dcm" in path and number % 3 == 0 else None
        result = get(embedded(tmp_path), holding.study, prefix, proxy.config)
        assert result.verdict == "complete"
        assert_holds(service, prefix, holding, service.config, result)

    def test_connections_stall(
        self,
        service: S3Server,
        proxy: FaultProxy,
        prefix: str,
        ct: Holding,
        embedded: Pacs,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(s3_client, "READ_TIMEOUT", 1)
        stalls = iter(range(4))
        proxy.fault = lambda number, method, path: (
            "stall" if method == "PUT" and number > 8 and next(stalls, None) is not None else None
        )
        result = get(embedded(ct.folder), ct.study, prefix, proxy.config)
        assert next(stalls, None) is None
        assert result.verdict == "complete"
        assert_holds(service, prefix, ct, service.config, result)

    def test_the_service_is_killed_and_comes_back(
        self, tmp_path: Path, many: Holding, embedded: Pacs, prefix: str
    ) -> None:
        with Juicefs(tmp_path / "juicefs") as server, FaultProxy(server) as proxy:
            restarted: list[threading.Thread] = []

            def fault(number: int, method: str, path: str) -> None:
                if number == 60:
                    server.stop(kill=True)
                    timer = threading.Timer(2.0, server.start)
                    timer.start()
                    restarted.append(timer)

            proxy.fault = fault
            result = get(embedded(many.folder), many.study, prefix, proxy.config)
            assert restarted
            restarted[0].join()
            assert result.verdict == "complete", result.errors
            assert_holds(server, prefix, many, server.config, result)

    @pytest.mark.usefixtures("no_long_waits")
    def test_the_service_stays_away(
        self, service: S3Server, proxy: FaultProxy, prefix: str, many: Holding, embedded: Pacs
    ) -> None:
        away = threading.Event()

        def fault(number: int, method: str, path: str) -> Any:
            if number > 40:
                away.set()
            return "late" if away.is_set() and number % 2 else (503, "ServiceUnavailable") if away.is_set() else None

        proxy.fault = fault
        before = time.monotonic()
        result = get(embedded(many.folder), many.study, prefix, proxy.config)
        assert time.monotonic() - before < 40
        assert (result.verdict, result.reason) == ("partial", "destination_error")
        assert result.transient
        assert 0 < result.completed < len(many.entries)
        assert f"s3://{BUCKET}/{prefix}" in result.errors[0]["error"]
        proxy.fault = lambda number, method, path: None
        rest = get(embedded(many.folder), many.study, prefix, proxy.config)
        assert rest.verdict == "complete"
        assert_holds(service, prefix, many, service.config, rest)

    @pytest.mark.usefixtures("no_long_waits")
    @pytest.mark.parametrize("answer", [(403, "AccessDenied"), (400, "ExpiredToken")])
    def test_the_right_is_lost_on_the_way(
        self, service: S3Server, proxy: FaultProxy, prefix: str, many: Holding, embedded: Pacs, answer: tuple[int, str]
    ) -> None:
        pacs = embedded(many.folder)
        proxy.fault = lambda number, method, path: answer if number > 40 and ".dcm" in path else None
        result = get(pacs, many.study, prefix, proxy.config)
        assert (result.verdict, result.reason) == ("partial", "destination_error")
        rows = read_manifest(result.manifest_uri, service.config)
        assert set(rows.state) <= {"stored", "failed", "missing"}
        assert set(rows.reason.dropna()) == {"destination_error"}
        assert (rows.state == "stored").sum() == result.completed == len(instances(service, prefix))
        text = " ".join(f"{e['error']} {e['hint']}" for e in result.errors)
        assert answer[1] in text
        assert ("policy" if answer[1] == "AccessDenied" else "expired") in text
        proxy.fault = lambda number, method, path: None
        rest = get(pacs, many.study, prefix, proxy.config)
        assert (rest.verdict, rest.skipped >= result.completed) == ("complete", True)
        assert_holds(service, prefix, many, service.config, rest)

    def test_another_data_set_under_the_same_uid(
        self, service: S3Server, prefix: str, ct: Holding, embedded: Pacs, tmp_path: Path
    ) -> None:
        get(embedded(ct.folder), ct.study, prefix, service.config)
        changed = sorted(sop for sop, entry in ct.entries.items() if entry.syntax == "1.2.840.10008.1.2.1")[:3]
        for sop, entry in ct.entries.items():
            content = entry.path.read_bytes()
            (tmp_path / f"{sop}.dcm").write_bytes(content[:-2] + b"\1\2" if sop in changed else content)
        result = get(embedded(tmp_path), ct.study, prefix, service.config, resume=False)
        assert (result.verdict, result.conflicts) == ("partial", 3)
        rows = read_manifest(result.manifest_uri, service.config)
        conflicts = rows[rows.state == "conflict"]
        assert sorted(conflicts.sop_instance_uid) == changed
        assert set(conflicts.reason) == {"different_content"}
        for sop, key in instances(service, prefix).items():
            assert service.read(key).endswith(ct.dataset(sop))

    def test_what_dead_runs_left_in_parts_is_aborted_after_a_day(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs
    ) -> None:
        # moto says of each upload that it was begun in 2010.
        moto.client().create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/{ct.study}/1.2/1.2.3.dcm")
        other = moto.client().create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/1.2.3/1.2/1.2.3.dcm")
        assert get(embedded(ct.folder), ct.study, prefix, moto.config).verdict == "complete"
        left = [key for key in moto.uploads() if key.startswith(prefix)]
        moto.client().abort_multipart_upload(Bucket=BUCKET, Key=other["Key"], UploadId=other["UploadId"])
        assert left == [other["Key"]]


class TestHostileService:
    """What a service says is a peer's word."""

    def test_uploads_of_other_keys_are_not_aborted_and_no_key_is_logged(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs, caplog: pytest.LogCaptureFixture
    ) -> None:
        hostile = "\x9b31m&#10;2026-12-02 INFO forged&#133;" + "x" * 5000
        keys = [f"other/{hostile}", *(f"{prefix}/{ct.study}/{n}/{hostile}" for n in range(3))]
        said = "".join(
            f"<Upload><Key>{key}</Key><UploadId>u</UploadId><Initiated>2020-01-01T00:00:00Z</Initiated></Upload>"
            for key in keys
        )
        listing = f"<ListMultipartUploadsResult>{said}</ListMultipartUploadsResult>".encode()
        aborts: list[str] = []

        def fault(number: int, method: str, path: str) -> Any:
            if method == "GET" and "uploads" in path:
                return listing
            if method == "DELETE":
                aborts.append(path)
                return b"" if len(aborts) < 3 else (403, "AccessDenied")
            return None

        caplog.set_level("INFO", "airflow_dicom_get")
        with FaultProxy(moto, fault) as proxy:
            assert get(embedded(ct.folder), ct.study, prefix, proxy.config).verdict == "complete"
        assert len(aborts) == 3
        assert all(path.startswith(f"/{BUCKET}/{prefix}/{ct.study}/") for path in aborts)
        told = [record.getMessage() for record in caplog.records if "multipart" in record.getMessage()]
        assert len(told) == 2, told
        assert "abort_multipart_upload" in told[0]
        assert told[1].startswith("aborted 2 multipart uploads")
        assert all(text.isprintable() and len(text) < 2000 for text in told)

    @pytest.mark.parametrize("ledgers", ["bucket", "folder"])
    def test_an_endless_etag_is_none(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs, tmp_path: Path, ledgers: str
    ) -> None:
        def fault(number: int, method: str, path: str) -> Any:
            return {b"ETag": b'"' + b"\xe9" * 20_000 + b'"'} if method in ("PUT", "HEAD") and ".dcm" in path else None

        options = {"manifest_root": str(tmp_path)} if ledgers == "folder" else {}
        with FaultProxy(moto, fault) as proxy:
            for _ in range(2):
                result = get(embedded(ct.folder), ct.study, prefix, proxy.config, **options)
                assert (result.verdict, result.errors) == ("complete", [])
                assert result.skipped in (0, result.total)
        assert result.skipped == result.total

    def test_keys_that_are_no_uids_become_no_rows(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs, tmp_path: Path
    ) -> None:
        content = b"\0" * 128 + b"anything"
        for series, sop in (("DOE^JOHN", "1.2"), ("=cmd()", "1.2"), ("1.2.3", ".."), ("1.2.3", "9" * 700)):
            said = {"sha256": hashlib.sha256(content).hexdigest(), "sop-class": "1.2", "dataset-offset": "0"}
            said |= {"transfer-syntax": "1.2.840.10008.1.2.1", "study": ct.study, "series": series, "sop-instance": sop}
            moto.client().put_object(
                Bucket=BUCKET, Key=f"{prefix}/{ct.study}/{series}/{sop}.dcm", Body=content, Metadata=said
            )
        result = get(embedded(ct.folder), ct.study, prefix, moto.config)
        assert set(result.manifest["sop_instance_uid"]) == ct.entries.keys()
        assert (result.verdict, result.withdrawn) == ("complete", 0)

    def test_what_is_read_back_for_tags_may_break_off(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pacs = embedded(ct.folder)
        assert get(pacs, ct.study, prefix, moto.config).verdict == "complete"

        def fault(number: int, method: str, path: str) -> Any:
            cut = method == "GET" and ".dcm" in path
            return {b"Content-Length": b"100000000", b"Connection": b"close"} if cut else None

        monkeypatch.setattr(s3_client, "READ_TIMEOUT", 2)
        with FaultProxy(moto, fault) as proxy:
            result = get(pacs, ct.study, prefix, proxy.config, tags=("PatientID",))
        assert (result.verdict, result.skipped, result.errors) == ("complete", len(ct.entries), [])

    @pytest.mark.parametrize("absent", ["Key", "Size", "ContentLength"])
    def test_what_an_answer_leaves_out_is_an_error_that_names_the_object(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs, tmp_path: Path, absent: str
    ) -> None:
        pacs = embedded(ct.folder)
        first = get(pacs, ct.study, prefix, moto.config)

        def fault(number: int, method: str, path: str) -> Any:
            if method == "HEAD":
                return {b"Content-Length": None} if absent == "ContentLength" else None
            if "list-type" not in path or absent == "ContentLength" or f"{ct.study}%2F" not in path.replace("/", "%2F"):
                return None
            item = "<Size>5</Size>" if absent == "Key" else f"<Key>{prefix}/{ct.study}/1.2/1.3.dcm</Key>"
            return f"<ListBucketResult><Contents>{item}</Contents></ListBucketResult>".encode()

        place: dict[str, Any] = {"destination": f"s3://{BUCKET}/{prefix}", "manifest_root": str(tmp_path)}
        with FaultProxy(moto, fault) as proxy:
            client = GetScu(node_of(pacs), s3_config=proxy.config, **place)
            query = {"StudyInstanceUID": ct.study}
            said = [str(client.get_study(query).errors)]
            if absent == "ContentLength":
                compared = verify(manifest=first.manifest_uri, s3_config=proxy.config)
                assert compared.exit_code == 3
                said.append(str(compared.rows[0].error))
            else:
                for check in (
                    partial(verify, study=ct.study, s3_config=proxy.config, **place),
                    partial(client.plan, query),
                ):
                    with pytest.raises(S3Error) as raised:
                        check()
                    said.append(raised.value.message)
        for text in said:
            assert f"has no {absent}" in text
            assert f"s3://{BUCKET}/{prefix}/{ct.study}" in text

    def test_metadata_longer_than_ours_are_no_record(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs
    ) -> None:
        pacs = embedded(ct.folder)
        assert get(pacs, ct.study, prefix, moto.config).verdict == "complete"
        for key in moto.objects(f"{prefix}/_manifests/.ledger/"):
            moto.client().delete_object(Bucket=BUCKET, Key=key)

        def fault(number: int, method: str, path: str) -> Any:
            return {b"x-amz-meta-modality": b"\xe9" * 20_000} if method == "HEAD" and ".dcm" in path else None

        with FaultProxy(moto, fault) as proxy:
            for _ in range(2):
                result = get(pacs, ct.study, prefix, proxy.config)
                assert (result.verdict, result.errors) == ("complete", [])


@pytest.mark.usefixtures("no_long_waits")
def test_a_body_that_changes_on_the_way_is_refused_and_sent_again(
    juicefs: Juicefs, prefix: str, two_sizes: Holding, embedded: Pacs
) -> None:
    """Every body goes with its digest, signed; of the services here this one verifies it."""
    changed: list[str] = []

    def fault(number: int, method: str, path: str) -> Any:
        kind = "part" if "partNumber=" in path else "object"
        if method == "PUT" and ".dcm" in path and path not in changed and sum(kind in one for one in changed) < 2:
            changed.append(f"{kind} {path}")
            return "corrupt"
        return None

    with FaultProxy(juicefs, fault) as proxy:
        studies = studies_of(two_sizes)
        result = get(embedded(two_sizes.folder), studies, prefix, proxy.config)
        assert result.verdict == "complete"
        assert_holds(juicefs, prefix, two_sizes, juicefs.config, result)
        assert len(changed) == 4
        refused = [answer[0] for answer in proxy.answers if answer[0].split(b" ")[1][:1] in b"45"]
        assert len([line for line in refused if b" 400" in line]) == 4, refused
        paths = Counter(proxy.requests)
        assert {paths["PUT", one.partition(" ")[2]] for one in changed} == {2}
        for (method, path), head in zip(proxy.requests, proxy.heads, strict=True):
            if method == "PUT" and ".dcm" in path:
                signed = header_of(head, b"x-amz-content-sha256") or b""
                given = base64.b64decode(header_of(head, b"x-amz-checksum-sha256") or b"").hex()
                assert signed.decode() == given
                assert len(given) == 64


class TestOverwritten:
    """An object that another program overwrote, and left our metadata on it."""

    def overwrite(self, moto: Moto, key: str, content: bytes) -> None:
        client = moto.client()
        said = client.head_object(Bucket=BUCKET, Key=key)["Metadata"]
        assert said["sha256"] != hashlib.sha256(content).hexdigest()
        client.put_object(Bucket=BUCKET, Key=key, Body=content, Metadata=said)

    def plain(self, moto: Moto, keys: dict[str, str]) -> str:
        """One whose end is pixels: what is changed there leaves it whole."""
        heads = {sop: moto.client().head_object(Bucket=BUCKET, Key=key)["Metadata"] for sop, key in keys.items()}
        return min(sop for sop, said in heads.items() if said["transfer-syntax"] == "1.2.840.10008.1.2.1")

    @pytest.mark.parametrize("recorded", [True, False])
    def test_a_part_of_it_is_not_held(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs, recorded: bool
    ) -> None:
        pacs = embedded(ct.folder)
        get(pacs, ct.study, prefix, moto.config)
        keys = instances(moto, prefix)
        sop = sorted(keys)[0]
        self.overwrite(moto, keys[sop], moto.read(keys[sop])[:-2])
        if not recorded:
            for key in moto.objects(f"{prefix}/_manifests/.ledger/"):
                moto.client().delete_object(Bucket=BUCKET, Key=key)
        before = pacs.sent.copy()
        result = get(pacs, ct.study, prefix, moto.config)
        assert result.verdict == "complete"
        assert set(pacs.sent - before) == {sop}
        assert_holds(moto, prefix, ct, moto.config, result)

    @pytest.mark.parametrize("recorded", [True, False])
    def test_a_whole_other_one_is_a_conflict_or_replaced(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs, recorded: bool
    ) -> None:
        pacs = embedded(ct.folder)
        get(pacs, ct.study, prefix, moto.config)
        keys = instances(moto, prefix)
        sop = self.plain(moto, keys)
        changed = moto.read(keys[sop])[:-2] + b"zz"
        self.overwrite(moto, keys[sop], changed)
        if not recorded:
            for key in moto.objects(f"{prefix}/_manifests/.ledger/"):
                moto.client().delete_object(Bucket=BUCKET, Key=key)
        result = get(pacs, ct.study, prefix, moto.config)
        assert (result.verdict, result.conflicts) == ("partial", 1)
        assert moto.read(keys[sop]) == changed
        rows = read_manifest(result.manifest_uri, moto.config).set_index("sop_instance_uid")
        assert (rows.loc[sop].state, rows.loc[sop].reason) == ("conflict", "different_content")
        again = get(pacs, ct.study, prefix, moto.config, on_conflict="replace")
        assert (again.verdict, again.warning) == ("complete", 1)
        assert_holds(moto, prefix, ct, moto.config, again)
        assert get(pacs, ct.study, prefix, moto.config).skipped == len(ct.entries)

    def test_one_that_changes_at_that_moment_is_not_replaced(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The replacement holds for the object that was compared, and for no other (If-Match)."""
        pacs = embedded(ct.folder)
        get(pacs, ct.study, prefix, moto.config)
        keys = instances(moto, prefix)
        sop = self.plain(moto, keys)
        original = moto.read(keys[sop])
        self.overwrite(moto, keys[sop], original[:-2] + b"zz")
        compared: list[str] = []
        compare = s3_objects.compare

        def meddling(bucket: Any, key: str, ours: Any) -> Any:
            found = compare(bucket, key, ours)
            if key == keys[sop] and not compared:
                compared.append(key)
                self.overwrite(moto, key, original[:-2] + b"yy")
            return found

        monkeypatch.setattr("airflow_dicom_get.sinks.s3.compare", meddling)
        result = get(pacs, ct.study, prefix, moto.config, on_conflict="replace")
        assert compared
        assert result.verdict == "complete"
        assert_holds(moto, prefix, ct, moto.config, result)


class TestOddMetadata:
    """An object of an instance, whole and with its checksum, whose metadata say what none of ours can."""

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("dataset-offset", "9" * 30),
            ("dataset-offset", "9" * 10),
            ("dataset-offset", "-5"),
            ("series-number", "9" * 30),
            ("instance-number", "-" + "9" * 30),
            ("instance-number", "9" * 1500),
        ],
    )
    def test_it_is_no_record_and_costs_no_run_anything(
        self, moto: Moto, prefix: str, embedded: Pacs, tmp_path: Path, name: str, text: str
    ) -> None:
        study = big_study(tmp_path, 2, 2000)
        pacs = embedded(tmp_path)
        assert get(pacs, study, f"{prefix}/plain", moto.config).verdict == "complete"
        key = sorted(instances(moto, f"{prefix}/plain").values())[0]
        said = moto.client().head_object(Bucket=BUCKET, Key=key)["Metadata"]
        body = moto.read(key)
        moto.client().put_object(
            Bucket=BUCKET,
            Key=key.replace("/plain/", "/odd/"),
            Body=body,
            Metadata={**said, name: text},
            ChecksumSHA256=base64.b64encode(hashlib.sha256(body).digest()).decode(),
        )
        for _ in range(2):
            result = get(pacs, study, f"{prefix}/odd", moto.config)
            assert (result.verdict, result.errors, result.completed) == ("complete", [], 2)
            frame = read_manifest(result.manifest_uri, moto.config)
            assert frame.dataset_offset.tolist() == [int(said["dataset-offset"])] * 2


class TestCopied:
    """An object of ours that somebody copied to the key of another instance, with its metadata and its checksum."""

    def relabel(self, moto: Moto, key: str, to: str, *, uids: bool) -> None:
        """Copy an object; without ``uids`` to one whose metadata are as earlier versions wrote them."""
        client = moto.client()
        said = client.head_object(Bucket=BUCKET, Key=key)["Metadata"]
        if not uids:
            said = {name: text for name, text in said.items() if name not in ("study", "series", "sop-instance")}
        content = moto.read(key)
        checksum = base64.b64encode(hashlib.sha256(content).digest()).decode()
        client.put_object(Bucket=BUCKET, Key=to, Body=content, Metadata=said, ChecksumSHA256=checksum)

    @pytest.mark.parametrize(
        ("verify_held", "uids", "with_meta"),
        [("size", True, True), ("digest", True, True), ("size", False, True), ("digest", False, False)],
    )
    def test_it_is_not_held_there(
        self, moto: Moto, prefix: str, embedded: Pacs, tmp_path: Path, verify_held: str, uids: bool, with_meta: bool
    ) -> None:
        one, other = (big_study(tmp_path / name, 2, 2000, name=name) for name in ("copied", "other"))
        pacs, options = embedded(tmp_path), {"verify_held": verify_held, "store_with_file_meta": with_meta}
        assert get(pacs, one, prefix, moto.config, **options).verdict == "complete"
        keys = sorted(key for key in instances(moto, prefix).values() if one in key)
        headers = [read_header(path)[3] for path in sorted(tmp_path.glob("*/*"))]
        names = ["/".join(h[tag] for tag in (STUDY_UID, SERIES_UID, SOP_INSTANCE)) for h in headers]
        names = [name for name in names if name.startswith(other)]
        assert len(keys) == len(names) == 2
        copies = [f"{prefix}/{name}.dcm" for name in names]
        for key, copy in zip(keys, copies, strict=True):
            self.relabel(moto, key, copy, uids=uids)
        result = get(pacs, other, prefix, moto.config, **options)
        assert (result.verdict, result.skipped, result.conflicts) == ("partial", 0, 2)
        assert [moto.read(copy) for copy in copies] == [moto.read(key) for key in keys]

    @pytest.mark.parametrize(("verify_held", "with_meta"), [("size", True), ("size", False), ("digest", True)])
    def test_what_an_earlier_version_stored_is_held_where_its_header_names_it(
        self, moto: Moto, prefix: str, ct: Holding, embedded: Pacs, verify_held: str, with_meta: bool
    ) -> None:
        pacs, options = embedded(ct.folder), {"verify_held": verify_held, "store_with_file_meta": with_meta}
        get(pacs, ct.study, prefix, moto.config, **options)
        for key in instances(moto, prefix).values():
            self.relabel(moto, key, key, uids=False)
        for key in moto.objects(f"{prefix}/_manifests/.ledger/"):
            moto.client().delete_object(Bucket=BUCKET, Key=key)
        result = get(pacs, ct.study, prefix, moto.config, **options)
        assert (result.verdict, result.skipped, result.bytes) == ("complete", len(ct.entries), 0)


class TestBeforeAnyTraffic:
    """The PACS named here does not exist: whoever asked it would fail by that."""

    PACS = "127.0.0.1:1"

    def _fails(self, config: dict[str, Any], *words: str, bucket: str = BUCKET, transient: bool = False) -> None:
        scu = GetScu(self.PACS, destination=f"s3://{bucket}/x", s3_config=config)
        result = scu.get_study({"StudyInstanceUID": "1.2.3"})
        assert (result.verdict, result.reason, result.transient) == ("failed", "destination_error", transient)
        text = " ".join(f"{e['error']} {e['hint']}" for e in result.errors)
        for word in (f"s3://{bucket}", *words):
            assert word in text, text
        assert SECRET_KEY not in text

    def test_bucket_missing(self, service: S3Server) -> None:
        self._fails(service.config, "NoSuchBucket", "bucket's name", "list_objects_v2", bucket="no-such-bucket")

    def test_wrong_keys(self, juicefs: Juicefs) -> None:
        self._fails({**juicefs.config, "secret_key": "wrong"}, "SignatureDoesNotMatch", "credentials", "clock")
        self._fails({**juicefs.config, "access_key": "nobody"}, "InvalidAccessKeyId", "credentials")
        self._fails({**juicefs.config, "session_token": "old"}, "InvalidTokenId", "session token")

    @pytest.mark.parametrize(
        ("answer", "words"),
        [
            ((400, "ExpiredToken"), ("have expired",)),
            ((403, "AccessDenied"), ("policy",)),
            ((403, "RequestTimeTooSkewed"), ("clock",)),
            ((301, "PermanentRedirect"), ("region",)),
            (
                (400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-central-1'"),
                ("Check the region: the service expects eu-central-1",),
            ),
        ],
    )
    @pytest.mark.parametrize("verb", ["GET", "PUT"])
    def test_refused(self, juicefs: Juicefs, verb: str, answer: Any, words: tuple[str, ...]) -> None:
        with FaultProxy(juicefs, lambda number, method, path: answer if method == verb else None) as proxy:
            self._fails(proxy.config, answer[1], *words)

    def test_nobody_there(self, juicefs: Juicefs) -> None:
        endpoint = f"http://127.0.0.1:{free_port()}"
        self._fails({**juicefs.config, "endpoint": endpoint}, "EndpointConnectionError", "endpoint", transient=True)

    def test_no_keys_and_no_profile(self, juicefs: Juicefs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        self._fails({"endpoint": juicefs.endpoint}, "no credentials were found", "profile")
        self._fails({"endpoint": juicefs.endpoint, "profile": "nobody"}, "ProfileNotFound", "name of the profile")


class TestKilled:
    @pytest.mark.parametrize("moment", MOMENTS)
    def test_the_next_run_completes(
        self,
        service: S3Server,
        proxy: FaultProxy,
        prefix: str,
        two_sizes: Holding,
        embedded: Pacs,
        relay: Callable[..., Relay],
        monkeypatch: pytest.MonkeyPatch,
        moment: float,
    ) -> None:
        """Whatever has its name is whole, and sent again is what had none yet: what was handed over and not stored."""
        line = relay(embedded(two_sizes.folder))
        studies = studies_of(two_sizes)
        config = {**proxy.config, "max_concurrency": 1}  # else all fits into what may be under way
        requests = int(moment * (len(two_sizes.entries) + 6))  # two for each large one, and one for each part
        stop = threading.Event()

        def fault(number: int, method: str, path: str) -> Any:
            if sum("/_manifests/" not in path and method != "GET" for method, path in proxy.requests) > requests:
                stop.set()
            return 0.05

        proxy.fault = fault
        code = (
            "from airflow_dicom_get import GetScu\n"
            f"GetScu('PACS@127.0.0.1:{line.port}', destination='s3://{BUCKET}/{prefix}', s3_config={config!r})"
            f".get_study({{'StudyInstanceUID': {studies!r}}})\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code])
        try:
            assert stop.wait(60)
            time.sleep(moment / 20)
        finally:
            process.kill()
            process.wait()
        proxy.fault = lambda number, method, path: None
        time.sleep(0.3)  # what the service had in hand
        begun = stores_of(line)
        there = instances(service, prefix)
        for sop, key in there.items():
            assert service.read(key).endswith(two_sizes.dataset(sop)), sop
        assert there.keys() <= two_sizes.entries.keys()
        result = get(f"PACS@127.0.0.1:{line.port}", studies, prefix, proxy.config)
        assert result.verdict == "complete"
        assert_holds(service, prefix, two_sizes, service.config, result, left_in_parts=True)
        again = {sop for sop, times in stores_of(line).items() if times > 1}
        assert set(stores_of(line).values()) <= {1, 2}
        # What the ledger had not been told yet, the objects say themselves, where their metadata are kept.
        assert result.skipped == len(there) if service.metadata else result.skipped <= len(there)
        lost = begun.keys() - there.keys()
        assert again == lost if service.metadata else again >= lost
        # The part that waits, the one that is being written, and of large ones those whose last request was due.
        size = sum(len(two_sizes.dataset(sop)) for sop in lost)
        assert size < 2 * PART_SIZE + 2 * LARGE
        print(f"killed at {moment:.2f}: {len(begun)} begun, {len(there)} there, {len(again)} sent again, {size} bytes")
        monkeypatch.setattr(s3, "_STALE_SECONDS", 0)
        get(f"PACS@127.0.0.1:{line.port}", studies, prefix, service.config)
        assert not [key for key in service.uploads() if key.startswith(prefix)]


def studies_of(holding: Holding) -> list[str]:
    """The studies that it holds."""
    return sorted({read_header(entry.path)[3][STUDY_UID] for entry in holding.entries.values()})


def stores_of(line: Relay) -> Counter[str]:
    """How often each instance was sent."""
    return Counter(
        elements[0x1000].decode().strip("\0 ")
        for direction, kind, elements in list(line.commands)
        if (direction, kind) == ("down", 0x0001)
    )


def test_a_large_instance_takes_no_more_memory(juicefs: Juicefs, prefix: str, embedded: Pacs, tmp_path: Path) -> None:
    size = 300 << 20
    study = big_study(tmp_path, 1, size)
    # Not ru_maxrss: a new program inherits that of the process that started it.
    code = (
        "from airflow_dicom_get import GetScu\n"
        f"r = GetScu({node_of(embedded(tmp_path))!r}, destination='s3://{BUCKET}/{prefix}',"
        f" s3_config={juicefs.config!r}).get_study({{'StudyInstanceUID': {study!r}}})\n"
        "r.raise_for_verdict()\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    # 160 MB, and the bound: 64 MiB that were handed over, and two parts of the one association.
    assert int(done.stdout) * 1024 < 160_000_000 + (64 << 20) + (16 << 20)
    (key,) = instances(juicefs, prefix).values()
    content = juicefs.read(key)
    (path,) = tmp_path.rglob("*.dcm")
    assert len(content) > size
    whole = path.read_bytes()
    assert hashlib.sha256(content[-size:]).digest() == hashlib.sha256(whole[-size:]).digest()
    assert juicefs.uploads() == []
