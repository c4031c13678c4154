"""The shell in a process of its own, and what memory it took."""

from __future__ import annotations

import subprocess
import sys
import tempfile

# Between the two: a new program inherits the peak memory of the process that started it, and the tests' is large.
_LAUNCH = """
import os, sys
report = os.dup(1)
os.dup2(int(sys.argv[1]), 1)
os.dup2(int(sys.argv[1]), 2)
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[2:]])
_, status, usage = os.wait4(pid, 0)
os.write(report, b"%d %d" % (os.waitstatus_to_exitcode(status), usage.ru_maxrss >> 10))
"""


def shell(*arguments: str) -> tuple[int, str, int]:
    """Run ``dicom-get``: its exit status, what it said, and its peak memory in MiB."""
    with tempfile.TemporaryFile("w+") as said:
        call = [sys.executable, "-c", _LAUNCH, str(said.fileno()), "-m", "airflow_dicom_get.cli", *arguments]
        done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True, pass_fds=[said.fileno()])
        status, peak = map(int, done.stdout.split())
        said.seek(0)
        return status, said.read(), peak
