"""Real PACS for the tests: dcmqrscp, storescp and Orthanc, each a context manager on a free port.

Neither DCMTK nor Orthanc can be told which address to listen on; clients use 127.0.0.1. Every
server runs in a session of its own, so that stopping it also ends the children that it forked, and
nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import unittest
from collections.abc import Iterable, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Self

from pynetdicom import AE

HOST = "127.0.0.1"
_SBIN = ":/usr/sbin:/usr/local/sbin"
_PACKAGE = {"Orthanc": "orthanc"}

VERIFICATION = "1.2.840.10008.1.1"
TRANSFER_SYNTAXES = {
    "LittleEndianExplicit": "1.2.840.10008.1.2.1",
    "LittleEndianImplicit": "1.2.840.10008.1.2",
    "BigEndianExplicit": "1.2.840.10008.1.2.2",
    "DeflatedLittleEndianExplicit": "1.2.840.10008.1.2.1.99",
    "RLELossless": "1.2.840.10008.1.2.5",
    "JPEGBaseline": "1.2.840.10008.1.2.4.50",
    "JPEGExtended:Process2+4": "1.2.840.10008.1.2.4.51",
    "JPEGLossless:Non-hierarchical-1stOrderPrediction": "1.2.840.10008.1.2.4.70",
    "JPEGLSLossless": "1.2.840.10008.1.2.4.80",
    "JPEG2000LosslessOnly": "1.2.840.10008.1.2.4.90",
    "JPEG2000": "1.2.840.10008.1.2.4.91",
}
QUERY_CLASSES = tuple(f"1.2.840.10008.5.1.4.1.2.{model}.{service}" for model in (1, 2) for service in (1, 2, 3))


def find_binary(name: str) -> str | None:
    """The path of a program, also where the user's PATH leaves out sbin."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + _SBIN)


def require(name: str) -> str:
    """The path of a program.

    Raises
    ------
    unittest.SkipTest
        It is missing; a test is skipped by that.
    """
    path = find_binary(name)
    if path is None:
        raise unittest.SkipTest(f"{name} is missing: apt-get install {_PACKAGE.get(name, 'dcmtk')}")
    return path


