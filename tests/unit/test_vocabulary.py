"""The words of results and manifests: each once, each with all that is said of it."""

from __future__ import annotations

import inspect
from typing import get_args

from airflow_dicom_get import errors
from airflow_dicom_get import vocabulary as v


def test_every_verdict_has_a_meaning_a_rank_and_an_exit_status() -> None:
    words = set(get_args(v.Verdict))
    assert words == v.VERDICTS.keys() == set(v.WORST_FIRST) == v.EXIT_CODES.keys()
    assert len(set(v.EXIT_CODES.values())) == len(words)
    assert v.exit_code("cancelled", "SIGTERM") == 143
    assert v.exit_code("cancelled", "SIGINT") == 130


def test_every_state_is_held_or_not_or_outside_the_list() -> None:
    states = set(get_args(v.State))
    assert states == v.STATES.keys() == v.HELD | v.NOT_HELD | v.OUTSIDE_LIST
    assert not v.HELD & v.NOT_HELD
    assert not v.OUTSIDE_LIST & (v.HELD | v.NOT_HELD)
    assert states == v.DONE | v.TRIED_IN_VAIN


def test_evidence_and_exactness_have_their_texts() -> None:
    assert set(get_args(v.Evidence)) == v.EVIDENCE.keys()
    assert set(get_args(v.Exactness)) == v.EXACTNESS.keys()
    assert v.weakest(["list+counts", "list"]) == "list"
    assert v.weakest([]) == "none"


def test_every_reason_says_what_happened_and_those_of_rows_what_to_do() -> None:
    for word, reason in v.REASONS.items():
        assert reason.text.endswith("."), word
        assert reason.advice or reason.of != "row", word
        assert not reason.advice or reason.advice.endswith("."), word
    of_rows = {word for word, reason in v.REASONS.items() if reason.of == "row"}
    assert v.STRAYS.keys() <= of_rows
    assert of_rows >= v.STOPS


def test_every_error_has_a_word_of_the_vocabulary() -> None:
    for _, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, errors.DicomGetError):
            assert cls.word in v.REASONS, cls


def test_a_reason_that_is_not_ours_has_no_advice() -> None:
    assert v.advice("SIGTERM") == v.advice(None) == ""
    assert v.is_transient(None)
