"""What ucx_perftest prints."""

import pytest

from bench.movers.perftest import parse
from bench.sides.process import SideFailed

PRINTED = """\
+--------------+--------------+------------------------------+---------------------+
|     Test     | # iterations | 50.0%ile | average | overall |  average |  overall |
+--------------+--------------+------------------------------+---------------------+
                       20000      5.788     6.227     6.227    10036.77   10040.00      160588      160588
"""  # noqa: E501


def test_the_overall_bandwidth_is_read_and_its_unit_is_mib() -> None:
    assert parse(PRINTED) == pytest.approx(10040.00 * 1.048576 / 1000)


@pytest.mark.parametrize("printed", ["", "\n", "connection refused", PRINTED.rsplit("\n", 2)[0]])
def test_output_without_figures_is_an_error_that_shows_it(printed: str) -> None:
    with pytest.raises(SideFailed, match="no figures"):
        parse(printed)
