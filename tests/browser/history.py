"""Fill an Airflow database with the retrievals of three weeks, as a hospital would have them. Run on its own.

An argument says how many a night; without it there are about a dozen.
"""

from __future__ import annotations

import random
import sys
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[2]))

from airflow import settings  # noqa: E402
from airflow.models.dagrun import DagRun  # noqa: E402, TID251
from airflow.utils.state import DagRunState  # noqa: E402

from tests.support.kept_runs import add_run  # noqa: E402

DAG_ID = "nightly_archive"
NIGHTS = 21


def main(a_night: int | None = None) -> None:
    chance = random.Random(7)
    settings.initialize()
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    with settings.get_session()() as session:
        for night in range(NIGHTS, 0, -1):
            begun = midnight - timedelta(days=night, hours=2)
            run_id = f"scheduled__{begun.isoformat()}"
            run = DagRun(dag_id=DAG_ID, run_id=run_id, run_type="scheduled", state=DagRunState.SUCCESS, run_after=begun)
            tasks = []
            # One night the line is slow, and some studies do not come whole.
            slow = night in (9, 10)
            for number in range(a_night or chance.randint(9, 16)):
                uid = f"1.2.826.0.1.3680043.8.498.{chance.randrange(10**20)}"
                total = chance.randint(80, 900)
                missing = chance.randint(1, 40) if chance.random() < (0.5 if slow else 0.02) else 0
                speed = chance.uniform(6e6, 12e6) if slow else chance.uniform(38e6, 61e6)
                size = (total - missing) * 524_700
                start = begun + timedelta(minutes=6 * number) * (12 / (a_night or 12))
                verdict = "partial" if missing else "complete"
                value = {
                    "schema": 1,
                    "verdict": verdict,
                    "reason": "not_sent" if missing else None,
                    "total": total,
                    "completed": total - missing,
                    "skipped": 0,
                    "failed": missing,
                    "bytes": size,
                    "duration_seconds": size / speed,
                    "bytes_per_second": speed,
                    "evidence": "list+counts",
                    "errors": [],
                    "source": "ARCHIVE@10.20.0.5:11112",
                    "destination": "/data/dicom",
                    "manifest_uri": None,
                }
                tasks.append(
                    {
                        "begun": start,
                        "ended": start + timedelta(seconds=size / speed + 2),
                        "state": "failed" if missing else "success",
                        "label": f"{uid} {chance.choice(('CT', 'MR', 'CT/SR', 'US'))}",
                        "earlier": 3 if missing else 0,
                        "pool": "pacs",
                        "summary": value,
                    }
                )
            add_run(session, run, tasks)
        session.commit()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
