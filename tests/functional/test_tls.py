"""TLS (PS3.15 B.12) and user identity (PS3.7 D.3.3.7), against DCMTK, Orthanc and the embedded PACS."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import ssl
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from airflow_dicom_get import GetScu
from airflow_dicom_get.cli.main import main
from airflow_dicom_get.config.groups import Tls
from airflow_dicom_get.errors import ConnectFailed, DeadlineExceeded, InvalidOption, TlsFailed
from airflow_dicom_get.net.tls import tls_context
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.servers import HOST, Dcmqrscp, Orthanc, Server
from airflow_dicom_get.verify import verify
from tests.support.certificates import Authority, Pair
from tests.support.holdings import Holding

Embedded = Callable[..., EmbeddedPacs]


@dataclass
class Files:
    """What both sides need."""

    ours: Authority
    other: Authority
    server: Pair
    misnamed: Pair
    expired: Pair
    early: Pair
    client: Pair
    strange_client: Pair
    locked_key: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("certificates")
    ours, other = Authority(folder, "ours"), Authority(folder, "other")
    client = ours.issue("client", host="")
    locked = folder / "locked.key"
    secret = serialization.BestAvailableEncryption(b"sesame")
    locked.write_bytes(
        client.private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    )
    return Files(
        ours=ours,
        other=other,
        server=ours.issue("server"),
        misnamed=ours.issue("misnamed", host="pacs.example"),
        expired=ours.issue("expired", days=(-30, -1)),
        early=ours.issue("early", days=(2, 30)),
        client=client,
        strange_client=other.issue("strange", host=""),
        locked_key=locked,
    )


def trusting(made: Files, **more: Any) -> dict[str, Any]:
    return {"ca": made.ours.ca, "cert": str(made.client.cert), "key": str(made.client.key), **more}


class _Ready(Server):
    """Ready when it takes connections: the C-ECHO of the others speaks no TLS."""

    def _wait_until_ready(self) -> bool:
        assert self.process is not None
        deadline = time.monotonic() + 30
        ports = [self.port, getattr(self, "http_port", self.port)]
        while ports and time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError):
                socket.create_connection((HOST, ports[-1]), timeout=1).close()
                ports.pop()
                continue
            time.sleep(0.02)
        return not ports


class TlsDcmqrscp(_Ready, Dcmqrscp):
    pass


class TlsOrthanc(_Ready, Orthanc):
    pass


def _dcmqrscp(folder: Path, ct: Holding, made: Files, pair: Pair, *, ask: bool) -> Dcmqrscp:
    options = ["+tls", str(pair.key), str(pair.cert), "+cf", made.ours.ca, "-rc" if ask else "-ic"]
    server = TlsDcmqrscp(folder, sop_classes={e.sop_class for e in ct.entries.values()}, options=options)
    server.register(ct.files)
    return server


def _orthanc(folder: Path, made: Files, pair: Pair, *, ask: bool) -> Orthanc:
    return TlsOrthanc(
        folder,
        DicomTlsEnabled=True,
        DicomTlsCertificate=str(pair.cert),
        DicomTlsPrivateKey=str(pair.key),
        DicomTlsTrustedCertificates=made.ours.ca,
        DicomTlsRemoteCertificateRequired=ask,
    )


def _context(made: Files, pair: Pair, *, ask: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    if ask:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(made.ours.ca)
    return context


KINDS = [
    "embedded",
    pytest.param("dcmqrscp", marks=pytest.mark.dcmtk),
    pytest.param("orthanc", marks=pytest.mark.orthanc),
]


@pytest.fixture(scope="module")
def nodes(
    tmp_path_factory: pytest.TempPathFactory, ct: Holding, made: Files
) -> Iterator[Callable[[str, str, bool], str]]:
    """The address of a server of a kind, with a certificate of this name, that asks for ours or not."""
    running: dict[tuple[str, str, bool], Any] = {}

    def start(kind: str, pair: str, ask: bool) -> str:
        server = running.get((kind, pair, ask))
        if server is None:
            folder = tmp_path_factory.mktemp(kind)
            own: Pair = getattr(made, pair)
            if kind == "embedded":
                server = EmbeddedPacs(ct.folder, ssl_context=_context(made, own, ask=ask))
            elif kind == "dcmqrscp":
                server = _dcmqrscp(folder, ct, made, own, ask=ask)
            else:
                server = _orthanc(folder, made, own, ask=ask)
            server.start()
            if isinstance(server, Orthanc):
                server.load(ct.files)
            running[kind, pair, ask] = server
        return f"{server.ae_title}@127.0.0.1:{server.port}"

    yield start
    for server in running.values():
        server.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_every_verb(nodes: Any, made: Files, ct: Holding, tmp_path: Path, kind: str) -> None:
    scu = GetScu(nodes(kind, "server", True), destination=tmp_path, tls=trusting(made), associations=2)
    assert scu.echo().accepted["C-ECHO"]
    assert [str(row.StudyInstanceUID) for row in scu.find({"StudyInstanceUID": ct.study})] == [ct.study]
    assert scu.plan({"StudyInstanceUID": ct.study}).missing == len(ct.files)
    result = scu.get_study({"StudyInstanceUID": ct.study})
    assert (result.verdict, result.completed) == ("complete", len(ct.files))
    if kind != "dcmqrscp":  # which converts between uncompressed syntaxes
        for path in tmp_path.rglob("*.dcm"):
            assert path.read_bytes().endswith(ct.dataset(path.stem))


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_versions(embedded: Embedded, made: Files, ct: Holding, version: str) -> None:
    context = _context(made, made.server, ask=True)
    context.minimum_version = context.maximum_version = (
        ssl.TLSVersion.TLSv1_2 if version == "1.2" else ssl.TLSVersion.TLSv1_3
    )
    pacs = embedded(ct.folder, ssl_context=context)
    assert GetScu(f"PACS@127.0.0.1:{pacs.port}", tls=trusting(made)).echo().accepted["C-ECHO"]
    newest = GetScu(f"PACS@127.0.0.1:{pacs.port}", tls=trusting(made, min_version="1.3"))
    if version == "1.3":
        assert newest.echo().accepted["C-ECHO"]
    else:
        with pytest.raises(TlsFailed, match=r"speaks no TLS version"):
            newest.echo()


# Kind of server; its certificate; whether it asks for ours; our options; what is said.
REFUSALS: list[tuple[str, str, bool, Callable[[Files], dict[str, Any]], str, str]] = [
    ("wrong CA", "server", False, lambda m: {"ca": m.other.ca}, r"signed by a CA that is not trusted", "tls.ca"),
    ("no CA", "server", False, lambda m: {}, r"signed by a CA that is not trusted", "tls.ca"),
    ("wrong address", "misnamed", False, lambda m: {"ca": m.ours.ca}, r"is for another IP address", "tls.server_name"),
    ("wrong name", "server", False, lambda m: {"ca": m.ours.ca, "server_name": "other.example"},
     r"is for another host name", "tls.server_name"),
    ("expired", "expired", False, lambda m: {"ca": m.ours.ca}, r"has expired", "new certificate"),
    ("not yet", "early", False, lambda m: {"ca": m.ours.ca}, r"is not valid yet", "clocks"),
    ("no client certificate", "server", True, lambda m: {"ca": m.ours.ca}, r"client certificate|hung up",
     "client certificate"),
    ("strange client certificate", "server", True,
     lambda m: {"ca": m.ours.ca, "cert": str(m.strange_client.cert), "key": str(m.strange_client.key)},
     r"client certificate|hung up", "client certificate"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", REFUSALS, ids=[case[0] for case in REFUSALS])
def test_refusals_have_their_own_sentence(nodes: Any, made: Files, tmp_path: Path, kind: str, case: Any) -> None:
    _, pair, ask, options, words, hint = case
    begun = time.monotonic()
    scu = GetScu(nodes(kind, pair, ask), destination=tmp_path, tls=options(made))
    with pytest.raises(ConnectFailed, match=words) as caught:
        scu.echo()
    assert str(caught.value).startswith("No TLS session with ")
    assert hint in caught.value.hint
    # Facts are attributes, which no class declares.
    assert caught.value.node == str(scu.options.addr)  # type: ignore[attr-defined]
    if isinstance(caught.value, TlsFailed):
        assert not caught.value.transient
        result = scu.get_study({"StudyInstanceUID": "1.2.3"})
        assert result.verdict == "failed"
        assert not result.transient
        assert result.errors[0]["error"] == caught.value.message
    assert time.monotonic() - begun < 40


def test_the_two_sides_of_a_missing_client_certificate_are_told_apart(nodes: Any, made: Files) -> None:
    node = nodes("embedded", "server", True)
    with pytest.raises(TlsFailed, match="asks for a client certificate, and none was given"):
        GetScu(node, tls={"ca": made.ours.ca}).echo()
    strange = {"cert": str(made.strange_client.cert), "key": str(made.strange_client.key)}
    with pytest.raises(TlsFailed, match="does not trust the CA of our client certificate"):
        GetScu(node, tls={"ca": made.ours.ca, **strange}).echo()


def test_a_name_may_be_given_or_not_looked_at(nodes: Any, made: Files) -> None:
    node = nodes("embedded", "misnamed", False)
    assert GetScu(node, tls={"ca": made.ours.ca, "server_name": "pacs.example"}).echo().accepted["C-ECHO"]
    assert GetScu(node, tls={"ca": made.ours.ca, "check_hostname": False}).echo().accepted["C-ECHO"]


CBC = "ECDHE-RSA-AES128-SHA256:AES256-SHA:@SECLEVEL=0"


def test_the_ciphers_are_those_of_bcp_195(made: Files) -> None:
    context = tls_context(Tls())
    offered = {one["name"] for one in context.get_ciphers()}
    assert {name for name in offered if not name.startswith("TLS_")} == {
        f"ECDHE-{key}-{cipher}"
        for key in ("RSA", "ECDSA")
        for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    }


@pytest.mark.parametrize("ask", [False, True])
def test_only_old_ciphers(made: Files, ask: bool) -> None:
    context = _context(made, made.server, ask=ask)
    context.set_ciphers(CBC)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        _listening(lambda sock: context.wrap_socket(sock, server_side=True)) as port,
        pytest.raises(TlsFailed, match=r"the peer offers no cipher suite that is allowed here") as caught,
    ):
        GetScu(f"PACS@127.0.0.1:{port}", tls={"ca": made.ours.ca}).echo()
    assert "ECDHE with AES-GCM" in caught.value.hint


@pytest.mark.parametrize("tls", ["with", "without"])
def test_a_missing_client_certificate_is_not_taken_for_a_missing_cipher(
    embedded: Embedded, made: Files, ct: Holding, tls: str
) -> None:
    context = _context(made, made.server, ask=True)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    pacs = embedded(ct.folder, ssl_context=context)
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", tls=trusting(made) if tls == "with" else {"ca": made.ours.ca})
    if tls == "with":
        assert scu.echo().accepted["C-ECHO"]
        return
    with pytest.raises(ConnectFailed, match=r"client certificate"):
        scu.echo()


@pytest.mark.dcmtk
def test_dcmqrscp_with_only_old_ciphers(made: Files, tmp_path: Path) -> None:
    """Its profile of old: RSA key exchange, AES and 3DES in CBC mode."""
    options = ["+tls", str(made.server.key), str(made.server.cert), "-ic", "+pa"]
    with TlsDcmqrscp(tmp_path, options=options) as server:
        old = ssl.create_default_context(cafile=made.ours.ca)
        old.set_ciphers("AES128-SHA")
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection((HOST, server.port), timeout=10) as sock,
            old.wrap_socket(sock, server_hostname=HOST) as session,
        ):
            assert session.cipher()[0] == "AES128-SHA"  # type: ignore[index]
        with pytest.raises(TlsFailed, match=r"the peer offers no cipher suite that is allowed here"):
            GetScu(server.node, tls={"ca": made.ours.ca}).echo()


def test_only_an_old_version(made: Files) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.server.cert, made.server.key)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        _listening(lambda sock: context.wrap_socket(sock, server_side=True)) as port,
        pytest.raises(TlsFailed, match=r"speaks no TLS version that is allowed here") as caught,
    ):
        GetScu(f"PACS@127.0.0.1:{port}", tls={"ca": made.ours.ca}).echo()
    assert "1.2 or 1.3" in caught.value.hint


OLD = """\
openssl_conf = defaults
[defaults]
ssl_conf = ssl
[ssl]
system_default = old
[old]
MinProtocol = TLSv1.1
MaxProtocol = TLSv1.1
CipherString = ALL:@SECLEVEL=0
"""
"""OpenSSL's configuration, for DCMTK has no option to speak TLS 1.1 alone; its profile +px allows it."""