def free_port() -> int:
    with socket.create_server((HOST, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def echo(port: int, called: str = "ANY-SCP") -> bool:
    """Whether a C-ECHO succeeds."""
    ae = AE("ECHO")
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 5
    ae.add_requested_context(VERIFICATION)
    association = ae.associate(HOST, port, ae_title=called)
    if not association.is_established:
        return False
    status = association.send_c_echo()
    association.release()
    return bool(status) and status.Status == 0


class Server:
    """A server process. Its output goes to ``folder/server.log``."""

    end = signal.SIGTERM

    def __init__(self, folder: Path, ae_title: str) -> None:
        self.folder, self.ae_title = folder, ae_title
        self.host, self.port = HOST, 0
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def node(self) -> str:
        return f"{self.ae_title}@{self.host}:{self.port}"

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    def start(self, port: int | None = None) -> Self:
        """Start, on a free port or the one that is given, and wait until a C-ECHO succeeds.

        A port that someone else was quicker to take costs another try.
        """
        for _ in range(3):
            self.port = port or free_port()
            command = self.command()
            with (self.folder / "server.log").open("ab") as log:
                self.process = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    cwd=self.folder,
                    env={**os.environ, **self.environment()},
                    start_new_session=True,
                )
            if self._wait_until_ready():
                return self
            self.stop()
        raise RuntimeError(f"{type(self).__name__} does not start: {self.log()[-2000:]}")

    def _wait_until_ready(self) -> bool:
        assert self.process is not None
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                socket.create_connection((HOST, self.port), timeout=1).close()
            except OSError:
                pass
            else:
                # On a port that it had before, the last child of its predecessor may still have taken the connection.
                if echo(self.port, self.ae_title):
                    return True
            time.sleep(0.02)
        return False

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        # The group is the server's own: it was started as the leader of a session.
        for number, patience in ((self.end, 5), (signal.SIGKILL, 5)):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                pass
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
            break
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class Dcmqrscp(Server):
    """DCMTK's image archive, with one storage area.

    Parameters
    ----------
    sop_classes : iterable of str, optional
        Accept these classes in every transfer syntax of `TRANSFER_SYNTAXES`, in both roles, by an
        association profile. Without: the compiled list of classes, uncompressed syntaxes.
    max_associations, max_pdu : int
        As in the configuration file.
    options : sequence of str
        Further command line options.
    tcp_nodelay : bool
        Start it with ``TCP_NODELAY=1``; as shipped, Nagle's algorithm is on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ae_title: str = "QRSCP",
        sop_classes: Iterable[str] = (),
        max_associations: int = 16,
        max_pdu: int = 131072,
        options: Sequence[str] = (),
        tcp_nodelay: bool = False,
    ) -> None:
        super().__init__(folder, ae_title)
        self.binary = require("dcmqrscp")
        self.sop_classes = sorted(sop_classes)
        self.max_associations, self.max_pdu = max_associations, max_pdu
        self.options, self.tcp_nodelay = list(options), tcp_nodelay
        self.storage = folder / "storage"
        self.storage.mkdir(exist_ok=True)

    def environment(self) -> dict[str, str]:
        return {"TCP_NODELAY": "1"} if self.tcp_nodelay else {}

    def command(self) -> list[str]:
        config = self.folder / "dcmqrscp.cfg"
        config.write_text(
            f"NetworkTCPPort = {self.port}\n"
            f"MaxPDUSize = {self.max_pdu}\n"
            f"MaxAssociations = {self.max_associations}\n"
            "HostTable BEGIN\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
            f"AETable BEGIN\n{self.ae_title} {self.storage} RW (500, 1024mb) ANY\nAETable END\n"
        )
        command = [self.binary, "-c", str(config), "--no-check-find", *self.options]
        if self.sop_classes:
            profile = self.folder / "profile.cfg"
            profile.write_text(self._profile())
            command += ["-xf", str(profile), "All", "All"]
        return command

    def _profile(self) -> str:
        # dcmqrscp knows no profile without a context for verification, and none that is longer than 128.
        uncompressed = list(TRANSFER_SYNTAXES.values())[:2]
        lines = ["[[TransferSyntaxes]]", "[Stored]"]
        lines += [f"TransferSyntax{n} = {uid}" for n, uid in enumerate(TRANSFER_SYNTAXES.values(), 1)]
        lines += ["[Query]", *(f"TransferSyntax{n} = {uid}" for n, uid in enumerate(uncompressed, 1))]
        lines += ["[[PresentationContexts]]", "[Classes]"]
        contexts = [(uid, "Query") for uid in (VERIFICATION, *QUERY_CLASSES)]
        contexts += [(uid, "Stored") for uid in self.sop_classes]
        lines += [f"PresentationContext{n} = {uid}\\{name}" for n, (uid, name) in enumerate(contexts, 1)]
        lines += ["[[SCPSCURoleSelection]]", "[Roles]"]
        lines += [f"Role{n} = {uid}\\BOTH" for n, uid in enumerate(self.sop_classes, 1)]
        lines += ["[[Profiles]]", "[All]", "PresentationContexts = Classes", "SCPSCURoleSelection = Roles"]
        return "\n".join(lines) + "\n"

    def register(self, files: Iterable[Path]) -> None:
        """Put copies of the files into the storage area by ``dcmqridx``: also what the network would not bring in."""
        copies = []
        for number, path in enumerate(files):
            copy = self.storage / f"{number:05}-{path.name}"
            shutil.copyfile(path, copy)
            copies.append(str(copy))
        for start in range(0, len(copies), 200):
            subprocess.run(
                [require("dcmqridx"), "-q", "-n", str(self.storage), *copies[start : start + 200]],
                check=True,
                capture_output=True,
            )


class Storescp(Server):
    """DCMTK's storage SCP; ``accept_all`` takes every transfer syntax that it knows."""

    def __init__(
        self, folder: Path, *, ae_title: str = "STORESCP", accept_all: bool = False, options: Sequence[str] = ()
    ) -> None:
        super().__init__(folder, ae_title)
        self.binary = require("storescp")
        self.options = [*(["+xa"] if accept_all else []), *options]
        self.received = folder / "received"
        self.received.mkdir(exist_ok=True)

    def command(self) -> list[str]:
        # +B: bit-preserving, as received.
        return [self.binary, "-aet", self.ae_title, "-od", str(self.received), "+B", *self.options, str(self.port)]


class Orthanc(Server):
    """Orthanc without plugins. ``options`` go over its configuration."""

    # It takes seconds to put its house in order, and nothing of it is kept.
    end = signal.SIGKILL

    def __init__(self, folder: Path, *, ae_title: str = "ORTHANC", unknown_classes: bool = False, **options: object):
        super().__init__(folder, ae_title)
        self.binary = require("Orthanc")
        self.http_port = 0
        self.configuration: dict[str, object] = {
            "Name": ae_title,
            "DicomAet": ae_title,
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "StorageCompression": False,
            "Plugins": [],
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomServerEnabled": True,
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": True,
            "LimitFindResults": 0,
            "LimitFindInstances": 0,
            "MaximumPduLength": 131072,
            "UnknownSopClassAccepted": unknown_classes,
            # The tests' data is gone with the folder, so nothing need reach the disk.
            "SyncStorageArea": False,
            "DatabaseServerIdentifier": ae_title,
            **options,
        }

    def command(self) -> list[str]:
        self.http_port = free_port()
        while self.http_port == self.port:
            self.http_port = free_port()
        config = self.folder / "orthanc.json"
        config.write_text(json.dumps({**self.configuration, "DicomPort": self.port, "HttpPort": self.http_port}))
        return [self.binary, str(config)]

    def load(self, files: Iterable[Path]) -> None:
        """Upload the files by REST. Orthanc keeps the bytes as they come."""
        connection = HTTPConnection(HOST, self.http_port, timeout=60)
        for path in files:
            connection.request("POST", "/instances", path.read_bytes(), {"Content-Type": "application/dicom"})
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise RuntimeError(f"Orthanc refuses {path.name}: {response.status} {answer[:300]!r}")
        connection.close()
