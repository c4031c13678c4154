"""Fill an Airflow database with the retrievals of three weeks, as a hospital would have them. Run on its own.

An argument says how many a night; without it there are about a dozen.
"""

from __future__ import annotations

import random
import sys
import uuid
import warnings
from datetime import UTC, datetime, timedelta

warnings.simplefilter("ignore")

from airflow import settings  # noqa: E402
from airflow.models import TaskInstance  # noqa: E402, TID251
from airflow.models.dagrun import DagRun  # noqa: E402, TID251
from airflow.models.xcom import XComModel  # noqa: E402, TID251
from airflow.utils.state import DagRunState  # noqa: E402
from sqlalchemy import insert  # noqa: E402

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
            session.add(run)
            session.flush()
            instances, xcoms = [], []
            # One night the line is slow, and some studies do not come whole.
            slow = night in (9, 10)
            for number in range(a_night or chance.randint(9, 16)):
                uid = f"1.2.826.0.1.3680043.8.498.{chance.randrange(10**20)}"
                place = {"dag_id": DAG_ID, "run_id": run_id, "task_id": "get", "map_index": number}
                total = chance.randint(80, 900)
                missing = chance.randint(1, 40) if chance.random() < (0.5 if slow else 0.02) else 0
                speed = chance.uniform(6e6, 12e6) if slow else chance.uniform(38e6, 61e6)
                size = (total - missing) * 524_700
                start = begun + timedelta(minutes=6 * number) * (12 / (a_night or 12))
                verdict = "partial" if missing else "complete"
                instances.append(
                    {
                        **place,
                        "id": uuid.UUID(int=chance.getrandbits(128)),
                        "start_date": start,
                        "end_date": start + timedelta(seconds=size / speed + 2),
                        "state": "failed" if missing else "success",
                        "rendered_map_index": f"{uid} {chance.choice(('CT', 'MR', 'CT/SR', 'US'))}",
                        "operator": "DicomGetOperator",
                        "try_number": 4 if missing else 1,
                        "max_tries": 3,
                        "pool": "pacs",
                        "pool_slots": 1,
                        "span_status": "not_started",
                    }
                )
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
                xcoms.append({**place, "dag_run_id": run.id, "key": "summary", "value": value, "timestamp": start})
            session.execute(insert(TaskInstance.__table__), instances)
            session.execute(insert(XComModel.__table__), xcoms)
        session.commit()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