class OldDcmqrscp(TlsDcmqrscp):
    """dcmqrscp that speaks TLS 1.1 and nothing newer."""

    def environment(self) -> dict[str, str]:
        config = self.folder / "openssl.cnf"
        config.write_text(OLD)
        return {**super().environment(), "OPENSSL_CONF": str(config)}


@pytest.mark.dcmtk
def test_dcmqrscp_with_only_an_old_version(made: Files, tmp_path: Path) -> None:
    options = ["+tls", str(made.server.key), str(made.server.cert), "-ic", "+px"]
    with OldDcmqrscp(tmp_path, options=options) as server:
        old = ssl.create_default_context(cafile=made.ours.ca)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with (
            socket.create_connection((HOST, server.port), timeout=10) as sock,
            old.wrap_socket(sock, server_hostname=HOST) as session,
        ):
            assert session.version() == "TLSv1.1"
        with pytest.raises(TlsFailed, match=r"speaks no TLS version that is allowed here") as caught:
            GetScu(server.node, tls={"ca": made.ours.ca}).echo()
    assert "1.2 or 1.3" in caught.value.hint


class _Listening:
    """A listener that treats its first connection as told."""

    def __init__(self, treat: Callable[[socket.socket], Any]) -> None:
        self.treat = treat
        self.listener = socket.create_server((HOST, 0))

    def __enter__(self) -> int:
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        port: int = self.listener.getsockname()[1]
        return port

    def _serve(self) -> None:
        with suppress(OSError):
            client, _ = self.listener.accept()
            with client, suppress(OSError):
                self.treat(client)

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)


