"""How much of cores that are not enough for everybody a process asks for."""

import contextlib
import os
from pathlib import Path


def give_way(nice: int) -> None:
    """Let processes with a lower niceness have the cores first: 0 as usual, 19 at the very least.

    What is inherited stays where it is more, since to lower it takes privileges.
    """
    if nice == 0:
        return
    os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))
    # Where Linux shares cores among sessions first, niceness counts only within a session, and
    # a supervisor's children have one each; see sched(7).
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))
