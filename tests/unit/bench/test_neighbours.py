"""What others took of the cores."""

import os

from bench.movers.neighbours import Neighbours, busy_s


def test_time_idle_waiting_or_in_interrupts_is_not_a_process_time() -> None:
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert busy_s("cpu  1 20 300 0 0 0 0 4000 7 7\ncpu0 9 9\n") == 4321 * tick
    assert busy_s("cpu  0 0 0 55 66 77 88 0 0 0\n") == 0


def test_others_never_take_less_than_nothing() -> None:
    neighbours = Neighbours()
    sum(range(300_000))
    assert neighbours.cores() >= 0
