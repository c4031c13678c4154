"""The installation of the tests' servers: no service starts, and nothing of it stays, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "peers.sh"
PROGRAM = "no-such-program-of-the-tests=package"


class Machine:
    """A machine where an apt-get of ours installs for as long as it is let, and anybody is root, or has sudo."""

    def __init__(self, folder: Path) -> None:
        self.policy, self.folder = folder / "policy-rc.d", folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.command("id", "echo 0")
        self.command("update-rc.d", "true")
        asks = f"{self.policy} orthanc start; echo $? >{folder}/asked; touch {folder}/apt"
        self.command("apt-get", f"{asks}; while [ ! -e {folder}/go ]; do sleep 0.05; done")

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def run(self) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "POLICY_RC_D": str(self.policy),
            "TMPDIR": str(self.folder),
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), PROGRAM], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait(self, *, until: bool, path: Path) -> None:
        ends = time.monotonic() + 60
        while path.exists() != until:
            assert time.monotonic() < ends, path
            time.sleep(0.02)

    def installing(self) -> None:
        """Wait until apt-get runs."""
        self.wait(until=True, path=self.folder / "apt")
        assert (self.folder / "asked").read_text() == "101\n"

    def processes(self, words: str) -> list[int]:
        """Those of this machine with such words in their command."""
        ours = f"POLICY_RC_D={self.policy}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if words in command and ours in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def go(self) -> None:
        (self.folder / "go").touch()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_nothing_stays_after_an_installation(machine: Machine) -> None:
    machine.go()
    process = machine.run()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, machine.policy.exists()) == (0, False)
    assert "installing package for the tests" in out


def test_a_policy_of_the_machine_stays(machine: Machine) -> None:
    machine.policy.write_text("#!/bin/sh\nexit 0\n")
    machine.policy.chmod(0o755)
    out, _ = machine.run().communicate(timeout=60)
    assert "lets services start" in out
    assert machine.policy.read_text() == "#!/bin/sh\nexit 0\n"


def test_a_killed_installation_leaves_no_policy_behind(machine: Machine) -> None:
    process = machine.run()
    machine.installing()
    for pid in (process.pid, *machine.processes("bash -s")):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert machine.policy.exists()  # apt-get goes on, and may still come to a service
    machine.go()
    machine.wait(until=False, path=machine.policy)


def test_a_policy_that_nobody_is_left_to_remove_forbids_nothing(machine: Machine) -> None:
    process = machine.run()
    machine.installing()
    for pid in (*machine.processes("cat >/dev/null"), process.pid, *machine.processes("bash -s")):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    machine.go()
    limit = time.monotonic() + 20
    while subprocess.run([machine.policy, "orthanc", "start"], check=False).returncode and time.monotonic() < limit:
        time.sleep(0.1)  # what was killed may not be gone yet
    assert not machine.policy.exists()


def test_it_says_that_it_calls_sudo_before_it_does(machine: Machine) -> None:
    machine.command("id", "echo 1000")
    machine.command("sudo", "echo sudo was called; exit 1")
    out, _ = machine.run().communicate(timeout=60)
    said, called = out.index("calling sudo"), out.find("sudo was called")
    assert called == -1 or said < called
    assert "sudo asks for a password" in out
