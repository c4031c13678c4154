"""A C-GET client on pynetdicom with the cheapest handler that it allows: the bytes as received, into a file.

    python benchmarks/peer_pynetdicom.py HOST PORT CALLED_AE STUDY FOLDER

It hashes, syncs and checks nothing, and no data set is parsed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydicom.dataset import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.dimse_primitives import C_STORE

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"


def keep(event: evt.Event, folder: str) -> int:
    """Write an instance as received, with its file meta information."""
    assert isinstance(event.request, C_STORE)
    with open(f"{folder}/{event.request.AffectedSOPInstanceUID}", "wb", buffering=0) as file:
        file.write(event.encoded_dataset())
    return 0


def main() -> int:
    """Fetch the study. Returns 0 if the last response says success."""
    host, port, called, study, folder = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    ae = AE("PYNETDICOM")
    ae.maximum_pdu_size = 0
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 120
    ae.add_requested_context(STUDY_ROOT_GET)
    ae.add_requested_context(CT, EXPLICIT)
    association = ae.associate(
        host,
        int(port),
        ae_title=called,
        max_pdu=0,
        ext_neg=[build_role(CT, scp_role=True)],
        evt_handlers=[(evt.EVT_C_STORE, keep, [folder])],
    )
    if not association.is_established:
        print("no association", file=sys.stderr)
        return 1
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "STUDY"
    identifier.StudyInstanceUID = study
    status = None
    for response, _ in association.send_c_get(identifier, STUDY_ROOT_GET):
        status = response.get("Status")
    association.release()
    return 0 if status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
