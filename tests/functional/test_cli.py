"""The shell: real processes, their exit codes, what they print where, and what they refuse before any traffic."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from airflow_dicom_get.cli import main as cli
from airflow_dicom_get.cli.inputs import query_of, read_studies
from airflow_dicom_get.cli.output import fitted
from airflow_dicom_get.errors import InvalidOption, printable
from airflow_dicom_get.manifest.frames import read_manifest
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from tests.support.relay import Relay

Run = subprocess.CompletedProcess[str]
COMMAND = (sys.executable, "-m", "airflow_dicom_get.cli")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config"), "HOME": str(tmp_path), "COLUMNS": "100"}


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Callable[..., Run]:
    def call(*argv: object, **more: Any) -> Run:
        return subprocess.run(
            [*COMMAND, *map(str, argv)],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
            cwd=tmp_path,
            **more,
        )

    return call


@pytest.fixture
def pacs(ct: Any) -> Iterator[EmbeddedPacs]:
    with EmbeddedPacs(ct.folder) as server:
        yield server


class Listener:
    """A port that takes connections and counts them."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.node = f"PACS@127.0.0.1:{self.socket.getsockname()[1]}"

    def nobody_came(self) -> bool:
        self.socket.settimeout(0.05)
        try:
            self.socket.accept()[0].close()
        except TimeoutError:
            return True
        return False


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    with made.socket:
        yield made


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, bytearray]]:
    """The end of a terminal that a process writes to, and all that it shows by the end."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield theirs, shown
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)


def node_of(server: Any) -> str:
    return f"PACS@{server.host}:{server.port}"


def write_config(environment: dict[str, str], text: str) -> Path:
    path = Path(environment["XDG_CONFIG_HOME"]) / "dicom-get" / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- help and imports --------------------------------------------------------------------------------


class TestHelp:
    def test_lists_the_verbs(self, run: Callable[..., Run]) -> None:
        done = run("--help")
        assert done.returncode == 0
        assert done.stderr == ""
        listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")]
        assert listed == ["echo", "find", "plan", "get", "store", "verify", "export", "pacs"]

    @pytest.mark.parametrize("verb", ["echo", "find", "plan", "get", "store", "verify", "export", "pacs"])
    def test_of_each_verb(self, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, "--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: dicom-get {verb} ")
        assert ("--s3-endpoint-url" in text) == (verb in ("plan", "get", "store", "verify", "export"))
        assert ("--forward-calling-ae" in text) == (verb in ("plan", "get", "verify"))

    def test_answers_fast(self, run: Callable[..., Run]) -> None:
        """In processor time: a busy machine makes everybody wait."""
        times = []
        for _ in range(7):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run("--help")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(times) < 0.25

    def test_imports_nothing_heavy(self) -> None:
        code = (
            "import sys\nfrom airflow_dicom_get.cli.main import main\n"
            "try:\n    main(['get', '--help'])\nexcept SystemExit:\n    pass\n"
            "heavy = {'pydicom', 'pynetdicom', 'pyarrow', 'pandas', 'numpy', 'boto3', 'rich', 'airflow'}\n"
            "heavy &= set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    def test_version(self, run: Callable[..., Run]) -> None:
        assert run("--version").stdout.startswith("dicom-get 0.")


# --- refused before any traffic ----------------------------------------------------------------------

WHAT = ["--study", "1.2.3"]
REFUSED: list[tuple[list[str], str]] = [
    (["get", "NODE", *WHAT], "--to is missing"),
    (["get", "NODE", "--to", "out"], "no studies are selected"),
    (["get", "NODE", "--study", "1..2", "--to", "out"], "StudyInstanceUID: '1..2' is not a valid UID"),
    (["get", "NODE", "--study", "1.2*", "--to", "out"], "StudyInstanceUID contains a wildcard"),
    (["get", "NODE", "--study", "", "--to", "out"], "StudyInstanceUID is empty"),
    (["get", "NODE", "-k", "Modalty=CT", "--to", "out"], "Did you mean Modality?"),
    (["get", "NODE", "-k", "(0008,00)=CT", "--to", "out"], "'(0008,00)' is not a DICOM keyword"),
    (["get", "NODE", "-k", "Modality", "--to", "out"], "-k: 'Modality' has no value"),
    (["get", "NODE", "-k", "PatientName=*", "--to", "out"], "selects nothing"),
    (["get", "NODE", "-k", "PatientID=", "--to", "out"], "PatientID is empty"),
    (
        ["get", "NODE", "-k", "QueryRetrieveLevel=FRAME", *WHAT, "--to", "out"],
        "QueryRetrieveLevel: 'FRAME' is not a query level",
    ),
    (["get", "NODE", *WHAT, "-k", "StudyInstanceUID=1.2", "--to", "out"], "--study is given together with"),
    (["get", "NODE", *WHAT, "--from-file", "f.csv", "--to", "out"], "--from-file is given together with --study or -k"),
    (["get", "NODE", "--manifest", "m", "--from-file", "f.csv", "--to", "out"], "--manifest is given together with"),
    (["get", "NODE", "--manifest", "nothing.parquet", "--to", "out"], "nothing.parquet' cannot be read"),
    (["get", "NODE", "--from-file", "nothing.csv", "--to", "out"], "nothing.csv' cannot be read"),
    (["get", "NODE", *WHAT, "--to", "a-file"], "is not a folder"),
    (["get", "NODE", *WHAT, "--to", "a-file/below"], "is not a folder"),
    (["get", "NODE", *WHAT, "--to", "s3://b"], "--to: 's3://b' does not name a valid bucket"),
    (["get", "NODE", *WHAT, "--to", "s3://bucket/a//b"], "contains an empty part, . or .."),
    (["get", "NODE", *WHAT, "--to", "s3://minio@bucket/b"], "names a connection of Airflow"),
    (
        ["get", "NODE", *WHAT, "--to", "s3://bucket", "--s3-endpoint-url", "h:1"],
        "--s3-endpoint-url: 'h:1' has no scheme",
    ),
    (["get", "NODE", *WHAT, "--to", "out", "--s3-region", "x"], "does not fit a destination of kind Filesystem"),
    (["get", "NODE", *WHAT, "--to", "dicom://PACS_B"], "--to: dicom://PACS_B names a connection of Airflow"),
    (["get", "NODE", *WHAT, "--to", "dicom://X@h:1", "--adopt"], "--adopt has no effect for a DICOM node"),
    (["get", "NODE", *WHAT, "--to", "dicom://X@h:1", "--no-file-meta"], "--no-file-meta has no effect for a DICOM"),
    (["get", "X@h:1", *WHAT, "--to", "dicom://Y@h:1"], "--to: dicom://Y@h:1 is the source"),
    (["get", "NODE", *WHAT, "--to", "ftp://h/x"], "--to: the scheme 'ftp' is unknown"),
    (["get", "NODE", *WHAT, "--to", "out", "--state", "a-file"], "--state: "),
    (["get", "NODE", *WHAT, "--to", "out", "--associations", "4"], "--associations: 4 is more than --max-associations"),
    (["get", "NODE", *WHAT, "--to", "out", "--idle-timeout", "-1"], "--idle-timeout: '-1' is not allowed"),
    (["get", "NODE", *WHAT, "--to", "out", "--rate", "fast"], "--rate: 'fast' is not allowed"),
    (["get", "NODE", *WHAT, "--to", "out", "--window", "nights"], "--window: 'nights' is not a time window"),
    (["get", "NODE", *WHAT, "--to", "out", "--timezone", "Mars"], "--timezone: 'Mars' is not a time zone"),
    (["get", "NODE", *WHAT, "--to", "out", "--tls-ca", "ca.pem"], "--tls-ca is given without --tls"),
    (["get", "NODE", *WHAT, "--to", "out", "--tls-min-version", "1.3"], "--tls-min-version is given without --tls"),
    (
        ["get", "NODE", *WHAT, "--to", "dicom://X@h:1", "--forward-tls-ca", "ca.pem"],
        "--forward-tls-ca is given without --forward-tls",
    ),
    (["verify", "--study", "1.2", "--to", "out", "--forward-tls"], "forward_target needs a DICOM node as destination"),
    (["get", "NODE", *WHAT, "--to", "out", "--tls", "--tls-ca", "no.pem"], "--tls-ca: 'no.pem' is not a readable file"),
    (["get", "NODE", *WHAT, "--to", "out", "--model", "PATIENT"], "PATIENT"),
    (["get", "NODE", *WHAT, "--to", "out", "--checksum", "none", "--verify-held", "digest"], "--checksum is none"),
    (["get", "NODE", *WHAT, "--to", "out", "--tags", "PatientNam"], "Did you mean PatientName?"),
    (["get", "NODE", *WHAT, "--to", "out", "--calling-ae", "A" * 17], "--calling-ae: the AE title"),
    (["get", "NODE", *WHAT, "--to", "out", "--called-ae", " "], "--called-ae: the AE title '' is blank"),
    (["get", "NODE", *WHAT, "--to", "out", "--no-such"], "--no-such is not an option of this verb"),
    (["get", "NODE", *WHAT, "--to", "out", "--verb"], "Did you mean --verbose?"),
    (["find", "NODE"], "Give --study UID or -k KEY=VALUE, or --all."),
    (["find", "NODE", "--all", *WHAT], "--all is given together with --study or -k"),
    (["find", "NODE", "--all", "--limit", "few"], "--limit: 'few' is not a number of rows"),
    (["get", "NODE", "--all", "--to", "out"], "--all is not an option of this verb"),
    (["get", "NODE", "-k", "AccessionNumber=*", "--to", "out"], "selects nothing"),
    (["get", "NODE", "-k", "StudyInstanceUID=*", "--to", "out"], "StudyInstanceUID contains a wildcard"),
    (["plan", "NODE", "-k", "PatientID=*"], "PatientID contains a wildcard"),
    (["find", "NODE", "-k", "PatientID=A*"], "PatientID contains a wildcard"),
    (["find", "NODE", "-k", "StudyDate=20240230"], "StudyDate contains a day that does not exist"),
    (["find", "NODE", *WHAT, "--level", "FRAME"], "--level: invalid choice"),
    (["find", "NODE", *WHAT, "--return-key", "Xyzzy"], "--return-key: 'Xyzzy' is not a DICOM keyword"),
    (["plan", "NODE", "-k", "AccessionNumber="], "selects nothing"),
    (["echo", "NODE", "--acse-timeout", "x"], "--acse-timeout: 'x' is not allowed"),
    (["echo", "127.0.0.1"], "is neither an address nor a node"),
    (["echo", "127.0.0.1:0"], "has no port between 1 and 65535"),
    (["echo", "TOO-LONG-AE-TITLE@127.0.0.1:104"], "has 17 characters"),
    (["echo", "Ä@127.0.0.1:104"], "outside printable ASCII"),
    (["pacs"], "--dir is missing"),
    (["pacs", "--dir", "nowhere"], "is not a folder"),
    (["pacs", "--dir", ".", "--port", "x"], "'x' is not a port number"),
    (["pacs", "--misbehave", "nicely"], "no mode 'nicely'"),
    ([], "VERB"),
    (["move"], "'move' is not a verb."),
]


NOT_NAMED: list[tuple[list[str], str]] = [
    (["-k", "PatientID:DOE-4711"], "-k: 'PatientID' has no value"),
    (["-k", "(0010,0020) DOE-4711"], "-k: '(0010,0020)' has no value"),
    (["-k", "DOE-4711"], "-k: a key has no value"),
    (["-k", "PatientNam=DOE^JANE"], "'PatientNam' is not a DICOM keyword. Did you mean PatientName?"),
    (["-k", "PatientName DOE^JANE=x"], "A key is not a DICOM keyword"),
    (["-k", "PatientName=JANE", "DOE"], "There is one argument too many. Put a value with spaces in quotes."),
]


class TestRefused:
    @pytest.mark.parametrize(("what", "message"), NOT_NAMED, ids=lambda value: str(value)[:40])
    def test_a_key_is_named_and_nothing_behind_it(
        self, what: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            sys.exit(cli.main(["find", "A@127.0.0.1:1", *what]))
        said = capsys.readouterr().err
        assert (caught.value.code, message in said) == (2, True), said
        assert not [word for word in ("DOE", "JANE", "4711") if word in said]

    @pytest.mark.parametrize(
        ("argv", "message"), REFUSED, ids=lambda value: value[:40] if isinstance(value, str) else " ".join(value)[:60]
    )
    def test_exit_2_and_one_sentence(
        self,
        argv: list[str],
        message: str,
        listener: Listener,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        (tmp_path / "a-file").write_text("x")
        try:
            code = cli.main([listener.node if word == "NODE" else word for word in argv])
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        last = err.rstrip("\n").rpartition("\n")[2]
        assert message in last
        assert last.startswith("dicom-get")
        assert ": error: " in last
        assert listener.nobody_came()
        assert not (tmp_path / "out").exists()

    def test_as_a_process(self, run: Callable[..., Run], listener: Listener) -> None:
        done = run("get", listener.node, "--study", "1..2", "--to", "out")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "dicom-get: error: StudyInstanceUID: '1..2' is not a valid UID. "
            "A UID is 1 to 64 digits and dots, without empty parts.\n"
        )
        assert listener.nobody_came()


# --- the config file ---------------------------------------------------------------------------------


class TestConfig:
    def test_node_by_name(self, run: Callable[..., Run], environment: dict[str, str], pacs: EmbeddedPacs) -> None:
        write_config(
            environment, f'[nodes.main]\naddr = "{node_of(pacs)}"\nidle_timeout = 5\ncalling_ae_title = "ME"\n'
        )
        done = run("echo", "main", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["node"] == node_of(pacs)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[nodes.main]\naddr = "h"\n', "addr of [nodes.main] in "),
            ('[nodes.main]\naddr = "h:1"\nidle_timeot = 5\n', "'idle_timeot' is not known. Did you mean idle_timeout?"),
            ('[nodes.main]\naddr = "h:1"\nidle_timeout = "x"\n', "idle_timeout of [nodes.main] in "),
            ('[nodes.main]\naddr = "h:1"\nquery_model = "x"\n', "query_model of [nodes.main] in "),
            ('[nodes.main]\naddr = "h:1"\ntls_ca_file = "x"\n', "tls_ca_file of [nodes.main] in "),
            (
                '[nodes.main]\naddr = "h:1"\nuse_tls = false\ntls_min_version = "1.3"\n',
                "tls_min_version of [nodes.main]",
            ),
            ('[nodes.main]\naddr = "h:1"\ntls_key_password = "x"\n', "tls_key_password of [nodes.main] in "),
            ('[nodes.main]\naddr = "h:1"\nssl_cert = "x"\n', "'ssl_cert' is not known"),
            ("[nodes.main]\nidle_timeout = 5\n", "addr is missing"),
            ("[nodes]\nmain = 5\n", "is not a table"),
            ("nodes = 5\n", "nodes is not a table"),
            ('[node.main]\naddr = "h:1"\n', "the table 'node' is not known"),
            ("[nodes.main\n", "is not valid TOML"),
            ('[nodes.other]\naddr = "h:1"\n', "nor a node of the config file. It names 'other'."),
        ],
    )
    def test_mistakes_are_named(
        self, run: Callable[..., Run], environment: dict[str, str], text: str, message: str
    ) -> None:
        write_config(environment, text)
        done = run("find", "main", "--study", "1.2")
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert "Traceback" not in done.stderr

    def test_what_is_typed_wins(self, run: Callable[..., Run], environment: dict[str, str]) -> None:
        write_config(environment, '[nodes.main]\naddr = "h:1"\nidle_timeout = 5\n')
        assert "--idle-timeout: '0'" in run("echo", "main", "--idle-timeout", "0").stderr


# --- what to retrieve --------------------------------------------------------------------------------


class TestInputs:
    def test_query(self) -> None:
        assert query_of([], ["StudyDate=today", "PatientName=a=b"]) == {"StudyDate": "today", "PatientName": "a=b"}
        assert query_of(["1.2", "1.3,1.4"], []) == {"StudyInstanceUID": ["1.2", "1.3", "1.4"]}
        assert query_of([], ["SeriesInstanceUID=1", "SeriesInstanceUID=2"]) == {"SeriesInstanceUID": ["1", "2"]}

    @pytest.mark.parametrize(
        "text",
        [
            "StudyInstanceUID\n1.2\n1.3\n", "\ufeffStudyInstanceUID\r\n1.2\r\n1.3\r\n",
            "a,StudyInstanceUID\nx,1.2\nx,1.3\n",
            "a;StudyInstanceUID\nx;1.2\nx;1.3\n", "StudyInstanceUID\tAccessionNumber\n1.2\tA\n1.3\t\n",
            ' StudyInstanceUID ,b\n"1.2",\n\n1.3 ,\n1.2,\n,\n',
        ],
    )  # fmt: skip
    def test_csv(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "studies.csv"
        path.write_text(text, "utf-8", newline="")
        assert [(one.key, one.value) for one in read_studies(str(path))] == [
            ("StudyInstanceUID", "1.2"),
            ("StudyInstanceUID", "1.3"),
        ]

    def test_csv_of_accession_numbers(self, tmp_path: Path) -> None:
        path = tmp_path / "studies.csv"
        path.write_text("AccessionNumber\nA1\nA2\nA1\n")
        assert [(one.line, one.key, one.value) for one in read_studies(str(path))] == [
            (2, "AccessionNumber", "A1"),
            (3, "AccessionNumber", "A2"),
        ]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"Study\n1.2\n", "has no column StudyInstanceUID or AccessionNumber"), (b"", "has no column"),
            (b"StudyInstanceUID\n", "lists no studies"), (b"\xff\xfe\x00", "is not in UTF-8"),
            (b"StudyInstanceUID\n1.2\nx\n", "line 3, column StudyInstanceUID: 'x' is not a valid UID"),
            (b"AccessionNumber\nSECRET*\n", "line 2, column AccessionNumber is not an accession number"),
            (b"StudyInstanceUID\n1.2,SECRET\n", "line 2 has more fields than the first line"),
        ],
    )  # fmt: skip
    def test_bad_csv(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "studies.csv"
        path.write_bytes(content)
        with pytest.raises(InvalidOption, match=message) as caught:
            read_studies(str(path))
        assert "SECRET" not in str(caught.value)


class TestOutput:
    def test_text_of_a_peer_cannot_reach_the_terminal(self) -> None:
        assert printable("A\x1b[2J\tB\nC\x00é") == "A\\x1b[2J\\tB\\nC\\x00é"

    @pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
    def test_a_table_fits_the_terminal(self, width: int) -> None:
        uid = "1.2.826.0.1.3680043.8.498.12345678901234567890"
        names = ["StudyInstanceUID", "PatientName", "StudyDate", "StudyDescription", "Empty"]
        table = [names, [uid, "Ä^山田 [bold]", "20240131", "a description of more than twenty-eight", ""]]
        lines, left_out = fitted(table, width)
        assert max(map(cell_len, lines)) <= width
        assert "".join(lines).replace(" ", "").startswith("StudyInstanceUID")
        assert (uid in lines[-1]) == (width >= len(uid))
        assert uid in "".join(line.split(" ")[0] for line in lines[1:])
        assert left_out == {20: names[1:4], 40: names[1:4], 60: names[1:2] + names[3:4], 80: names[3:4]}.get(width, [])
        if width >= 120:
            assert "Ä^山田 [bold]" in lines[-1]
            assert "a description of more than …" in lines[-1]


# --- end to end --------------------------------------------------------------------------------------


class TestVerbs:
    def test_echo(self, run: Callable[..., Run], pacs: EmbeddedPacs) -> None:
        done = run("echo", node_of(pacs))
        assert done.returncode == 0
        assert "C-GET StudyRoot: accepted" in done.stdout
        assert done.stderr == ""

    def test_find(self, run: Callable[..., Run], pacs: EmbeddedPacs, ct: Any) -> None:
        done = run(
            "find", node_of(pacs), "-k", "StudyDate=20240115", "--json", "--return-key", "ReferringPhysicianName"
        )
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(done.stdout)
        assert row["StudyInstanceUID"] == ct.study
        assert "ReferringPhysicianName" in row
        series = json.loads(run("find", node_of(pacs), "--study", ct.study, "--level", "series", "--json").stdout)
        assert len({row["SeriesInstanceUID"] for row in series}) == 4
        lines = run("find", node_of(pacs), "--study", ct.study).stdout.splitlines()
        assert len(lines) == 2
        assert "StudyInstanceUID" in lines[0].split("\t")

    def test_find_nothing(self, run: Callable[..., Run], pacs: EmbeddedPacs) -> None:
        done = run("find", node_of(pacs), "-k", "StudyDate=19000101")
        assert (done.returncode, done.stdout) == (5, "")

    def test_plan(self, run: Callable[..., Run], pacs: EmbeddedPacs, ct: Any) -> None:
        done = run("plan", node_of(pacs), "--study", ct.study, "--json")
        assert done.returncode == 0, done.stderr
        assert (json.loads(done.stdout)["instances"], json.loads(done.stdout)["missing"]) == (40, 40)

    def test_get_again_and_from_a_manifest(
        self, run: Callable[..., Run], pacs: EmbeddedPacs, ct: Any, tmp_path: Path
    ) -> None:
        first = run("get", node_of(pacs), "--study", ct.study, "--to", "out")
        assert first.returncode == 0, first.stderr
        summary, manifest = first.stdout.splitlines()
        assert summary.startswith("complete: 40 of 40 instances listed are held; ")
        assert manifest.startswith("manifest: file://")
        assert first.stderr == ""
        assert len(list((tmp_path / "out" / ct.study).rglob("*.dcm"))) == 40
        again = run("get", node_of(pacs), "--study", ct.study, "--to", "out", "--json")
        value = json.loads(again.stdout)
        assert (value["verdict"], value["skipped"], value["bytes"]) == ("complete", 40, 0)
        frame = read_manifest(value["manifest"])
        assert set(frame["state"]) == {"held"}

        # A manifest asks for all that it lists: what was held elsewhere is not held here.
        copied = run("get", node_of(pacs), "--manifest", value["manifest"], "--to", "other", "--json")
        assert copied.returncode == 0, copied.stderr
        assert [json.loads(copied.stdout)[name] for name in ("completed", "skipped")] == [40, 0]
        assert len(list((tmp_path / "other" / ct.study).rglob("*.dcm"))) == 40

    def test_get_by_file(self, run: Callable[..., Run], pacs: EmbeddedPacs, ct: Any, tmp_path: Path) -> None:
        (tmp_path / "uids.csv").write_text(f"StudyInstanceUID\n{ct.study}\n")
        done = run("get", node_of(pacs), "--from-file", "uids.csv", "--to", "out", "--json")
        assert (done.returncode, json.loads(done.stdout)["completed"]) == (0, 40)

    def test_get_by_accession_numbers(
        self, run: Callable[..., Run], pacs: EmbeddedPacs, ct: Any, tmp_path: Path
    ) -> None:
        (row,) = json.loads(run("find", node_of(pacs), "--study", ct.study, "--json").stdout)
        (tmp_path / "list.csv").write_text(f"AccessionNumber\n{row['AccessionNumber']}\nNOT-THERE\n")
        done = run("get", node_of(pacs), "--from-file", "list.csv", "--to", "out", "--json")
        value = json.loads(done.stdout)
        assert (done.returncode, value["verdict"], value["reason"], value["completed"]) == (5, "empty", "not_found", 40)
        assert read_manifest(value["manifest"]).attrs["verdict"] == "empty", "an export takes it for no whole list"
        assert "list.csv, line 3: no study has this accession number" in done.stderr
        assert "NOT-THERE" not in done.stderr
        (tmp_path / "list.csv").write_text("AccessionNumber\nNOT-THERE\n")
        assert run("get", node_of(pacs), "--from-file", "list.csv", "--to", "out").returncode == 5

    def test_get_imports_only_what_it_needs(self, pacs: EmbeddedPacs, ct: Any, tmp_path: Path) -> None:
        code = (
            "import sys\nfrom airflow_dicom_get.cli.main import main\n"
            f"code = main(['get', {node_of(pacs)!r}, '--study', {ct.study!r}, '--to', {str(tmp_path / 'out')!r}])\n"
            "heavy = {'pandas', 'boto3', 'rich', 'airflow', 'pydicom', 'pynetdicom', 'pyarrow.compute'}\n"
            "heavy &= set(sys.modules)\n"
            "assert not heavy, heavy\nsys.exit(code)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_json_is_one_object_with_the_promised_fields(
        self, run: Callable[..., Run], pacs: EmbeddedPacs, ct: Any
    ) -> None:
        done = run("get", node_of(pacs), "--study", ct.study, "--to", "out", "--json")
        assert done.stdout.count("\n") == 1
        value = json.loads(done.stdout)
        assert {
            "verdict", "reason", "expected", "total", "completed", "skipped", "warning", "failed", "withdrawn",
            "unexpected", "conflicts", "bytes", "duration_seconds", "bytes_per_second", "associations", "rounds",
            "plan_at", "evidence", "resume_at", "errors", "manifest",
        } <= set(value)  # fmt: skip


class TestEnds:
    def get(self, run: Callable[..., Run], server: Any, study: str, *more: str) -> tuple[Run, dict[str, Any]]:
        done = run("get", node_of(server), "--study", study, "--to", "out", "--json", "--retries", "1", *more)
        assert "Traceback" not in done.stderr
        return done, json.loads(done.stdout)

    @pytest.mark.parametrize(
        ("mode", "code", "verdict"),
        [
            (None, 0, "complete"), ("a702_all_sent", 0, "complete"), ("b000_all_sent", 0, "complete"),
            ("find_lists_more", 3, "partial"), ("no_find", 4, "unverified"), ("success_zero", 1, "failed"),
            ("no_get", 1, "failed"), ("wrong_called_ae", 1, "failed"),
        ],
    )  # fmt: skip
    def test_exit_code_and_verdict(
        self, run: Callable[..., Run], mode: str | None, code: int, verdict: str, tmp_path: Path
    ) -> None:
        with MisbehavingPacs(mode) as server:
            done, value = self.get(run, server, server.study_uid)
        assert (value["verdict"], done.returncode) == (verdict, code), done.stderr
        if code:
            assert done.stderr.startswith("dicom-get: ")
        assert read_manifest(value["manifest"]).attrs["verdict"] == verdict

    def test_unknown_study_is_empty(self, run: Callable[..., Run], pacs: EmbeddedPacs) -> None:
        done, value = self.get(run, pacs, "1.2.3.4.5")
        assert (done.returncode, value["verdict"]) == (5, "empty")

    def test_closed_port(self, run: Callable[..., Run]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        done = run("get", f"PACS@127.0.0.1:{port}", "--study", "1.2", "--to", "out", "--retries", "0")
        assert done.returncode == 1
        assert done.stdout.startswith("failed")
        assert "onnection" in done.stderr
        assert run("echo", f"127.0.0.1:{port}").returncode == 1

    def test_too_many_matches_are_refused_with_the_count(self, run: Callable[..., Run], real: Any) -> None:
        with EmbeddedPacs(real.folder) as server:
            done = run("get", node_of(server), "-k", "StudyDate=19000101/", "--to", "out", "--max-studies", "2")
        assert (done.returncode, done.stdout) == (2, "")
        assert "--max-studies is 2" in done.stderr

    def test_closed_window(self, run: Callable[..., Run], listener: Listener) -> None:
        hour = (datetime.now(UTC).hour + 12) % 24
        done = run(
            "get", listener.node, "--study", "1.2", "--to", "out", "--window", f"{hour:02}:00-{hour:02}:30", "--json"
        )
        value = json.loads(done.stdout)
        assert (done.returncode, value["verdict"], value["reason"]) == (3, "partial", "window")
        assert datetime.fromisoformat(value["resume_at"]).hour == hour
        assert "may be resumed at" in done.stderr
        assert listener.nobody_came()

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    @pytest.mark.parametrize("mode", ["slow_objects", "silent"])
    def test_signals_end_soon(
        self, environment: dict[str, str], tmp_path: Path, number: signal.Signals, code: int, mode: str
    ) -> None:
        with MisbehavingPacs(mode) as server:
            argv = [*COMMAND, "get", node_of(server), "--study", server.study_uid, "--to", "out", "--json"]
            with subprocess.Popen(
                argv, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process:
                # Its handlers are set before it connects.
                limit = time.monotonic() + 60
                while not server.associations:
                    assert process.poll() is None
                    assert time.monotonic() < limit
                    time.sleep(0.05)
                before = time.monotonic()
                process.send_signal(number)
                out, err = process.communicate(timeout=30)
                seconds = time.monotonic() - before
        assert process.returncode == code, err
        assert seconds < 5, "two are promised; a busy machine may need longer"
        value = json.loads(out)
        assert (value["verdict"], value["reason"]) == ("cancelled", number.name)
        assert read_manifest(value["manifest"]).attrs["verdict"] == "cancelled"
        assert "Traceback" not in err
        assert f"dicom-get: {number.name}, stopping" in err
        assert not list((tmp_path / "out").rglob("*.part"))

    def test_a_reader_that_goes_away_is_no_error(
        self, environment: dict[str, str], pacs: EmbeddedPacs, ct: Any, tmp_path: Path
    ) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        argv = [*COMMAND, "get", node_of(pacs), "--study", ct.study, "--to", "out"]
        done = subprocess.run(argv, env=environment, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, timeout=60)
        os.close(writing)
        assert (done.returncode, done.stderr) == (0, b"")
        assert len(list((tmp_path / "out").rglob("*.dcm"))) == 40

    def test_nobody_reads_stderr(self, environment: dict[str, str], pacs: EmbeddedPacs, tmp_path: Path) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        argv = [*COMMAND, "find", node_of(pacs), "-k", "StudyDate=20240115"]
        done = subprocess.run(argv, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=writing, timeout=60)
        os.close(writing)
        assert done.returncode == 0
        assert done.stdout

    def test_progress_is_for_terminals_and_on_stderr(
        self, environment: dict[str, str], pacs: EmbeddedPacs, ct: Any, tmp_path: Path
    ) -> None:
        argv = [*COMMAND, "get", node_of(pacs), "--study", ct.study, "--to", "out"]
        environment = {**environment, "TERM": "xterm"}
        with terminal() as (theirs, shown):
            done = subprocess.run(
                argv, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, timeout=60
            )
        assert done.returncode == 0
        assert b"40/40" in shown
        assert done.stdout.startswith(b"complete: ")
        assert b"\x1b" not in done.stdout

    def test_an_interrupt_has_a_line_of_its_own_in_a_terminal(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        environment = {**environment, "TERM": "xterm"}
        with MisbehavingPacs("silent") as server, terminal() as (theirs, shown):
            argv = [*COMMAND, "get", node_of(server), "--study", server.study_uid, "--to", "out"]
            with subprocess.Popen(argv, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs) as get:
                limit = time.monotonic() + 30
                while b"waiting for the source" not in shown and time.monotonic() < limit:
                    time.sleep(0.05)
                get.send_signal(signal.SIGINT)
                assert get.wait(30) == 130
        assert b"\r\x1b[2Kdicom-get: SIGINT, stopping" in shown


class TestFindAll:
    def test_everything_is_listed(self, run: Callable[..., Run], real: Any) -> None:
        with EmbeddedPacs(real.folder) as server:
            done = run("find", node_of(server), "--all", "--json")
            studies = {row["StudyInstanceUID"] for row in json.loads(done.stdout)}
            series = run("find", node_of(server), "--all", "--level", "series", "--json")
        assert done.returncode == 0
        held = set(server.archive.studies())
        assert len(held) > 2
        assert studies == {row["StudyInstanceUID"] for row in json.loads(series.stdout)} == held

    @pytest.mark.parametrize(
        "key", ["PatientName=*", "StudyInstanceUID=*", "PatientID=*", "AccessionNumber=*", "StudyDate=*"]
    )
    def test_a_lone_star_matches_everything(self, run: Callable[..., Run], pacs: EmbeddedPacs, key: str) -> None:
        done = run("find", node_of(pacs), "-k", key)
        assert done.returncode == 0
        assert done.stderr == "dicom-get: 1 match\n"

    @pytest.mark.parametrize("mode", [None, "no_counts"])
    def test_after_the_limit_it_is_cancelled_and_said(self, run: Callable[..., Run], mode: str | None) -> None:
        with MisbehavingPacs(mode, series=1, instances=1099) as server, Relay("127.0.0.1", server.port) as relay:
            node = f"PACS@127.0.0.1:{relay.port}"
            done = run("find", node, "--all", "--level", "IMAGE", "--limit", "7")
            commands = [kind for direction, kind, _ in relay.commands if direction == "up"]
            exactly = run("find", node, "--all", "--level", "SERIES", "--limit", "1")
            whole = run("find", node, "--all", "--level", "IMAGE", "--limit", "0")
        assert done.returncode == 4
        assert len(done.stdout.splitlines()) == 8
        assert "cancelled after 7 rows: there may be more. Narrow the query, or raise --limit." in done.stderr
        assert 0x0FFF in commands  # C-CANCEL-RQ (PS3.7 9.3.2.3)
        assert (exactly.returncode, len(exactly.stdout.splitlines())) == (0, 2)
        assert (whole.returncode, len(whole.stdout.splitlines())) == (0, 1100)
        assert server.faults == []

    def test_a_peer_that_ignores_the_cancel_is_aborted(self, run: Callable[..., Run]) -> None:
        with MisbehavingPacs("find_endless") as server:
            done = run("find", node_of(server), "--all", "--level", "IMAGE", "--limit", "5")
        assert done.returncode == 4
        assert len(done.stdout.splitlines()) == 6

    def test_one_row_each_where_the_pacs_repeats_them(self, run: Callable[..., Run]) -> None:
        for mode in ("find_row_per_instance", "find_duplicates"):
            with MisbehavingPacs(mode) as server:
                for level, count in (("STUDY", 1), ("SERIES", 2), ("IMAGE", 8)):
                    done = run("find", node_of(server), "--all", "--level", level, "--limit", count)
                    assert (done.returncode, len(done.stdout.splitlines())) == (0, count + 1), (mode, done.stderr)

    def test_a_table_at_a_terminal_and_tabs_in_a_pipe(
        self, environment: dict[str, str], run: Callable[..., Run], pacs: EmbeddedPacs, ct: Any, tmp_path: Path
    ) -> None:
        piped = run("find", node_of(pacs), "--all").stdout.splitlines()
        assert piped[0].split("\t")[0] == "StudyInstanceUID"
        assert piped[1].split("\t")[0] == ct.study
        environment = {**environment, "TERM": "xterm", "COLUMNS": "90"}
        argv = [*COMMAND, "find", node_of(pacs), "--all"]
        with terminal() as (theirs, shown):
            subprocess.run(argv, env=environment, cwd=tmp_path, stdout=theirs, stderr=subprocess.PIPE, timeout=60)
        lines = shown.decode().splitlines()
        assert lines[0].startswith("StudyInstanceUID ")
        assert lines[1].startswith(ct.study + " ")
        assert max(map(len, lines)) <= 90


class TestPacs:
    @pytest.mark.parametrize("argv", [["--dir", "FOLDER"], ["--misbehave", "success_zero"]])
    def test_serves_until_it_is_told_to_end(
        self, environment: dict[str, str], run: Callable[..., Run], ct: Any, argv: list[str]
    ) -> None:
        argv = [*COMMAND, "pacs", "--port", "0", *(str(ct.folder) if word == "FOLDER" else word for word in argv)]
        with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            line = process.stdout.readline()
            port = line.partition("127.0.0.1:")[2].split()[0].rstrip(",")
            assert run("echo", f"PACS@127.0.0.1:{port}").returncode == 0
            process.terminate()
            assert process.wait(10) == 0

    def test_port_in_use(self, run: Callable[..., Run], listener: Listener, ct: Any) -> None:
        port = listener.node.rpartition(":")[2]
        done = run("pacs", "--dir", ct.folder, "--port", port)
        assert done.returncode == 1
        assert "cannot listen on 127.0.0.1" in done.stderr
