"""Measure how late the looks of many sensors are while one of three PACSs accepts connections and says nothing.

    python benchmarks/sensors.py --sensors 300 --poke-interval 60 --rounds 4

The triggers run in one loop, as in a triggerer. A look is late by what lies between two answers beyond the poke
interval. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


async def measure(nodes: list[str], sensors: int, poke_interval: float, rounds: int) -> dict[str, object]:
    """Run the triggers for so many rounds."""
    from airflow_dicom_get.engine.arrivals import Awaited
    from airflow_dicom_get.triggers import dicom

    late: list[float] = []
    pool: list[float] = []
    looks = dict.fromkeys(nodes, 0)
    real = dicom.wait_for_look

    async def timed(conn_id: str, queries: object, interval: float) -> object:
        asked = time.monotonic()
        try:
            return await real(conn_id, queries, interval)  # type: ignore[arg-type]
        finally:
            looks[conn_id] += 1
            if conn_id != "silent":
                late.append(time.monotonic() - asked)

    dicom.wait_for_look = timed  # type: ignore[assignment]

    async def follow(number: int) -> None:
        study, node = f"1.2.{number}", nodes[number % len(nodes)]
        awaited = Awaited([{"StudyInstanceUID": study}], [study], settled_seconds=3600.0)
        await asyncio.sleep(poke_interval * number / sensors)  # they were deferred one after the other
        async for _ in dicom.DicomStudyTrigger(awaited.to_json(), {}, poke_interval, node).run():
            pass

    async def others() -> None:
        while True:
            await asyncio.sleep(1)
            asked = time.monotonic()
            await asyncio.to_thread(int)
            pool.append(time.monotonic() - asked)

    tasks = [asyncio.create_task(follow(number)) for number in range(sensors)] + [asyncio.create_task(others())]
    await asyncio.sleep(poke_interval * (rounds + 1))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    late.sort()
    return {
        "sensors": sensors,
        "poke_interval": poke_interval,
        "looks": looks,
        "late_seconds": {"median": late[len(late) // 2], "p99": late[int(len(late) * 0.99)], "most": late[-1]},
        "another_thread_waited_at_most": max(pool),
    }


def main() -> int:
    """Serve the PACSs, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sensors", type=int, default=300)
    parser.add_argument("--poke-interval", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ |= {
            "AIRFLOW_HOME": str(folder / "airflow"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__UNIT_TEST_MODE": "True",
        }
        from airflow_dicom_get.testing.pacs import EmbeddedPacs
        from airflow_dicom_get.testing.sample_data import big_study
        from tests.support.silent import SilentPacs

        big_study(folder / "studies", 20, 4096, series=2)
        served = {name: stack.enter_context(EmbeddedPacs(folder / "studies")) for name in ("first", "second")}
        silent = stack.enter_context(SilentPacs())
        for name, port in {**{name: one.port for name, one in served.items()}, "silent": silent.port}.items():
            os.environ[f"AIRFLOW_CONN_{name.upper()}"] = f"dicom://PACS@127.0.0.1:{port}"
        found = asyncio.run(measure([*served, "silent"], options.sensors, options.poke_interval, options.rounds))
        print(json.dumps({**found, "open_at_the_silent_one_at_most": silent.most}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
