"""Ranks as processes, over each way that KV can travel between two of one host."""

from collections.abc import Iterator

import pytest

from tests.integration.kvtransfer.processes import WAYS, Ranks, Start, Way


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """What starts ranks."""
    with Ranks() as ranks:
        yield ranks


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    """How payload travels in this test."""
    return WAYS[request.param]


@pytest.fixture
def start(ranks: Ranks, way: Way) -> Iterator[Start]:
    """Starts ranks that use the way; they end with the test."""
    with ranks.of(way) as start:
        yield start
