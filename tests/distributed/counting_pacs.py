"""The embedded PACS as a process of its own that says what it counted.

Usage: counting_pacs.py FOLDER SECONDS, the pause before each instance. A line on stdin asks, a line of JSON answers.
"""

from __future__ import annotations

import json
import sys
import time

from airflow_dicom_get.testing.pacs import EmbeddedPacs


def main() -> None:
    pause = float(sys.argv[2])
    # It takes more than it is meant to get, so that it sees one that is too many.
    with EmbeddedPacs(
        sys.argv[1],
        ae_title="PACS",
        require_called_ae=True,
        max_associations=100,
        before_send=lambda uid: time.sleep(pause),
    ) as pacs:
        print(pacs.port, flush=True)
        for _ in sys.stdin:
            counted = {
                "sent": dict(pacs.sent),
                "open": pacs.associations,
                "peak": pacs.peak_associations,
                "total": pacs.total_associations,
            }
            print(json.dumps(counted), flush=True)


if __name__ == "__main__":
    main()
