"""Airflow's web interface and the embedded PACS on the demo's home, until Ctrl-C.

The four components of Airflow run on their own, few processes each, and listen on the loopback interface alone.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import demo_home as home
from rich.console import Console

CONNECTION = "dicom_default"
PATIENCE = 120


def free_port(wanted: int) -> int:
    """Return `wanted`, or any free port where that one is taken."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise home.DemoError("No port is free on 127.0.0.1.")


def fail_if_ended(processes: dict[str, subprocess.Popen[str]]) -> None:
    """Raise if a component has ended."""
    for name, process in processes.items():
        if process.poll() is not None:
            raise home.DemoError(f"airflow {name} ended by itself; see {home.shown(log_of(name))}")


def log_of(name: str) -> Path:
    """Where a component's output goes."""
    return home.LOGS / f"{name}.log"


def run(console: Console, port: int) -> None:
    """Start everything, say where it is, and keep it until a component ends or an interrupt comes."""
    began = time.monotonic()
    home.make_folders()
    address = f"http://127.0.0.1:{port}"
    environment = home.airflow_environment(
        {
            "DICOM_DESTINATION": str(home.RETRIEVED),
            "DICOM_REPORTS": str(home.FOLDER / "reports"),
            # Nobody waits ten minutes for a demonstration.
            "DICOM_SETTLED_MINUTES": "0.5",
            "AIRFLOW__API__BASE_URL": address,
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        }
    )
    for name in ("setup", "pacs", *home.COMPONENTS):
        log_of(name).unlink(missing_ok=True)
    with ExitStack() as stack:
        node, _ = stack.enter_context(home.pacs())
        console.print(f"PACS      {node}")
        if not home.prepared():
            home.prepare_database(environment, log_of("setup"))
        # In the database, not in the environment: so the connection shows in the web interface, with its form and test.
        connections = home.AIRFLOW_HOME / "connections.json"
        connections.write_text(json.dumps({CONNECTION: f"dicom://{node}"}), encoding="utf-8")
        home.airflow(
            "connections", "import", "--overwrite", str(connections), environment=environment, log=log_of("setup")
        )
        processes: dict[str, subprocess.Popen[str]] = {}
        # One common end for all four, rather than one after the other.
        stack.callback(lambda: home.stop(list(processes.values())))
        stack.callback(lambda: console.print("\nStopping, up to 10 s …"))
        for name, arguments in home.COMPONENTS.items():
            processes[name] = home.launch(
                [sys.executable, "-m", "airflow", *arguments], environment=environment, log=log_of(name)
            )
        console.print("Airflow   starting its four components …")
        while not home.healthy(address):
            fail_if_ended(processes)
            if time.monotonic() - began > PATIENCE:
                raise home.DemoError(f"Airflow is not ready after {PATIENCE} s; see {home.shown(home.LOGS)}/")
            time.sleep(0.5)
        console.print(f"          ready after {time.monotonic() - began:.0f} s")
        # For the first notebook, which asks this Airflow.
        place = home.AIRFLOW_HOME / "address"
        place.write_text(address, encoding="utf-8")
        stack.callback(lambda: place.unlink(missing_ok=True))
        console.print()
        console.print(f"Open      {address}")
        console.print(f"User      admin    password {home.password()}", markup=False)
        console.print(f"Try       the DAG {home.DAG_ID}; Browse > DICOM retrievals; Admin > Connections > {CONNECTION}")
        console.print("Notebook  notebooks/01_first_look.ipynb shows the latest run of that DAG")
        console.print("Ctrl-C stops everything.")
        while True:
            fail_if_ended(processes)
            time.sleep(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080, help="of the web interface; another if it is taken")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    home.end_by_signals()
    try:
        run(console, free_port(arguments.port))
    except KeyboardInterrupt:
        console.print("Stopped: nothing is left running.")
    except home.DemoError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
