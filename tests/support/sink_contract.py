"""What every destination must do, whatever lies behind it: one suite, and a harness for each kind.

A test module makes a fixture ``harness`` and derives a class from :class:`SinkContract`.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from airflow_dicom_get.config.options import WritingOptions
from airflow_dicom_get.errors import SinkError
from airflow_dicom_get.records import Instance, Stored
from airflow_dicom_get.sinks.base import Confirmation, Sink, Taken
from airflow_dicom_get.testing.encoding import identifier
from airflow_dicom_get.testing.sample_data import make_uid

EXPLICIT_LE = "1.2.840.10008.1.2.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
STUDY, SERIES = make_uid("contract"), make_uid("contract.1")
LARGE = (20 << 20) + 12345
FRAGMENT = 130_000


def written(**options: Any) -> WritingOptions:
    """Options of a sink that writes files or objects."""
    return WritingOptions.check({"addr": "CALLED@source:104", "calling_ae_title": "CALLING", **options})


class Harness:
    """What the suite needs of a kind of destination; what one cannot have skips the tests that need it."""

    bound: int = 64 << 20
    """Bytes that may be taken and not yet confirmed, less one instance for each writer."""
    keeps_what_was_confirmed = True
    """Whether a crash right after a confirmation leaves the instance held."""
    holds_a_uid_twice = True
    """Whether one SOP Instance UID in two series is two instances here."""
    tells_runs_apart = True
    """Whether two runs at the same time that bring different data sets under one UID are told apart."""

    def sink(self, **options: Any) -> Sink:
        """The sink of a new run."""
        raise NotImplementedError

    def crash(self, sink: Any) -> None:
        """The process of a sink dies: nothing more is done by it."""
        raise NotImplementedError

    def dataset(self, instance: Instance) -> bytes | None:
        """The data set that the destination holds under the instance's final name."""
        raise NotImplementedError

    def leftovers(self) -> list[str]:
        """What lies around that is neither an instance, a ledger nor a manifest."""
        raise NotImplementedError

    def tamper(self, instance: Instance, content: bytes) -> None:
        """Another program replaces the object by this content."""
        pytest.skip("nobody else writes there")

    def content(self, instance: Instance) -> bytes:
        """The object as it lies."""
        pytest.skip("nobody can read it there")

    def break_ledger(self, study: str, line: bytes) -> None:
        """A ledger of another run holds this line."""
        raise NotImplementedError

    def stalled(self) -> contextlib.AbstractContextManager[None]:
        """The destination takes what it is given, and confirms nothing."""
        pytest.skip("it confirms when it takes")

    def failures(self) -> Sequence[tuple[str, contextlib.AbstractContextManager[Any]]]:
        """Steps that can fail, each with what makes it fail."""
        return ()


def new(number: int, *, study: str = STUDY, series: str = SERIES) -> Instance:
    instance = Instance(study, series, make_uid(f"{series}.{number}"), CT)
    instance.syntax = EXPLICIT_LE
    return instance


