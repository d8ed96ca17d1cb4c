"""A rank reads the experts that come to it beside its steps, and puts them in when one says so."""

import queue
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decode.orders import Loads, Order, Placing
from decode.rank_experts import RankExperts
from engine.config import load_config
from engine.dispatch import Members
from engine.runner import Chunk, ModelRunner
from tests.unit.engine.checkpoints import make_checkpoint
from tests.unit.engine.dispatch.loopback import on_ranks

CHUNK = Chunk(token_ids=range(1, 12), start=0, block_table=range(2))
MOVED = ((0, 1, 6, 3), (4, 5, 2, 7))
WAIT_S = 20.0


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"))


def member(folder: Path, members: Members) -> ModelRunner:
    return ModelRunner(
        folder=folder,
        config=load_config(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_blocks=4,
        block_size=8,
        layout=members.layout,
        ranks=members.tp,
        experts=members.group,
        dispatch="alltoall",
    )


class Heard:
    """What a rank has said."""

    def __init__(self) -> None:
        self.staged: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self.loads: list[Loads] = []
        self.pauses: list[float] = []


@contextmanager
def running(runner: ModelRunner, folder: Path) -> Iterator[tuple[RankExperts, Heard]]:
    experts, heard = RankExperts(runner, folder), Heard()
    experts.on_staged = lambda *said: heard.staged.put(said)
    experts.on_loads = heard.loads.append
    experts.on_switch = heard.pauses.append
    experts.start()
    yield experts, heard
    experts.close()


def forward(runner: ModelRunner) -> Tensor:
    return runner.forward([CHUNK], dp_tokens=(11, 11))


def test_experts_are_in_their_places_from_the_step_that_says_so(moe: Path) -> None:
    def on_rank(members: Members) -> None:
        runner = member(moe, members)
        before, rank = forward(runner), members.layout.ep_rank
        with running(runner, moe) as (experts, heard):
            for number, layer in ((1, 2), (2, 0)):  # both are read before the first is in force
                experts.stage(Placing(number=number, layer=layer, slots=MOVED))
                assert heard.staged.get(timeout=WAIT_S) == (number, "")
            assert runner.experts.held(2) == ((4, 5, 6, 7) if rank else (0, 1, 2, 3))
            torch.testing.assert_close(forward(runner), before, rtol=1e-5, atol=1e-5)
            for number, layer in ((1, 2), (2, 0)):
                experts.act(Order(switch=number))
                assert runner.experts.held(layer) == MOVED[rank]
                torch.testing.assert_close(forward(runner), before, rtol=1e-5, atol=1e-5)
            assert len(heard.pauses) == 2

    on_ranks(on_rank, dp=2, ep=2)


def test_loads_are_said_when_a_step_asks(moe: Path) -> None:
    def on_rank(members: Members) -> None:
        runner = member(moe, members)
        with running(runner, moe) as (experts, heard):
            forward(runner)
            experts.act(Order(take_loads=True))
            experts.act(Order(take_loads=True))
        first, second = heard.loads
        assert {layer: sum(loads_E) for layer, loads_E in first.items()} == {0: 22, 1: 22, 2: 2}
        assert not any(map(sum, second.values()))

    on_ranks(on_rank, dp=2, ep=2)


def test_a_checkpoint_that_is_gone_is_said_and_the_rank_goes_on(moe: Path, tmp_path: Path) -> None:
    def on_rank(members: Members) -> None:
        folder = Path(shutil.copytree(moe, tmp_path / str(members.layout.ep_rank)))
        runner = member(folder, members)
        with running(runner, folder) as (experts, heard):
            shutil.rmtree(folder)
            experts.stage(Placing(number=1, layer=1, slots=MOVED))
            number, failed = heard.staged.get(timeout=WAIT_S)
            assert number == 1
            assert "model.safetensors: cannot be read" in failed
            forward(runner)

    on_ranks(on_rank, dp=2, ep=2)


def test_reading_ends_with_the_rank(moe: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("decode.rank_experts._RESTS", 1e9)  # it would rest for days

    def on_rank(members: Members) -> None:
        runner = member(moe, members)
        with running(runner, moe) as (experts, heard):
            experts.stage(Placing(number=1, layer=1, slots=MOVED))
        experts._orders._thread.join(WAIT_S)
        assert not experts._orders._thread.is_alive()
        assert heard.staged.empty()

    on_ranks(on_rank, dp=2, ep=2)
