"""Networks of their own in the kernel: a centre for this process and what it starts, and sites that reach the centre.

Each site is a network namespace with a loopback interface and one cable to the centre. Nothing leads from one site to
another, nor to the machine that all of it runs on; what listens on the loopback interface of a site is in reach of that
site alone. All is gone with the processes that are in it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Self

CENTRE = "10.77.0.1"
"""The address of the centre, the same from each site."""
_NEW_NETWORK = 0x40000000
_LISTENS = "0A"


def missing() -> str:
    """Why there can be no networks here; empty if there can."""
    if absent := [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]:
        return f"not installed: {', '.join(absent)} (Debian packages iproute2 and util-linux)"
    probe = ["unshare", "--net", "ip", "link", "add", "site0", "type", "veth", "peer", "name", "centre"]
    tried = subprocess.run(probe, capture_output=True)
    return "" if tried.returncode == 0 else "not allowed here: network namespaces, which need root"


def _ip(*arguments: str, inside: int | None = None) -> None:
    enter = [] if inside is None else ["nsenter", "--net", "--target", str(inside)]
    subprocess.run([*enter, "ip", *arguments], check=True, capture_output=True)


class Centre:
    """Moves this thread, and whatever it starts, into a network with the address `CENTRE` and nothing else."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._sites = 0

    def __enter__(self) -> Self:
        libc = ctypes.CDLL(None, use_errno=True)
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self._stack.callback(os.close, before)
        if libc.unshare(_NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "unshare")
        self._stack.callback(libc.setns, before, _NEW_NETWORK)
        _ip("link", "set", "lo", "up")
        _ip("address", "add", f"{CENTRE}/32", "dev", "lo")
        # Some machines forward, and what they are set to is copied.
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0", encoding="ascii")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def site(self) -> Site:
        """Lay a cable to a new site."""
        self._sites += 1
        return self._stack.enter_context(Site(self._sites))


class Site:
    """A network that reaches the centre, and which nothing else reaches."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._cable = f"site{number}"
        # What has no process in it is gone; the end of its input is the end of this one.
        self._keeper = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.write(b".")
        self._keeper.stdin.flush()
        # What it sends back says that it is in its network.
        self._keeper.stdout.read(1)
        pid, ours, theirs = self._keeper.pid, f"10.77.{self._number}.1", f"10.77.{self._number}.2"
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", "centre", "netns", str(pid))
        _ip("address", "add", f"{ours}/30", "dev", self._cable)
        _ip("link", "set", self._cable, "up")
        _ip("link", "set", "lo", "up", inside=pid)
        _ip("address", "add", f"{theirs}/30", "dev", "centre", inside=pid)
        _ip("link", "set", "centre", "up", inside=pid)
        _ip("route", "add", "default", "via", ours, inside=pid)
        return self

    def __exit__(self, *_: object) -> None:
        self._keeper.communicate()

    def inside(self, *command: str) -> list[str]:
        """A command as it is to be called so that it runs at the site."""
        return ["nsenter", "--net", "--target", str(self._keeper.pid), "--", *command]

    def cut(self) -> None:
        """Pull the cable out at the centre: the site sees packets vanish, and no connection end."""
        _ip("link", "set", self._cable, "down")

    def mend(self) -> None:
        """Put the cable in again."""
        _ip("link", "set", self._cable, "up")

    def sockets(self) -> tuple[set[str], set[str]]:
        """Addresses at which something listens, and those outside of the site to which something is connected."""
        listening, outside = set(), set()
        for name, width in (("tcp", 8), ("tcp6", 32)):
            for line in Path(f"/proc/{self._keeper.pid}/net/{name}").read_text("ascii").splitlines()[1:]:
                local, peer, state = line.split()[1:4]
                if state == _LISTENS:
                    listening.add(_address(local))
                elif not peer.startswith("0" * width) and not _address(peer).startswith("127."):
                    outside.add(_address(peer))
        return listening, outside


def _address(text: str) -> str:
    """``127.0.0.1:80`` of ``0100007F:0050``."""
    host, port = text.split(":")
    # The kernel writes words of the machine, and here the last is that of IPv4, also in an address of IPv6.
    return f"{'.'.join(map(str, bytes.fromhex(host[-8:])[::-1]))}:{int(port, 16)}"
