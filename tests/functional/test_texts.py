"""What people read when something goes wrong: the right verb, each thing once, the names that the surface uses."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.config.shell import in_shell
from airflow_dicom_get.engine.query import parse_query
from airflow_dicom_get.errors import InvalidQuery, S3Error, sentences
from airflow_dicom_get.net import association
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.servers import free_port
from tests.support.holdings import Holding

CLOSED = "Connection refused."


def shell(*arguments: object, home: Path, code: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the shell with both streams in one, in the order in which a terminal has them."""
    start = f"import sys\n{code}\nfrom airflow_dicom_get.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "XDG_"))}
    return subprocess.run(
        [sys.executable, "-c", start, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={**kept, "HOME": str(home), "AWS_EC2_METADATA_DISABLED": "true", **environ},
    )


class TestStore:
    def test_a_closed_port(self, ct: Holding, tmp_path: Path) -> None:
        count = len(ct.files)
        node = f"PACS@127.0.0.1:{free_port()}"
        done = shell("store", node, ct.folder, home=tmp_path)
        assert done.returncode == 1
        assert f"Storing failed. No connection to {node}: {CLOSED}" in done.stdout
        assert f"0 of {count} instances are stored at the node, {count} not stored" in done.stdout
        assert f"{count - 1} × A file was not tried before the end." in done.stdout
        assert "Forwarding" not in done.stdout
        assert "retrieved" not in done.stdout

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "bad.csv").write_text("StudyInstanceUID\n1.2\n")
        done = shell("store", "PACS@127.0.0.1:1", tmp_path / "bad.csv", home=tmp_path)
        assert done.returncode == 1
        assert "failed (unusable_files): nothing was stored\n" in done.stdout
        assert "A file is not a DICOM instance that can be stored. For example: " in done.stdout

    def test_an_empty_source_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "nothing").mkdir()
        done = shell("store", "PACS@127.0.0.1:1", tmp_path / "nothing", home=tmp_path)
        assert done.returncode == 2
        assert f"dicom-get: error: '{tmp_path}/nothing' holds no files. " in done.stdout


