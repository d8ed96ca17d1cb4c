"""Ties a process's life to the one that started it; knows nothing of what either does."""

import ctypes
import os
import signal
import sys

PARENT_PID_VARIABLE = "TWINPOOL_PARENT_PID"
_PR_SET_PDEATHSIG = 1


def exit_with_parent(parent_pid: int) -> None:
    """Makes the kernel kill this process when its parent ends, however the parent ends.

    SIGKILL, because a process that hangs must not outlive its supervisor either. Linux only;
    elsewhere it does nothing. Exits at once where the parent is gone already: it may have died
    between starting this process and this call, and then no signal would ever come.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


def exit_with_supervisor() -> None:
    """Applies `exit_with_parent` where a supervisor named itself in the environment.

    The variable is taken out, so that this process's own children do not take it for theirs.
    """
    parent_pid = os.environ.pop(PARENT_PID_VARIABLE, "")
    if parent_pid:
        exit_with_parent(int(parent_pid))
