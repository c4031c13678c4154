"""Errors travel between processes, say who failed, and let no text of a peer through as it is."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get import errors as e

CLASSES = [found for _, found in inspect.getmembers(e, inspect.isclass) if issubclass(found, e.DicomGetError)]
FACTS = {"node": "PACS@127.0.0.1:104", "study": "1.2.3", "status": 0xA700, "result": 2, "phase": "idle"}


def test_there_is_one_root() -> None:
    own = [found for _, found in inspect.getmembers(e, inspect.isclass) if found.__module__ == e.__name__]
    assert set(own) == set(CLASSES)
    assert len(own) > 20


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_everything(cls: type[e.DicomGetError], protocol: int) -> None:
    error = cls("It failed.", hint="Try again.", **FACTS)
    for back in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(back) is cls
        assert str(back) == str(error) == "It failed. Try again."
        assert (back.message, back.hint, back.facts) == ("It failed.", "Try again.", FACTS)
        assert {name: getattr(back, name) for name in FACTS} == FACTS
        assert (back.transient, back.at_fault) == (error.transient, error.at_fault)


@pytest.mark.parametrize("cls", CLASSES)
def test_each_says_who_failed_and_whether_to_try_again(cls: type[e.DicomGetError]) -> None:
    error = cls("It failed.")
    assert error.at_fault in ("input", "us", "peer", "source", "destination")
    assert isinstance(error.transient, bool)
    assert str(error) == "It failed."


def test_input_is_never_worth_another_try() -> None:
    for cls in CLASSES:
        if cls.at_fault == "input":
            assert cls("x").transient is False


@pytest.mark.parametrize(("result", "transient"), [(1, False), (2, True), (None, False)])
def test_a_rejection_says_itself_whether_it_will_pass(result: int | None, transient: bool) -> None:
    assert e.AssociationRejected("x", result=result, source=1, reason=1).transient is transient


@pytest.mark.parametrize(
    ("status", "transient"), [(0xA700, True), (0xA702, True), (0xA900, False), (0xC000, False), (0x0122, False)]
)
def test_only_lack_of_resources_passes(status: int, transient: bool) -> None:
    assert e.OperationFailed("x", status=status).transient is transient


def test_an_error_can_be_caught_by_its_common_names() -> None:
    with pytest.raises(ValueError, match="x"):
        raise e.InvalidOption("x")
    for cls in (e.ConnectFailed, e.GetNotOffered, e.ListTooLong):
        assert issubclass(cls, e.PeerError)


@given(st.one_of(st.text(max_size=200), st.binary(max_size=50)), st.integers(1, 80))
def test_text_of_a_peer(value: object, limit: int) -> None:
    text = e.peer_text(value, limit)
    assert len(text) <= limit
    assert text.isprintable()
    assert text.rstrip("…").isascii()


def test_text_of_a_peer_cannot_make_a_line_of_its_own() -> None:
    assert e.peer_text("a\r\nERROR \x1b[31mb\u2028c") == "a\\r\\nERROR \\x1b[31mb\\u2028c"
