"""Owns the question whether an engine's step has hung: its process would go on to look alive.

A collective that waits for ever, or a device that does not answer, stops the engine's thread alone:
heartbeats go out and health is good, while requests wait to their deadlines.
"""

import asyncio
import faulthandler
import logging
import sys
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

# How often is looked, in parts of the limit and in seconds at most.
_LOOKS = 10
_MOST_S = 5.0
# Which the step under way has when an engine is to stop.
_LAST_STEP_S = 30.0


class StepHangs(Exception):
    """A step has not come to its end in the time that any step may take."""


async def end_where_a_step_hangs(
    step_under_way: Callable[[], int | None],
    timeout_s: float,
    die: Callable[[BaseException], object],
) -> None:
    """Have the process `die` once one step has been under way for `timeout_s`; 0: never.

    `step_under_way` tells the oldest step that has not ended, None where there is none. Time in
    which this process itself stood still does not count. Where every thread was goes to stderr.
    """
    if not timeout_s:
        return
    look_s = min(_MOST_S, timeout_s / _LOOKS)
    step, looks = None, 0
    while looks * look_s < timeout_s:
        await asyncio.sleep(look_s)
        step, before = step_under_way(), step
        looks = looks + 1 if step is not None and step == before else 0
    log.critical(
        "a step has not ended for %g s (--step-timeout-s): this instance ends, and its requests go"
        " on elsewhere; where its threads are follows",
        timeout_s,
    )
    faulthandler.dump_traceback(sys.stderr)
    die(StepHangs())


def await_last_step(thread: threading.Thread, die: Callable[[BaseException], object]) -> None:
    """Wait for an engine's thread that is to stop; `die` where its last step hangs."""
    if thread.is_alive():
        thread.join(_LAST_STEP_S)
        if thread.is_alive():
            die(StepHangs())