_listening = _Listening


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes.fromhex("07000000000400000200")])
def test_a_port_without_tls(made: Files, answer: bytes) -> None:
    def reply(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(answer)

    with (
        _listening(reply) as port,
        pytest.raises(TlsFailed, match=r"does not speak TLS on this port") as caught,
    ):
        GetScu(f"PACS@127.0.0.1:{port}", tls={"ca": made.ours.ca}).echo()
    assert "TLS port" in caught.value.hint


def test_a_port_that_says_nothing(made: Files) -> None:
    def say_nothing(sock: socket.socket) -> None:
        if sock.recv(1 << 20):
            time.sleep(2)

    with _listening(say_nothing) as port:
        scu = GetScu(f"PACS@127.0.0.1:{port}", tls={"ca": made.ours.ca}, deadlines={"connect": 0.5})
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"did not finish the TLS handshake within 0.5 s"):
            scu.echo()
        assert time.monotonic() - begun < 1.5


def test_tls_where_the_client_speaks_none(nodes: Any) -> None:
    with pytest.raises(Exception, match=r"closed the connection|aborted|lost the connection|did not keep"):
        GetScu(nodes("embedded", "server", False), deadlines={"acse": 2}).echo()


def test_our_files_are_checked_before_any_traffic(made: Files, tmp_path: Path) -> None:
    node = "PACS@127.0.0.1:9"
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    for tls in (
        {"ca": str(tmp_path / "missing.pem")},
        {"ca": str(broken)},
        {"cert": str(made.client.cert), "key": str(made.server.key)},
        {"cert": str(made.client.cert), "key": str(made.locked_key), "key_password": "wrong"},
    ):
        with pytest.raises(
            InvalidOption, match=r"tls: the files of ca, cert or key cannot be used|tls.ca: .* is not a readable file"
        ) as caught:
            GetScu(node, tls=tls)
        assert "sesame" not in str(caught.value)


