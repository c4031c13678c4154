"""A C-FIND and C-GET client on pynetdicom, one transfer syntax per context: what the tests measure servers by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE

IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
FIND = {"StudyRoot": "1.2.840.10008.5.1.4.1.2.2.1", "PatientRoot": "1.2.840.10008.5.1.4.1.2.1.1"}
GET = {"StudyRoot": "1.2.840.10008.5.1.4.1.2.2.3", "PatientRoot": "1.2.840.10008.5.1.4.1.2.1.3"}


@dataclass
class Retrieved:
    """What came: data sets by SOP Instance UID with their syntax, and the responses to the C-GET."""

    datasets: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    responses: list[Dataset] = field(default_factory=list)
    identifiers: list[Dataset | None] = field(default_factory=list)

    @property
    def final(self) -> Dataset:
        return self.responses[-1]


@contextmanager
def associate(
    node: Any, contexts: Iterable[tuple[str, str]], *, roles: bool = True, max_pdu: int = 131072, **options: Any
) -> Iterator[Association]:
    """An association with one context for each (class, syntax), released at the end."""
    ae = AE("REFERENCE")
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
    pairs = list(dict.fromkeys(contexts))
    storage = {sop_class for sop_class, _ in pairs} - {*FIND.values(), *GET.values(), "1.2.840.10008.1.1"}
    association = ae.associate(
        "127.0.0.1",
        node.port,
        ae_title=getattr(node, "ae_title", "ANY-SCP"),
        contexts=[build_context(*pair) for pair in pairs],
        ext_neg=[build_role(sop_class, scp_role=True) for sop_class in sorted(storage)] if roles else [],
        max_pdu=max_pdu,
        **options,
    )
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def identifier(level: str, keys: Mapping[str, Any]) -> Dataset:
    dataset = Dataset()
    dataset.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(dataset, keyword, value)
    return dataset


def find(
    node: Any, level: str, keys: Mapping[str, Any], *, model: str = "StudyRoot", syntax: str = IMPLICIT
) -> list[Dataset]:
    """The rows of a C-FIND that succeeds."""
    rows: list[Dataset] = []
    with associate(node, [(FIND[model], syntax)]) as association:
        for status, row in association.send_c_find(identifier(level, keys), FIND[model]):
            if status.Status == 0xFF00:
                assert row is not None
                rows.append(row)
        assert status.Status == 0, hex(status.Status)
    return rows


def get(
    node: Any,
    level: str,
    keys: Mapping[str, Any],
    pairs: Iterable[tuple[str, str]],
    *,
    model: str = "StudyRoot",
    syntax: str = IMPLICIT,
    on_store: Callable[[evt.Event], None] | None = None,
    **options: Any,
) -> Retrieved:
    """Run a C-GET and answer every sub-operation with success."""
    result = Retrieved()

    def store(event: evt.Event) -> int:
        request = event.request
        assert isinstance(request, C_STORE)
        assert request.DataSet is not None
        data = request.DataSet.getvalue()
        result.datasets[str(request.AffectedSOPInstanceUID)] = (str(event.context.transfer_syntax), data)
        if on_store is not None:
            on_store(event)
        return 0

    contexts = [(GET[model], syntax), *pairs]
    with associate(node, contexts, evt_handlers=[(evt.EVT_C_STORE, store)], **options) as association:
        assert association.is_established
        for status, rest in association.send_c_get(identifier(level, keys), GET[model]):
            result.responses.append(status)
            result.identifiers.append(rest)
    return result
