"""What a study of very many small instances costs: time for each, memory for each, and to find it finished.

    python benchmarks/many.py --instances 5000 100000

Retrieves studies of 8 KB instances in 40 series from ``memory_scp.py``, each in a process of its own,
and each again when it is finished.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory_scp import STUDY

_CLIENT = """
import json, resource, sys, time
import airflow_dicom_get.manifest.files, pyarrow.parquet
from airflow_dicom_get import GetScu
node, to, associations = sys.argv[1], sys.argv[2], int(sys.argv[3])
scu = GetScu(node, destination=to, associations=associations, max_associations=associations)
scu.echo()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, began, cpu = peak(), time.monotonic(), time.process_time()
result = scu.get_study({"StudyInstanceUID": "%s"})
print(json.dumps({"verdict": result.verdict, "completed": result.completed, "skipped": result.skipped,
    "seconds": time.monotonic() - began, "cpu": time.process_time() - cpu, "rss": peak(), "before": before}))
"""


def retrieve(node: str, to: Path, associations: int) -> dict[str, Any]:
    """One retrieval in a process of its own."""
    command = [sys.executable, "-c", _CLIENT % STUDY, node, str(to), str(associations)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    if result["verdict"] != "complete":
        raise SystemExit(f"the retrieval ended as {result}")
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, nargs="+", default=[5000, 100_000])
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--series", type=int, default=40)
    parser.add_argument("--associations", type=int, default=1)
    parser.add_argument("--to", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    for count in args.instances:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        scp = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "memory_scp.py"), "--port", str(port),
             "--instances", str(count), "--size", str(args.size), "--series", str(args.series)],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        to = Path(tempfile.mkdtemp(dir=args.to))
        try:
            assert scp.stdout is not None
            scp.stdout.readline()
            node = f"PACS@127.0.0.1:{port}"
            first = retrieve(node, to, args.associations)
            again = retrieve(node, to, args.associations)
            assert again["skipped"] == count
            for name, run in (("fetched", first), ("finished before", again)):
                print(
                    f"{count:7} {name:16} {run['seconds']:7.2f} s  {run['seconds'] / count * 1e6:6.1f} us each "
                    f"({run['cpu'] / count * 1e6:6.1f} us CPU)  peak {run['rss'] / 1e6:6.1f} MB, "
                    f"{(run['rss'] - run['before']) / count:6.0f} B each",
                    flush=True,
                )
        finally:
            scp.terminate()
            scp.wait()
            shutil.rmtree(to)


if __name__ == "__main__":
    main()
