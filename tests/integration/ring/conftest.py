"""The ranks that all tests of the ring share."""

from collections.abc import Iterator

import pytest

from tests.integration.ring.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(4, tmp_path_factory.mktemp("ring")) as started:
        yield started
