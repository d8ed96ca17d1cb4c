"""Thread settings of the numeric libraries; they only count before torch is imported."""

import os


def thread_env(threads: int) -> dict[str, str]:
    """Returns the environment for a process that computes with this many threads.

    Idle OpenMP threads sleep instead of spinning: spinning ones take the cores from the other
    processes of the machine and slow all of them down by about ten times.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, found {threads}")
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
    }


def default_threads(instances: int = 2) -> int:
    """Returns how many threads one of this many instances on the machine should use."""
    return max(1, len(os.sched_getaffinity(0)) // instances)


def set_thread_env(threads: int | None = None) -> None:
    """Sets the thread environment of this process; what the caller's environment says wins.

    With `threads` given it wins over the environment.
    """
    for name, value in thread_env(threads or default_threads()).items():
        if threads is not None and name.endswith("_NUM_THREADS"):
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)
