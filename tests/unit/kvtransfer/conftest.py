"""Every test that asks for it runs once for each lane."""

import pytest

from kvtransfer.settings import Lane
from tests.unit.kvtransfer import agents


@pytest.fixture(params=[*agents.LANES, "gpu"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The lane, or "gpu" for mapped memory that counts as a GPU's."""
    on_gpu = request.param == "gpu"
    monkeypatch.setattr(agents, "LANE", "mapped" if on_gpu else request.param)
    monkeypatch.setattr(agents, "ON_GPU", on_gpu)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=agents.LANES)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Lane:
    """The lane on which pairs of agents are connected."""
    monkeypatch.setattr(agents, "LANE", request.param)
    return request.param  # type: ignore[no-any-return]
