"""A fake router that listens."""

from collections.abc import Iterator

import pytest

from tests.unit.client.fake_router import FakeRouter, running_server


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    fake = FakeRouter()
    with running_server(fake):
        yield fake
