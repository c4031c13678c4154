"""The clients that are measured, each by one call: ``run(source)`` into a new folder, checked afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from sources import Source

_HERE = Path(__file__).parent
_PATIENCE = 900
DICOM_GET = str(Path(sys.executable).parent / "dicom-get")
BARE = {"checksum": None, "durable": False}
_IMPORTS = "import worker; worker.import_everything()"


@dataclass(frozen=True)
class Run:
    """What one retrieval took."""

    wall: float
    user: float
    system: float
    rss: int | None = None
    """Peak resident bytes of the process, where it had one of its own."""


def give_back(folder: Path) -> None:
    """Give back the room of the files in a folder.

    They are emptied, not removed: ext4 looks at each inode that was freed in the last minutes before it makes
    a new file, so that the clients of later runs would pay for the removals of earlier ones.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)


class Bench:
    """The folder and the worker that all runs share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._outs = 0
        self.out = folder / "out-0"
        self._logs = folder / "client"
        (folder / "config").mkdir()
        # No node, and no limit, of the user's own.
        self._environment = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config")}
        self._environment.pop("TCP_NODELAY", None)
        # An installed package is compiled once, not in each process.
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._worker: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._worker = subprocess.Popen(
            [sys.executable, str(_HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.communicate(timeout=60)

    def empty_page_cache(self) -> None:
        """Let no run pay for what others wrote, where that is allowed, and load again what the clients load."""
        os.sync()
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except OSError:
            return
        for command in ([DICOM_GET, "get", "--help"], [sys.executable, "-c", _IMPORTS], ["getscu", "--version"]):
            if shutil.which(command[0]):
                subprocess.run(command, env=self._environment, cwd=_HERE, stdout=subprocess.DEVNULL, check=True)

    # --- runs ----------------------------------------------------------------------------------

    def fresh(self) -> Path:
        """A new folder, with nothing left to be written to the disk by what was before."""
        self._outs += 1
        self.out = self.folder / f"out-{self._outs}"
        self.out.mkdir()
        os.sync()
        return self.out

    def check(self, source: Source, who: str) -> None:
        """See that every instance is there in full, and make room again."""
        self.check_files(source, self.out, who)
        give_back(self.out)

    def check_files(self, source: Source, folder: Path, who: str) -> None:
        """See that every instance is in the folder, in full."""
        files = [path for path in folder.rglob("*") if path.is_file() and "_manifests" not in path.parts]
        short = [path for path in files if path.stat().st_size < source.size]
        if len(files) != source.instances or short:
            raise RuntimeError(
                f"{who} from {source.title}: {len(files)} files, {len(short)} of them short, not {source.instances}"
            )

    def check_result(self, source: Source) -> None:
        """See what the last ``dicom-get --json`` said."""
        result = json.loads(Path(f"{self._logs}.out").read_text())
        if (result["verdict"], result["completed"]) != ("complete", source.instances):
            raise RuntimeError(f"dicom-get from {source.title}: {result['verdict']}, {result['completed']} instances")

    def command(self, command: list[str], environment: Mapping[str, str] | None = None) -> Run:
        """Run a command to its end by the launcher."""
        stdout, stderr = f"{self._logs}.out", f"{self._logs}.err"
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_HERE / "launch.py"), stdout, stderr, *command],
            stdout=subprocess.PIPE,
            text=True,
            env={**self._environment, **(environment or {})},
            start_new_session=True,
        )
        try:
            answer, _ = process.communicate(timeout=_PATIENCE)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        used = json.loads(answer)
        if used["exit"] != 0:
            said = Path(stderr).read_text(errors="replace")[-1000:]
            raise RuntimeError(f"{' '.join(command)} ended with {used['exit']}: {said}")
        return Run(used["wall"], used["user"], used["system"], used["rss"])

    def job(self, job: dict[str, Any]) -> dict[str, Any]:
        """Have the worker do something."""
        assert self._worker is not None
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self._worker.stdin.write(json.dumps(job) + "\n")
        self._worker.stdin.flush()
        line = self._worker.stdout.readline()
        if not line:
            raise RuntimeError("the worker ended")
        answer: dict[str, Any] = json.loads(line)
        if answer["verdict"] != "complete":
            raise RuntimeError(f"{job}: {answer['verdict']}")
        return answer

    # --- clients -------------------------------------------------------------------------------

    def warm(self, source: Source, options: Mapping[str, Any] | None = None) -> Run:
        """``GetScu`` in the worker."""
        run = self.retrieve(source, str(self.fresh()), options or {})
        self.check(source, "GetScu")
        return run

    def retrieve(self, source: Source, destination: str, options: Mapping[str, Any]) -> Run:
        """``GetScu`` in the worker, to anywhere; what came of it is for the caller to check."""
        job = {"node": source.node, "study": source.study, "destination": destination, "options": dict(options)}
        answer = self.job(job)
        return Run(answer["wall"], answer["user"], answer["system"])

    def bare(self, source: Source) -> Run:
        """The same without digest and sync."""
        return self.warm(source, BARE)

    def no_digest(self, source: Source) -> Run:
        """The same without digest."""
        return self.warm(source, {"checksum": None})

    def over(self, associations: int) -> Callable[[Source], Run]:
        """The same over so many associations."""
        return partial(self.warm, options={"associations": associations, "max_associations": associations})

    def profile(self, source: Source) -> list[dict[str, Any]]:
        """Where the time of a full retrieval goes."""
        job = {"node": source.node, "study": source.study, "destination": str(self.fresh()), "profile": True}
        answer = self.job(job)
        self.check(source, "GetScu")
        lines: list[dict[str, Any]] = answer["profile"]
        return lines

    def control(self, source: Source) -> Run:
        """Hash, write and sync as much, without network."""
        size = {"instances": source.instances, "size": source.size}
        answer = self.job({"control": size, "folder": str(self.fresh())})
        self.check(source, "the control")
        return Run(answer["wall"], answer["user"], answer["system"])

    def process(self, source: Source) -> Run:
        """``dicom-get get`` as a process."""
        return self._process(source, self.fresh(), keep=False)

    def process_and_again(self, source: Source) -> tuple[Run, Run]:
        """``dicom-get get`` as a process, and once more, when nothing lacks."""
        to = self.fresh()
        return self._process(source, to, keep=True), self._process(source, to, keep=False)

    def _process(self, source: Source, to: Path, *, keep: bool) -> Run:
        run = self.command([DICOM_GET, "get", source.node, "--study", source.study, "--to", str(to), "--json"])
        self.check_result(source)
        self.check_files(source, to, "dicom-get")
        if not keep:
            give_back(to)
        return run

    def tuned_getscu(self, source: Source, *, keep: bool = False) -> Run:
        """``getscu`` with the options and the environment that make it fast; ``keep`` leaves the files."""
        return self._getscu(source, ["+B", "-pdu", str(131072)], {"TCP_NODELAY": "1"}, keep=keep)

    def shipped_getscu(self, source: Source) -> Run:
        """``getscu`` as Debian ships it."""
        return self._getscu(source, [], {})

    def pynetdicom(self, source: Source) -> Run:
        """pynetdicom with the cheapest handler."""
        script = str(_HERE / "peer_pynetdicom.py")
        where = [source.host, str(source.port), source.ae_title, source.study, str(self.fresh())]
        run = self.command([sys.executable, script, *where])
        self.check(source, "pynetdicom")
        return run

    def cohort(self, node: str, studies: int) -> Run:
        """The studies of so many accession numbers, found by ``GetScu`` in the worker over one association."""
        answer = self.job({"node": node, "cohort": studies, "folder": str(self.fresh())})
        return Run(answer["wall"], answer["user"], answer["system"])

    def help(self) -> Run:
        """``dicom-get --help``."""
        return self.command([DICOM_GET, "--help"])

    def _getscu(self, source: Source, options: list[str], environment: Mapping[str, str], *, keep: bool = False) -> Run:
        command = ["getscu", *options, "-S", "-od", str(self.fresh()), "-aec", source.ae_title]
        command += ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={source.study}"]
        run = self.command([*command, source.host, str(source.port)], environment)
        self.check_files(source, self.out, "getscu")
        if not keep:
            give_back(self.out)
        return run