def test_a_key_with_a_passphrase(nodes: Any, made: Files) -> None:
    tls = trusting(made, key=str(made.locked_key), key_password="sesame")
    assert GetScu(nodes("embedded", "server", True), tls=tls).echo().accepted["C-ECHO"]


def test_an_encrypted_key_without_its_passphrase_is_an_error_and_no_question(made: Files, tmp_path: Path) -> None:
    tls = trusting(made, key=str(made.locked_key))
    with pytest.raises(InvalidOption, match=r"tls\.key is encrypted, and there is no passphrase") as caught:
        GetScu("PACS@127.0.0.1:9", tls=tls)
    assert "key_password" in caught.value.hint
    with pytest.raises(InvalidOption, match=r"forward_target\.tls\.key is encrypted, and there is no passphrase"):
        GetScu(
            "PACS@127.0.0.1:9", destination="dicom://B@127.0.0.1:8", forward_target={"tls": tls}, manifest_root=tmp_path
        ).plan({"StudyInstanceUID": "1.2.3"})


def test_nobody_is_asked_for_a_passphrase_at_a_terminal(made: Files) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "airflow_dicom_get.cli", "echo", "PACS@127.0.0.1:9", "--tls"]
    files = ["--tls-cert", str(made.client.cert), "--tls-key", str(made.locked_key)]
    with subprocess.Popen(
        [*command, *files], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:  # fmt: skip
        os.close(terminal)
        try:
            assert process.wait(30) == 2
            said = os.read(controller, 4096)
        finally:
            process.kill()
            os.close(controller)
    assert b"is encrypted, and there is no passphrase" in said
    assert b"Enter PEM pass phrase" not in said


# --- towards a node to forward to ----------------------------------------------------------------------


@pytest.fixture
def archive(embedded: Embedded, made: Files, tmp_path: Path) -> EmbeddedPacs:
    """An empty node that speaks TLS alone, and asks for our certificate."""
    (tmp_path / "archive").mkdir()
    return embedded(tmp_path / "archive", ae_title="ARCHIVE", ssl_context=_context(made, made.server, ask=True))


def shell_files(made: Files, flag: str) -> list[str]:
    pairs = {"ca": made.ours.ca, "cert": made.client.cert, "key": made.client.key}
    return [flag, *(word for part, path in pairs.items() for word in (f"{flag}-{part}", str(path)))]


def test_a_forward_and_its_verify_from_the_shell(
    nodes: Any, archive: EmbeddedPacs, made: Files, ct: Holding, tmp_path: Path, capsys: Any
) -> None:
    to = ["--to", f"dicom://ARCHIVE@127.0.0.1:{archive.port}", "--state", str(tmp_path / "state")]
    tls = shell_files(made, "--forward-tls")
    what = [nodes("embedded", "server", True), *shell_files(made, "--tls"), "--study", ct.study, *to]
    get, verify = ["get", *what], ["verify", *what]
    assert main([*get, *tls, "--forward-tls-server-name", "other.example"]) == 1
    said = capsys.readouterr().err
    assert "is for another host name" in said
    assert "Give the name in the certificate with --forward-tls-server-name" in said
    assert main([*get, *tls]) == 0
    assert "without TLS" not in capsys.readouterr().err
    assert len(list((tmp_path / "archive").rglob("*.dcm"))) == len(ct.files)
    assert main([*verify, *tls]) == 0
    assert main(verify) == 1, "it is called as it was for the forward"


@pytest.mark.dcmtk
@pytest.mark.orthanc
@pytest.mark.parametrize("kind", ["dcmqrscp", "orthanc"])
def test_a_forward_and_its_verify_to_real_servers(
    embedded: Embedded, made: Files, ct: Holding, tmp_path: Path, kind: str
) -> None:
    server: Server
    if kind == "dcmqrscp":
        options = ["+tls", str(made.server.key), str(made.server.cert), "+cf", made.ours.ca, "-rc"]
        classes = {e.sop_class for e in ct.entries.values()}
        server = TlsDcmqrscp(tmp_path / "qr", ae_title="DEST", sop_classes=classes, options=options)
    else:
        server = _orthanc(tmp_path / "orthanc", made, made.server, ask=True)
    with server:
        way: dict[str, Any] = {"destination": f"dicom://{server.node}", "forward_target": {"tls": trusting(made)}}
        source = f"PACS@127.0.0.1:{embedded(ct.folder).port}"
        result = GetScu(source, manifest_root=tmp_path / "m", **way).get_study({"StudyInstanceUID": ct.study})
        assert (result.verdict, result.completed) == ("complete", len(ct.files))
        found = verify(result.manifest_uri, addr=source, manifest_root=tmp_path / "v", **way)
        assert (found.same, found.counts) == (True, {"=": len(ct.files)})
        way = {"destination": way["destination"], "retries": 0, "deadlines": {"acse": 2}}
        plain = GetScu(source, manifest_root=tmp_path / "p", **way)
        assert plain.get_study({"StudyInstanceUID": ct.study}).completed == 0


def test_verify_calls_a_node_as_the_forward_did(embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    node = embedded(tmp_path / "archive", ae_title="ARCHIVE")
    called: list[tuple[str, str]] = []
    admit = node._supported

    def look(proposed: Any) -> Any:
        requests = [one.requestor.primitive for one in node._open]
        called.extend((one.calling_ae_title, one.called_ae_title) for one in requests if one is not None)
        return admit(proposed)

    node._supported = look  # type: ignore[method-assign]
    to = f"dicom://127.0.0.1:{node.port}"
    for target in (None, {"calling_ae_title": "RELAY", "called_ae_title": "ARCHIVE"}):
        called.clear()
        scu = GetScu(
            f"PACS@127.0.0.1:{embedded(ct.folder).port}", calling_ae_title="SOURCE-SCU", destination=to,
            forward_target=target, manifest_root=tmp_path / "m",
        )  # fmt: skip
        assert scu.get_study({"StudyInstanceUID": ct.study}).verdict == "complete"
        forwarded = set(called)
        called.clear()
        found = verify(
            study=ct.study, destination=to, forward_target=target, calling_ae_title="SOURCE-SCU",
            manifest_root=tmp_path / "v",
        )  # fmt: skip
        assert found.counts == {"-": len(ct.files)} or found.same
        assert set(called) == forwarded
        assert len(forwarded) == 1


def test_a_plain_forward_from_an_encrypted_source_is_said_once(
    nodes: Any, embedded: Embedded, made: Files, ct: Holding, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "archive").mkdir()
    archive = embedded(tmp_path / "archive", ae_title="ARCHIVE")
    to = f"dicom://ARCHIVE@127.0.0.1:{archive.port}"

    def forward(source: str, **options: Any) -> list[str]:
        caplog.clear()
        scu = GetScu(source, destination=to, manifest_root=tmp_path / "m", associations=2, **options)
        assert scu.get_study({"StudyInstanceUID": ct.study}).verdict == "complete"
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    (said,) = forward(nodes("embedded", "server", True), tls=trusting(made))
    assert said.startswith(f"{to} is called without TLS, though the source is called with it")
    assert forward(f"PACS@127.0.0.1:{embedded(ct.folder).port}") == []


def test_from_the_shell(nodes: Any, made: Files, ct: Holding, tmp_path: Path, capsys: Any) -> None:
    node = nodes("embedded", "server", True)
    files = ["--tls-ca", made.ours.ca, "--tls-cert", str(made.client.cert), "--tls-key", str(made.client.key)]
    assert main(["get", node, "--study", ct.study, "--to", str(tmp_path), "--tls", *files]) == 0
    assert main(["echo", node, "--tls", "--tls-ca", made.other.ca]) == 1
    assert "signed by a CA that is not trusted here" in capsys.readouterr().err


# --- user identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        ({"username": "anna"}, (1, b"anna", b"")),
        ({"username": "anna", "password": "geheim ü"}, (2, b"anna", "geheim ü".encode())),
        ({"token": "dG9rZW4", "token_type": "kerberos"}, (3, b"dG9rZW4", b"")),
        ({"token": "<saml/>", "token_type": "saml"}, (4, b"<saml/>", b"")),
        ({"token": "a.b.c", "token_type": "jwt"}, (5, b"a.b.c", b"")),
    ],
)
def test_the_user_is_named(
    embedded: Embedded, ct: Holding, tmp_path: Path, identity: dict[str, str], expected: tuple[int, bytes, bytes]
) -> None:
    pacs = embedded(ct.folder)
    seen: list[tuple[int | None, bytes | None, bytes]] = []
    admit = pacs._supported

    def look(proposed: Any) -> Any:
        for association in pacs._open:
            item = association.requestor.user_identity
            if item is not None:
                seen.append((item.user_identity_type, item.primary_field, item.secondary_field or b""))
        return admit(proposed)

    pacs._supported = look  # type: ignore[method-assign]
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, user_identity=identity)
    assert scu.get_study({"StudyInstanceUID": ct.study}).verdict == "complete"
    assert set(seen) == {expected}
    assert len(seen) >= 3  # on every association
    assert identity.get("password", "geheim") not in repr(scu.options)
