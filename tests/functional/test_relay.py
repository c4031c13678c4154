"""The relay: what it records, and how it breaks a line."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest

from airflow_dicom_get.testing.pacs import EmbeddedPacs
from tests.support.holdings import Holding
from tests.support.reference_client import get
from tests.support.relay import Relay

Embedded = Callable[..., EmbeddedPacs]
Relays = Callable[..., Relay]


def pairs_of(holding: Holding) -> list[tuple[str, str]]:
    return sorted({(entry.sop_class, entry.syntax) for entry in holding.entries.values()})


def test_records_what_was_sent(embedded: Embedded, relay: Relays, mixed: Holding) -> None:
    through = relay(embedded(mixed.folder))
    result = get(through, "STUDY", {"StudyInstanceUID": mixed.study}, pairs_of(mixed))
    recorded = through.by_sop()
    assert recorded.keys() == mixed.entries.keys()
    for sop, (syntax, data) in result.datasets.items():
        sent = recorded[sop]
        assert (sent.syntax, sent.sop_class) == (syntax, mixed.entries[sop].sop_class)
        assert sent.data == data == mixed.dataset(sop)
        assert sent.length == len(data)
    kinds = [(direction, kind) for direction, kind, _ in through.commands]
    assert kinds[0] == ("up", 0x0010)
    assert kinds[-1] == ("down", 0x8010)
    assert kinds.count(("down", 0x0001)) == kinds.count(("up", 0x8001)) == len(mixed.entries)


def test_can_keep_digests_alone(embedded: Embedded, relay: Relays, private: Holding) -> None:
    through = relay(embedded(private.folder), keep_data=False)
    get(through, "STUDY", {"StudyInstanceUID": private.study}, pairs_of(private))
    assert len(through.sent) == 12
    assert all(sent.data is None and len(sent.sha256) == 64 for sent in through.sent)


def test_cuts_the_connections_it_is_told_to(embedded: Embedded, relay: Relays, ct: Holding) -> None:
    through = relay(embedded(ct.folder), cut_after=[1_000_000, 3_000_000])
    came = []
    for _ in range(3):
        before = len(through.sent)
        get(through, "STUDY", {"StudyInstanceUID": ct.study}, pairs_of(ct))
        came.append(len(through.sent) - before)
    assert came == [1, 5, 40]
    assert through.connections == 3


def test_a_cut_is_a_reset_after_all_that_was_passed_on(relay: Relays) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        class Target:
            host, port = listener.getsockname()

        through = relay(Target, cut_after=1000)
        with socket.create_connection(("127.0.0.1", through.port)) as client:
            client.settimeout(5)
            peer, _ = listener.accept()
            with peer:
                peer.sendall(bytes(5000))
                got = 0
                while got < 1000:
                    got += len(client.recv(4096))
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
    assert got == through.down == 1000


def test_stalls(relay: Relays) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        class Target:
            host, port = listener.getsockname()

        through = relay(Target, stall_after=1000)
        with socket.create_connection(("127.0.0.1", through.port)) as client:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(bytes(5000))
                client.settimeout(1)
                got = 0
                while got < 1000:
                    got += len(client.recv(4096))
                with pytest.raises(TimeoutError):
                    client.recv(1)
                # What the client sends still arrives.
                client.sendall(b"still here")
                peer.settimeout(5)
                assert peer.recv(100) == b"still here"
    assert got == 1000


def test_delays_each_way(relay: Relays) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        class Target:
            host, port = listener.getsockname()

        through = relay(Target, latency=0.1)
        with socket.create_connection(("127.0.0.1", through.port)) as client:
            client.settimeout(5)
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(5)
                started = time.monotonic()
                for _ in range(10):
                    client.sendall(b"x")
                    time.sleep(0.005)
                assert b"".join(peer.recv(1) for _ in range(10)) == b"x" * 10
                peer.sendall(b"y")
                assert client.recv(1) == b"y"
                # Delayed, not slowed down: ten pieces take little longer than one, not ten times as long.
                assert 0.2 <= time.monotonic() - started < 0.8


def test_a_missing_pacs_is_a_reset(relay: Relays) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:

        class Target:
            host, port = closed.getsockname()

    through = relay(Target)
    with socket.create_connection(("127.0.0.1", through.port)) as client:
        client.settimeout(5)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
