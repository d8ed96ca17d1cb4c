"""How often a process that serves looks for garbage."""

import gc

# Of objects made and not freed, before the youngest are looked at: by default 700, which a step of
# a hundred streams makes. The older ones are looked at after so many times of that. What a
# long answer leaves in cycles is old when it ends, and stays until the oldest are looked at.
_YOUNGEST, _MIDDLE, _OLDEST = 20_000, 10, 10


def collect_rarely() -> None:
    """Look for cycles rarely, and never among what there is now; to be called once started.

    What is open at once, thousands of calls with their tasks and buffers, is looked at with every
    collection of all ages, and everybody waits meanwhile: hundreds of milliseconds of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNGEST, _MIDDLE, _OLDEST)
