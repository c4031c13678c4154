"""What a query means, and what of it is said to be there, at PACS with habits that no other test has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving import archive
from airflow_dicom_get.testing.misbehaving.archive import Instance, Row
from airflow_dicom_get.testing.misbehaving.behaviour import FIND, MODE_CLASSES, Behaviour

STUDY = archive.STUDY_UID


class _AtFind(Behaviour):
    stages = frozenset({FIND})


Start = Callable[..., tuple[GetScu, MisbehavingPacs]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a PACS of a behaviour; a client of it, and the PACS."""
    started: list[MisbehavingPacs] = []

    def make(behaviour: type[Behaviour] | str | None = None, *, series: int = 1, instances: int = 2,
             more: Sequence[Instance] = (), **options: Any) -> tuple[GetScu, MisbehavingPacs]:  # fmt: skip
        name = behaviour if isinstance(behaviour, str) or behaviour is None else "of_a_test"
        if isinstance(behaviour, type):
            monkeypatch.setitem(MODE_CLASSES, "of_a_test", behaviour)
        pacs = MisbehavingPacs(name, series=series, instances=instances, size=2000)
        pacs._site.instances.extend(more)
        started.append(pacs)
        pacs.start()
        return GetScu(f"X@127.0.0.1:{pacs.port}", destination=tmp_path / "out", **options), pacs

    yield make
    for pacs in started:
        pacs.close()
        assert pacs.faults == []


def stored(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "out").rglob("*.dcm")}


# --- the loop of rounds ------------------------------------------------------------------------------


class _Flips(_AtFind):
    """Every other list lacks its last instance."""

    lists = 0

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        type(self).lists += level == "IMAGE"
        listing = self.listing() if self.lists % 2 else self.listing()[:-1]
        return archive.find(level, query, listing, self.describe)


def test_a_list_that_never_comes_to_rest_ends_the_rounds(start: Start, tmp_path: Path) -> None:
    _Flips.lists = 0
    client, pacs = start(_Flips, instances=3, deadlines={"operation": 60})
    result = client.get_study({"StudyInstanceUID": STUDY})
    assert (result.verdict, result.reason) == ("partial", "still_growing")
    assert stored(tmp_path) == set(pacs.uids)