class TestShell:
    def test_the_verdict_comes_first(self, tmp_path: Path) -> None:
        done = shell("get", f"PACS@127.0.0.1:{free_port()}", "--study", "1.2", "--to", tmp_path / "to", home=tmp_path)
        lines = [line for line in done.stdout.splitlines() if "Retrying" not in line]
        assert lines[0] == "failed (connect_failed): nothing was retrieved"
        assert lines[-1].startswith("dicom-get: No connection to PACS@127.0.0.1:")

    def test_no_credentials(self, tmp_path: Path) -> None:
        done = shell("get", "PACS@127.0.0.1:1", "--study", "1.2", "--to", "s3://bucket/x", home=tmp_path)
        assert done.stdout.count("no credentials were found") == 1
        assert "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give --s3-profile." in done.stdout
        assert done.stdout.startswith("failed (destination_error): ")
        assert "access_key" not in done.stdout

    @pytest.mark.parametrize(
        ("argv", "usage", "text"),
        [
            (
                ["get", "N", "--studie", "1.2", "--to", "x"],
                "get NODE",
                "--studie is not an option of this verb. Did you",
            ),
            (["get", "N", "--asociations=2"], "get NODE", "Did you mean --associations?"),
            (["store", "N", "x", "--zzzz"], "store NODE", "--zzzz is not an option of this verb. See its --help."),
            (["echo", "N", "M"], "echo NODE", "'M' is one argument too many."),
            (["get", "N"], "get NODE", "Give --study UID or -k KEY=VALUE."),
            (["verifyy"], "[-h]", "'verifyy' is not a verb. Did you mean verify?"),
        ],
    )
    def test_a_misspelt_word(self, argv: list[str], usage: str, text: str, tmp_path: Path) -> None:
        done = shell(*argv, home=tmp_path)
        assert done.returncode == 2
        assert done.stdout.startswith(f"usage: dicom-get {usage}")
        assert text in done.stdout

    def test_a_busy_port_of_pacs(self, ct: Holding, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            done = shell("pacs", "--dir", ct.folder, "--port", port, home=tmp_path)
        assert done.returncode == 1
        assert (
            f"cannot listen on 127.0.0.1:{port}: Address already in use. Give another port with --port" in done.stdout
        )

    def test_the_misbehaving_pacs_and_a_busy_port(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            done = shell("pacs", "--misbehave", "no_get", "--port", taken.getsockname()[1], home=tmp_path)
        assert (done.returncode, "Give another port with --port" in done.stdout) == (1, True)


class TestSentences:
    def test_a_full_stop_before_the_hint(self) -> None:
        assert sentences("The conn_id `x` isn't defined", "Create it.") == "The conn_id `x` isn't defined. Create it."
        assert sentences("It is full.", "Make room.") == "It is full. Make room."
        assert sentences("What?", "") == "What?"

    def test_a_misspelt_keyword(self) -> None:
        with pytest.raises(InvalidQuery) as caught:
            parse_query({"StudyDat": "today"}, query_model="StudyRoot", timezone="UTC")
        assert str(caught.value) == "'StudyDat' is not a DICOM keyword. Did you mean StudyDate?"

    def test_reasons_are_of_the_vocabulary(self) -> None:
        assert S3Error("S3 PutObject failed.").word == "destination_error"

    def test_options_as_the_shell_writes_them(self) -> None:
        told = "Raise max_studies, or deadlines.find_response; '/data/max_studies' and s3_config={'bucket': 1} stay."
        assert in_shell(told) == (
            "Raise --max-studies, or --find-response-timeout; '/data/max_studies' and s3_config={'bucket': 1} stay."
        )


class TestWaits:
    """One rule for the three kinds of node, and it is said what is waited for."""

    @pytest.mark.parametrize("kind", ["source", "destination", "target"])
    def test_a_node_that_no_connection_can_be_made_to(
        self, kind: str, ct: Holding, embedded: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        closed = f"PACS@127.0.0.1:{free_port()}"
        if kind == "target":
            result = StoreScu(closed, manifest_root=tmp_path / "state").store(ct.folder)
        else:
            source = closed if kind == "source" else f"PACS@127.0.0.1:{embedded(ct.folder).port}"
            to = tmp_path / "to" if kind == "source" else f"dicom://{closed}"
            scu = GetScu(source, destination=to, manifest_root=tmp_path / "state")
            result = scu.get_study({"StudyInstanceUID": ct.study})
        assert result.verdict == "failed"
        assert result.transient
        retried = [text for text in caplog.messages if "Retrying in" in text]
        assert [text.rpartition("(")[2] for text in retried] == ["1 of 2).", "2 of 2)."]
        assert all(f"No connection to {closed}: {CLOSED} Retrying in" in text for text in retried)

    def test_a_source_that_does_not_answer_a_c_find(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(association, "_SILENCE", 0.2)
        caplog.set_level(logging.INFO)
        with MisbehavingPacs("find_silent") as pacs:
            node = f"PACS@127.0.0.1:{pacs.port}"
            scu = GetScu(node, destination=tmp_path, deadlines={"find_response": 1.0})
            result = scu.get_study({"StudyInstanceUID": pacs.study_uid})
        assert (result.verdict, result.reason, result.associations) == ("failed", "deadline", 2)
        waits = [text for text in caplog.messages if text.startswith("Waiting for")]
        assert len(waits) == 2
        assert all(text.startswith(f"Waiting for {node} to answer the C-FIND, until ") for text in waits)
        assert all(text.endswith(" at most (1 s, deadlines.find_response).") for text in waits)
        (retried,) = [text for text in caplog.messages if "Retrying in" in text]
        assert "(1 of 1)" in retried

    def test_the_shell_shows_it(self, tmp_path: Path) -> None:
        code = "from airflow_dicom_get.net import association\nassociation._SILENCE = 0.2"
        with MisbehavingPacs("find_silent") as pacs:
            node = f"PACS@127.0.0.1:{pacs.port}"
            words = ("get", node, "--study", pacs.study_uid, "--to", tmp_path / "to", "--find-response-timeout", 1)
            done = shell(*words, home=tmp_path, code=code)
        assert done.stdout.startswith(f"dicom-get: Waiting for {node} to answer the C-FIND, until ")
        assert " at most (1 s, --find-response-timeout).\n" in done.stdout
        assert (
            f"{node} did not answer within 1 s (--find-response-timeout); the association was aborted." in done.stdout
        )
        assert "raise --find-response-timeout" in done.stdout
        shutil.rmtree(tmp_path / "to", ignore_errors=True)