def dataset_of(instance: Instance, size: int = 3000, variant: int = 0) -> bytes:
    """A data set in explicit little endian with that many bytes of pixels."""
    head = identifier(
        {
            0x00080016: CT,
            0x00080018: instance.sop,
            0x00080060: "CT",
            0x0020000D: instance.study,
            0x0020000E: instance.series,
        },
        implicit_vr=False,
    )
    size += size & 1
    seed = hashlib.sha256(f"{instance.sop} {variant}".encode()).digest()
    pixels = (seed * (size // len(seed) + 1))[:size]
    return head + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, size) + pixels


def send(sink: Sink, instance: Instance, data: bytes) -> Taken:
    """Write a data set in fragments, as it would come, and take it."""
    writer = sink.begin(instance)
    if isinstance(writer, Taken):
        return writer
    buffer = bytearray(FRAGMENT)
    for start in range(0, len(data), FRAGMENT):
        piece = data[start : start + FRAGMENT]
        buffer[: len(piece)] = piece
        writer.write(memoryview(buffer)[: len(piece)])
        buffer[:] = bytes(FRAGMENT)  # the view is void afterwards
    return writer.take()


def put(sink: Sink, number: int, *, size: int = 3000, variant: int = 0) -> tuple[Instance, Taken]:
    instance = new(number)
    return instance, send(sink, instance, dataset_of(instance, size, variant))


def kept(confirmations: Sequence[Confirmation]) -> list[str]:
    return [c.instance.sop for c in confirmations if c.error is None]


def outcome(sink: Sink, instance: Instance, data: bytes) -> str:
    """``kept``, or the reason why not, whether the sink tells at once or later."""
    taken = send(sink, instance, data)
    if taken.reason is not None:
        return taken.reason
    (confirmation,) = (c for c in sink.confirmations(wait=True) if c.instance is instance)
    return "kept" if confirmation.error is None else confirmation.reason


def told(sink: Sink, instance: Instance, data: bytes) -> tuple[str, str | None]:
    """As :func:`outcome`, with the remark."""
    taken = send(sink, instance, data)
    if taken.reason is not None:
        return taken.reason, taken.remark
    (confirmation,) = (c for c in sink.confirmations(wait=True) if c.instance is instance)
    return ("kept" if confirmation.error is None else confirmation.reason), taken.remark or confirmation.remark


class SinkContract:
    @pytest.mark.parametrize("size", [0, 2, 100_000, LARGE])
    def test_what_was_taken_is_held_as_it_was_sent(self, harness: Harness, size: int) -> None:
        sink = harness.sink()
        instance, taken = put(sink, 1, size=size)
        assert taken.status == 0, taken
        assert taken.reason is None
        (confirmation,) = sink.confirmations(wait=True)
        assert (confirmation.instance, confirmation.error, confirmation.remark) == (instance, None, None)
        assert sink.confirmations(wait=True) == []
        data = dataset_of(instance, size)
        assert harness.dataset(instance) == data
        assert instance.dataset_bytes == len(data)
        sink.close()
        assert harness.leftovers() == []
        again = harness.sink()
        held = again.inventory(STUDY)[instance.key]
        again.close()
        assert (held.series, held.sop, held.sop_class, held.syntax) == (SERIES, instance.sop, CT, EXPLICIT_LE)
        assert (held.sha256, held.bytes) == (instance.sha256, instance.bytes)
        assert held.uri == instance.uri
        assert held.dataset_offset == instance.dataset_offset

    def test_the_digest_is_of_the_object(self, harness: Harness) -> None:
        sink = harness.sink()
        instance, _ = put(sink, 1, size=500_000)
        sink.confirmations(wait=True)
        sink.close()
        content = harness.content(instance)
        assert instance.sha256 == hashlib.sha256(content).digest()
        assert instance.bytes == len(content)
        assert content[instance.dataset_offset :] == dataset_of(instance, 500_000)

    @pytest.mark.parametrize("size", [3000, LARGE])
    def test_an_interrupted_writer_leaves_nothing(self, harness: Harness, size: int) -> None:
        sink = harness.sink()
        instance = new(1)
        writer = sink.begin(instance)
        assert not isinstance(writer, Taken)
        data = dataset_of(instance, size)
        for start in range(0, len(data) - 1000, FRAGMENT):
            writer.write(memoryview(data)[start : start + FRAGMENT])
        assert harness.dataset(instance) is None
        writer.abort()
        assert sink.confirmations(wait=True) == []
        assert harness.dataset(instance) is None
        assert put(sink, 1, size=size)[1].status == 0
        assert kept(sink.confirmations(wait=True)) == [instance.sop]
        sink.close()
        assert harness.leftovers() == []
        assert harness.dataset(instance) == data

    def test_nothing_is_held_before(self, harness: Harness) -> None:
        sink = harness.sink(read_only=True)
        assert sink.inventory(STUDY) == {}
        sink.close()
        assert harness.leftovers() == []

    @pytest.mark.parametrize("size", [3000, LARGE])
    def test_the_same_data_set_twice(self, harness: Harness, size: int) -> None:
        sink = harness.sink()
        first, one = put(sink, 1, size=size)
        second, two = put(sink, 1, size=size)
        assert one.reason is None
        assert two.reason is None
        confirmations = sink.confirmations(wait=True)
        assert kept(confirmations) == [first.sop] * 2
        assert {id(c.instance) for c in confirmations} == {id(first), id(second)}
        sink.close()
        later = harness.sink()
        assert outcome(later, new(1), dataset_of(first, size)) == "kept"
        later.close()
        assert harness.dataset(first) == dataset_of(first, size)
        assert harness.leftovers() == []

    @pytest.mark.parametrize("size", [3000, LARGE])
    def test_the_first_of_two_data_sets_stays(self, harness: Harness, size: int) -> None:
        sink = harness.sink()
        first, _ = put(sink, 1, size=size)
        assert outcome(sink, new(1), dataset_of(first, size, variant=1)) == "different_content"
        sink.confirmations(wait=True)
        sink.close()
        later = harness.sink()
        later.inventory(STUDY)
        assert outcome(later, new(1), dataset_of(first, size, variant=2)) == "different_content"
        later.close()
        assert harness.dataset(first) == dataset_of(first, size)
        assert harness.leftovers() == []
        last = harness.sink()
        assert last.inventory(STUDY)[first.key].sha256 == first.sha256
        last.close()

    def test_a_crash_in_the_middle_of_an_instance(self, harness: Harness) -> None:
        dead = harness.sink()
        whole, _ = put(dead, 1)
        dead.confirmations(wait=True)
        half = new(2)
        data = dataset_of(half, LARGE)
        writer = dead.begin(half)
        assert not isinstance(writer, Taken)
        writer.write(memoryview(data)[: 10 << 20])
        harness.crash(dead)
        sink = harness.sink()
        held = sink.inventory(STUDY)
        assert half.key not in held
        assert (whole.key in held) or not harness.keeps_what_was_confirmed
        assert harness.dataset(half) is None
        for instance, size in ((whole, 3000), (half, LARGE)):
            assert outcome(sink, new(1 if instance is whole else 2), dataset_of(instance, size)) == "kept"
        sink.close()
        last = harness.sink()
        assert last.inventory(STUDY).keys() == {whole.key, half.key}
        last.close()
        assert harness.dataset(half) == data

    def test_a_crash_before_the_confirmation(self, harness: Harness) -> None:
        dead = harness.sink()
        taken = [put(dead, number)[0] for number in range(20)]
        harness.crash(dead)
        sink = harness.sink()
        for key, held in sink.inventory(STUDY).items():
            (instance,) = (x for x in taken if x.key == key)
            assert held.sha256 == instance.sha256
        for number, instance in enumerate(taken):
            assert outcome(sink, new(number), dataset_of(instance)) == "kept"
        sink.close()
        last = harness.sink()
        assert last.inventory(STUDY).keys() == {x.key for x in taken}
        last.close()

    def test_what_another_program_replaced_is_not_held(self, harness: Harness) -> None:
        sink = harness.sink()
        instances = [put(sink, number)[0] for number in range(3)]
        sink.confirmations(wait=True)
        sink.close()
        content = harness.content(instances[0])
        harness.tamper(instances[0], content[:-2])
        harness.tamper(instances[1], content[:-2] + b"xx")
        again = harness.sink(verify_held="digest")
        assert again.inventory(STUDY).keys() == {instances[2].key}
        assert outcome(again, new(0), dataset_of(instances[0])) == "kept"  # what is torn is fetched again
        assert outcome(again, new(1), dataset_of(instances[1])) == "different_content"  # what is whole stays
        again.close()
        assert harness.content(instances[1]) == content[:-2] + b"xx"
        last = harness.sink(verify_held="digest", on_conflict="replace")
        assert last.inventory(STUDY).keys() == {instances[0].key, instances[2].key}
        assert [told(last, new(1), dataset_of(instances[1], variant=v)) for v in (0, 1)] == [
            ("kept", "replaced"),
            ("different_content", None),  # what this run has put there is not replaced by it
        ]
        last.close()
        assert [harness.dataset(x) for x in instances] == [dataset_of(x) for x in instances]
        after = harness.sink(verify_held="digest")
        assert len(after.inventory(STUDY)) == 3
        after.close()

    def test_one_uid_in_two_series(self, harness: Harness) -> None:
        sink = harness.sink()
        one = new(1)
        other = Instance(STUDY, f"{SERIES}.2", one.sop, CT)
        other.syntax = one.syntax
        assert outcome(sink, one, dataset_of(one)) == "kept"
        second = outcome(sink, other, dataset_of(other))
        sink.close()
        again = harness.sink()
        held = set(again.inventory(STUDY))
        again.close()
        assert (second, held) == (
            ("kept", {one.key, other.key}) if harness.holds_a_uid_twice else ("different_content", {one.key})
        )

    def test_an_object_without_record_is_not_held_unless_adopted(self, harness: Harness) -> None:
        sink = harness.sink()
        instance, other = (put(sink, number)[0] for number in (1, 2))
        sink.confirmations(wait=True)
        sink.close()
        content = harness.content(instance)
        stranger = new(3)
        data = dataset_of(stranger)
        head = content[: instance.dataset_offset].replace(instance.sop.encode(), stranger.sop.encode())
        assert len(stranger.sop) == len(instance.sop)
        harness.tamper(stranger, head + data)
        again = harness.sink()
        assert again.inventory(STUDY).keys() == {instance.key, other.key}
        again.close()
        adopting = harness.sink(adopt=True)
        held: Stored = adopting.inventory(STUDY)[stranger.key]
        assert (held.sop_class, held.bytes, held.sha256) == (CT, len(head + data), hashlib.sha256(head + data).digest())
        adopting.close()
        last = harness.sink()
        assert stranger.key in last.inventory(STUDY)
        last.close()

    @pytest.mark.parametrize("line", [b'{"ledger": 99}\n', b"{broken\n{}\n"])
    def test_a_ledger_that_cannot_be_read_is_an_error(self, harness: Harness, line: bytes) -> None:
        from airflow_dicom_get.errors import LedgerError

        harness.break_ledger(STUDY, line)
        sink = harness.sink()
        with pytest.raises(LedgerError):
            sink.inventory(STUDY)
        sink.close()

    def test_confirmations_come_once_each_in_any_order(self, harness: Harness) -> None:
        sink = harness.sink()
        came: list[Confirmation] = []
        sizes = [3000, 200_000, 9 << 20, 0, 1_000_000]

        def bring(numbers: range) -> list[Instance]:
            found = []
            for number in numbers:
                instance, taken = put(sink, number, size=sizes[number % len(sizes)])
                assert taken.reason is None
                found.append(instance)
                came.extend(sink.confirmations())
            return found

        with ThreadPoolExecutor(3) as pool:
            groups = list(pool.map(bring, [range(10), range(10, 20), range(20, 30)]))
        came += sink.confirmations(wait=True)
        assert Counter(id(c.instance) for c in came) == Counter(id(x) for group in groups for x in group)
        assert [c.error for c in came] == [None] * 30
        sink.close()
        last = harness.sink()
        assert len(last.inventory(STUDY)) == 30
        last.close()

    def test_two_runs_bring_the_same_at_once(self, harness: Harness) -> None:
        def bring(run: int) -> list[str]:
            sink = harness.sink()
            numbers = list(range(25))[:: 1 if run else -1]
            results = [put(sink, number)[1] for number in numbers]
            assert {taken.reason for taken in results} == {None}
            confirmations = sink.confirmations(wait=True)
            sink.close()
            return kept(confirmations)

        with ThreadPoolExecutor(2) as pool:
            one, other = pool.map(bring, range(2))
        assert sorted(one) == sorted(other) == sorted(new(number).sop for number in range(25))
        last = harness.sink(verify_held="digest")
        assert len(last.inventory(STUDY)) == 25
        last.close()
        assert harness.leftovers() == []

    def test_two_runs_bring_different_data_sets_at_once(self, harness: Harness) -> None:
        if not harness.tells_runs_apart:
            pytest.skip("this service takes no conditional writes: the later one stays, as documented")
        start = threading.Barrier(2)

        def bring(run: int) -> dict[int, str]:
            sink = harness.sink()
            start.wait()
            found = {}
            for number in range(10):
                instance = new(number)
                found[number] = outcome(sink, instance, dataset_of(instance, variant=run))
            sink.close()
            return found

        with ThreadPoolExecutor(2) as pool:
            one, other = pool.map(bring, range(2))
        for number in range(10):
            assert {one[number], other[number]} == {"kept", "different_content"}, number
            winner = 0 if one[number] == "kept" else 1
            assert harness.dataset(new(number)) == dataset_of(new(number), variant=winner)

    def test_what_waits_for_confirmation_is_bounded(self, harness: Harness) -> None:
        size = 2 << 20
        most = harness.bound // size + 4
        with harness.stalled():
            sink = harness.sink()
            counter = Counter[str]()

            def bring() -> None:
                with contextlib.suppress(SinkError):
                    for number in range(3 * most):
                        put(sink, number, size=size)
                        counter["taken"] += 1

            thread = threading.Thread(target=bring, daemon=True)
            thread.start()
            before = -1
            while counter["taken"] != before:
                before = counter["taken"]
                time.sleep(1.0)
            assert counter["taken"] <= most
            assert sink.confirmations() == []
        thread.join(60)
        assert not thread.is_alive()
        assert len(kept(sink.confirmations(wait=True))) == counter["taken"]
        sink.close()

    def test_a_failure_at_any_step_is_told_and_got_over(self, harness: Harness) -> None:
        steps = harness.failures()
        if not steps:
            pytest.skip("no step can be made to fail here")
        for number, (name, failing) in enumerate(steps):
            instance = new(number)
            data = dataset_of(instance)
            with failing:
                try:
                    sink = harness.sink()
                    told = outcome(sink, instance, data)
                except SinkError as error:
                    told = "destination_full" if "space" in str(error) else "destination_error"
                finally:
                    sink.close()
            assert told in ("destination_error", "destination_full"), name
            last = harness.sink()
            held = last.inventory(STUDY)
            assert instance.key not in held or harness.dataset(instance) == data, name
            assert outcome(last, new(number), data) == "kept", name
            last.close()
            assert harness.leftovers() == [], name
