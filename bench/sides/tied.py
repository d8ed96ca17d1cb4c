"""Becomes another program, tied to the one that started this and to some cores.

    python tied.py SIGNAL PARENT CORES PROGRAM [ARGUMENT...]

SIGNAL is the number that the kernel sends it when process PARENT ends, however it does; CORES are
separated by commas, none are all. Imports nothing of this project. A program of its own, since code
between fork and exec is not safe in a process that has threads.
"""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def main(end_with: str, parent: str, cores: str, *command: str) -> None:
    """Tie this process and become the command."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(end_with))
    if os.getppid() != int(parent):
        sys.exit("the program that started this has ended")
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    try:
        os.execvp(command[0], command)
    except OSError as exc:
        sys.exit(f"{command[0]} cannot be run: {exc}")


if __name__ == "__main__":
    main(*sys.argv[1:])
