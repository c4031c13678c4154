"""Run one command and print what it used, as JSON.

    python -I -S launch.py STDOUT STDERR COMMAND...

A child starts with the peak resident memory of the process that forks it, so this one imports next
to nothing.
"""

import os
import sys
import time


def main() -> None:
    """Run the command that the arguments give."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    outputs = [
        (os.POSIX_SPAWN_OPEN, 1, sys.argv[1], flags, 0o644),
        (os.POSIX_SPAWN_OPEN, 2, sys.argv[2], flags, 0o644),
    ]
    command = sys.argv[3:]
    start = time.monotonic()
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=outputs)
    _, status, usage = os.wait4(pid, 0)
    wall = time.monotonic() - start
    print(
        f'{{"wall": {wall:.6f}, "user": {usage.ru_utime:.6f}, "system": {usage.ru_stime:.6f},'
        f' "rss": {usage.ru_maxrss * 1024}, "exit": {os.waitstatus_to_exitcode(status)}}}'
    )


if __name__ == "__main__":
    main()
