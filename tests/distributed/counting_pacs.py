"""The embedded PACS as a process of its own that says what it counted.

Usage: counting_pacs.py FOLDER SECONDS, the pause before each instance. A line on stdin asks, a line of JSON answers.
After the line ``hold`` each association stops at its third instance, until there comes ``go``.
"""

from __future__ import annotations

import json
import sys
import threading
import time

from airflow_dicom_get.testing.pacs import EmbeddedPacs


def main() -> None:
    pause = float(sys.argv[2])
    going, mine = threading.Event(), threading.local()
    going.set()

    def before_send(uid: str) -> None:
        # Each association has a thread of its own.
        mine.asked = getattr(mine, "asked", 0) + 1
        time.sleep(pause)
        if mine.asked > 2:
            going.wait()

    # It takes more than it is meant to get, so that it sees one that is too many.
    with EmbeddedPacs(
        sys.argv[1],
        ae_title="PACS",
        require_called_ae=True,
        max_associations=100,
        before_send=before_send,
    ) as pacs:
        print(pacs.port, flush=True)
        for line in sys.stdin:
            if line.strip() == "hold":
                going.clear()
            elif line.strip() == "go":
                going.set()
            counted = {
                "sent": dict(pacs.sent),
                "open": pacs.associations,
                "peak": pacs.peak_associations,
                "total": pacs.total_associations,
            }
            print(json.dumps(counted), flush=True)


if __name__ == "__main__":
    main()
