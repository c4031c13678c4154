"""The loop of the simulation: tasks, time and chance in one thread."""

from __future__ import annotations

import threading

import pytest

from airflow_dicom_get import clock
from tests.simulation.faults import Killed, Process
from tests.simulation.line import Network
from tests.simulation.loop import EPOCH, EndlessError, looped


def test_time_passes_by_waiting_alone_and_all_is_one_thread() -> None:
    said: list[tuple[str, float, int]] = []

    def say(who: str, pause: float) -> None:
        for _ in range(2):
            clock.sleep(pause)
            said.append((who, round(clock.now() - EPOCH), threading.get_ident()))

    with looped(1) as loop:
        beside = loop.spawn(lambda: say("b", 30), "b")

        def main() -> None:
            say("a", 1000)
            beside.join()

        loop.run(main)
    assert [(who, at) for who, at, _ in said] == [("b", 30), ("b", 60), ("a", 1000), ("a", 2000)]
    assert {thread for _, _, thread in said} == {threading.get_ident()}


@pytest.mark.parametrize("seed", range(5))
def test_conditions_events_and_pools_work_as_those_of_threads(seed: int) -> None:
    taken: list[int] = []
    with looped(seed) as loop:
        room, over = clock.condition(), clock.event()
        queue: list[int] = []

        def take() -> None:
            while len(taken) < 6:
                with room:
                    while not queue:
                        room.wait()
                    taken.append(queue.pop(0))
            over.set()

        def main() -> None:
            clock.spawn(take, "taker")
            with clock.pool(2, "givers") as pool:
                for doubled in pool.map(lambda n: 2 * n, range(6)):
                    with room:
                        queue.append(doubled)
                        room.notify_all()
            assert over.wait(10)
            assert not clock.event().wait(5)

        main_task = loop.run(main)
    assert main_task.error is None
    assert taken == [0, 2, 4, 6, 8, 10]
    assert loop.at >= 5


def test_the_seed_alone_decides_the_order() -> None:
    def order(seed: int) -> list[str]:
        went: list[str] = []

        def go(name: str) -> None:
            for _ in range(3):
                clock.sleep(0)
                went.append(name)

        with looped(seed) as loop:
            tasks = [loop.spawn(lambda name=name: go(name), name) for name in "abc"]  # type: ignore[misc]

            def main() -> None:
                for task in tasks:
                    task.join()

            loop.run(main)
        return went

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(20)}) > 3


def test_what_is_left_of_a_dead_process_reaches_nothing() -> None:
    reached: list[str] = []
    process = Process()

    def beside() -> None:
        try:
            clock.sleep(1000)
        finally:
            reached.append("unwound")
            clock.sleep(0)
            reached.append("and went on")

    def main() -> None:
        clock.spawn(beside, "beside")
        clock.sleep(1)
        process.die()
        clock.sleep(0)

    with looped(1) as loop:
        task = loop.run(main, process)
        assert isinstance(task.error, Killed)
        loop.bury(process)
        assert loop.of(process) == []
    assert reached == ["unwound"]


def test_a_wait_may_end_by_its_time_and_by_a_call_before_its_task_goes_on() -> None:
    with looped(1) as loop:
        process, over = Process(), clock.event()

        def stand_aside() -> None:
            loop.stand_aside(0.01)
            over.set()

        waits = loop.spawn(lambda: over.wait(0.005), "waits", process)
        loop.spawn(stand_aside, "aside", process)
        loop.until(waits)
    assert waits.error is None


def test_who_waits_for_each_other_for_ever_is_seen() -> None:
    with looped(1) as loop, pytest.raises(EndlessError):
        loop.run(lambda: clock.event().wait())


def test_lines_carry_bytes_ends_and_resets() -> None:
    with looped(1) as loop:

        def serve(line, port):
            def echo() -> None:
                while data := line.receive(4, 60):
                    line.send(data * 2, 60)
                line.reset()

            return echo

        network = Network(loop, serve)

        def main() -> None:
            line = network.connect("pacs.example", 104, 10)
            view = memoryview(bytearray(64))
            with pytest.raises(TimeoutError):
                line.receive(view)
            assert line.send(memoryview(b"abcdef")) == 6
            got = b""
            while len(got) < 12:
                got += bytes(view[: line.receive(view)])
            assert got == b"abcdabcdefef"
            line.close()
            with pytest.raises(OSError, match="descriptor"):
                line.receive(view)

        task = loop.run(main)
    assert task.error is None
    assert network.left_open == 0
