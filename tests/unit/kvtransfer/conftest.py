"""Every test that asks for it runs once for each lane."""

import pytest

from kvtransfer.settings import Lane
from tests.unit.kvtransfer import agents


@pytest.fixture(params=agents.LANES)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Lane:
    """The lane on which pairs of agents are connected."""
    monkeypatch.setattr(agents, "LANE", request.param)
    return request.param  # type: ignore[no-any-return]
