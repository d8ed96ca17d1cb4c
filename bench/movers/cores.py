"""Which core a side runs on. Owns this process's affinity while it starts something."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def sender_and_receiver() -> tuple[int, int]:
    """Return the first two cores that this process may use; one and the same where it has one."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[min(1, len(cores) - 1)]


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this thread, and the processes that it starts meanwhile, to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
