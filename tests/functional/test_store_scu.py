"""C-STORE as SCU: framing, even fragments, the peer's maximum, responses and their deadline."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from airflow_dicom_get.config.groups import Deadlines
from airflow_dicom_get.config.node import Node
from airflow_dicom_get.dicom.status import store_outcome, store_status_for_source
from airflow_dicom_get.errors import AssociationAborted, DeadlineExceeded, PeerProtocolError
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.association import Association, CancelToken
from airflow_dicom_get.net.peer import Peer
from airflow_dicom_get.net.store import StoreChannel
from tests.support.odd_destination import DieError, OddDestination

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


@contextmanager
def channel(destination: OddDestination, **deadlines: Any) -> Iterator[tuple[Association, StoreChannel]]:
    peer = Peer(Node.parse(destination.node), "TEST", destination.ae_title, Deadlines(**deadlines))
    association = peer.open([Proposal(CT, EXPLICIT)], CancelToken())
    try:
        yield association, StoreChannel(association)
    finally:
        association.release()


def write_much(store: StoreChannel, seconds: float) -> None:
    for _ in range(100):
        store.write(memoryview(bytes(1 << 20)), soon(seconds))


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


@pytest.mark.parametrize("max_pdu", [0, 8, 128, 4096, 16384, 16385, 131072, 1 << 24])
@pytest.mark.parametrize("chunk", [1 << 20, 131066, 65536, 999, 7])
def test_bytes_arrive_as_they_are(max_pdu: int, chunk: int) -> None:
    if max_pdu < 4096 and chunk > 65536:
        pytest.skip("the same PDUs as with smaller chunks")
    size = 300_000 if max_pdu >= 4096 and chunk > 7 else 20_000
    data = os.urandom(size)
    with OddDestination(max_pdu=max_pdu) as destination:
        with channel(destination) as (_, store):
            for uid in ("1.2.3", "1.2.4"):
                store.begin(1, CT, uid)
                for pos in range(0, size, chunk):
                    store.write(memoryview(data)[pos : pos + chunk], soon())
                store.end()
                store.finish(soon())
                assert store.response(soon()).status == 0
        assert destination.held() == {"1.2.3": data, "1.2.4": data}
        assert [x.message_id for x in destination.stored] == [1, 2]
        assert destination.odd_fragments == 0
        assert destination.largest_pdu <= (max_pdu or 131072)
        assert destination.largest_pdu <= 131072


@pytest.mark.parametrize("max_pdu", [0, 4096, 16384, 50000, 65536, 131072])
@pytest.mark.parametrize("size", [0, 2, 100_000, 786_000, 786_432, 900_000, 5_000_000])
def test_the_digest_is_of_what_was_sent(max_pdu: int, size: int) -> None:
    data = os.urandom(size)
    with OddDestination(max_pdu=max_pdu) as destination, channel(destination) as (_, store):
        for uid in ("1.2.3", "1.2.4"):
            digest = hashlib.sha256()
            store.begin(1, CT, uid, digest)
            for pos in range(0, size, 99_999):
                store.write(memoryview(data)[pos : pos + 99_999], soon())
            store.end()
            store.finish(soon())
            store.digest_sent()
            assert store.response(soon()).status == 0
            assert digest.digest() == hashlib.sha256(data).digest()
        assert destination.held() == {"1.2.3": data, "1.2.4": data}


@pytest.mark.parametrize("size", [0, 1, 2, 131066, 131067, 262132, 262133])
def test_sizes_at_the_borders_of_pdus(size: int) -> None:
    data = os.urandom(size)
    with OddDestination(max_pdu=131072) as destination, channel(destination) as (_, store):
        store.begin(1, CT, "1.2.3")
        store.write(memoryview(data), soon())
        store.end()
        store.finish(soon())
        assert store.response(soon()).status == 0
        assert destination.held() == {"1.2.3": data}


@pytest.mark.parametrize("status", [0xA700, 0xB000, 0xC001, 0x0111, 0x0122])
def test_status_is_given_back(status: int) -> None:
    with OddDestination(status=lambda number: status) as destination, channel(destination) as (_, store):
        store.begin(1, CT, "1.2.3")
        store.write(memoryview(b"ab"), soon())
        store.end()
        store.finish(soon())
        assert store.response(soon()).status == status


def assert_over(association: Association) -> None:
    with pytest.raises(AssociationAborted):
        association.send_message(1, b"ab")


def test_response_that_does_not_come() -> None:
    with OddDestination(delay=lambda number: 1.0) as destination, channel(destination) as (association, store):
        store.begin(1, CT, "1.2.3")
        store.write(memoryview(b"ab"), soon())
        store.end()
        store.finish(soon())
        assert not store.wait_for_response(soon(0.1))
        assert association._open, "waiting alone ends nothing"
        with pytest.raises(DeadlineExceeded) as caught:
            store.response(soon(0.1))
        assert caught.value.facts["phase"] == "sub_operation"
        assert not association._open


def test_peer_that_reads_nothing() -> None:
    with (
        OddDestination(on_data=lambda number, size: time.sleep(1.5)) as destination,
        channel(destination, stall=0.3) as (_, store),
    ):
        store.begin(1, CT, "1.2.3")
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            write_much(store, 0.3)
        assert caught.value.facts["phase"] == "stall"
        assert time.monotonic() - began < 2


def test_peer_that_dies() -> None:
    def die(number: int, size: int) -> None:
        raise DieError

    with OddDestination(on_data=die) as destination, channel(destination) as (_, store):
        store.begin(1, CT, "1.2.3")
        with pytest.raises(AssociationAborted):
            write_much(store, 5.0)


def test_response_without_status() -> None:
    with OddDestination(status=lambda number: 0) as destination, channel(destination) as (association, store):
        store.begin(1, CT, "1.2.3")
        store.write(memoryview(b"ab"), soon())
        store.end()
        store.finish(soon())
        store._message_id += 1
        with pytest.raises(PeerProtocolError, match="answered message 1 instead of 2"):
            store.response(soon())
        assert not association._open


@pytest.mark.parametrize(
    ("status", "outcome", "told"),
    [
        (0x0000, "ok", 0x0000),
        (0xB000, "warning", 0xB000),
        (0xB006, "warning", 0xB006),
        (0xB007, "warning", 0xB007),
        (0xB123, "warning", 0x0000),
        (0x0107, "warning", 0x0000),
        (0x0111, "duplicate", 0xC000),
        (0xA700, "busy", 0xA700),
        (0xA7FF, "busy", 0xA700),
        (0x0213, "busy", 0xA700),
        (0x0122, "refused", 0x0122),
        (0x0124, "refused", 0x0124),
        (0x0117, "refused", 0x0117),
        (0xA900, "refused", 0xA900),
        (0xC000, "refused", 0xC000),
        (0xCFFF, "refused", 0xCFFF),
        (0x0210, "refused", 0xC000),
        (0x0211, "refused", 0xC000),
        (0x0212, "refused", 0xC000),
        (0x0110, "refused", 0xC000),
        (0x1234, "refused", 0xC000),
        (0xFE00, "refused", 0xC000),
        (0xFF00, "refused", 0xC000),
    ],
)
def test_what_a_status_means(status: int, outcome: str, told: int) -> None:
    assert store_outcome(status) == outcome
    assert store_status_for_source(status) == told
    assert (told == 0 or told >> 12 == 0xB) == (outcome in ("ok", "warning"))
