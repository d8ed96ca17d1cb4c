"""A runner whose experts are reached through a dispatcher: maps, weights that move, idle ranks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import load_config
from engine.dispatch import DISPATCHERS, ExpertMap, Members
from engine.errors import BatchError, UnsupportedError, WeightError
from engine.expert_moves import stage, switch
from engine.kernels import experts_cpu
from engine.parallel import Layout
from engine.runner import Chunk, ModelRunner
from engine.weights import Reader
from tests.unit.engine.checkpoints import make_checkpoint
from tests.unit.engine.dispatch.loopback import on_ranks

CHUNK = Chunk(token_ids=range(1, 12), start=0, block_table=range(2))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"))


def runner(folder: Path, layout: Layout | None = None, **more: Any) -> ModelRunner:
    return ModelRunner(
        folder=folder,
        config=load_config(folder),
        device=torch.device("cpu"),
        num_blocks=4,
        block_size=8,
        layout=layout,
        **{"dtype": torch.float32, **more},
    )


def member(folder: Path, members: Members, **more: Any) -> ModelRunner:
    return runner(folder, members.layout, ranks=members.tp, experts=members.group, **more)


def test_a_group_is_needed_where_experts_are_split(moe: Path) -> None:
    with pytest.raises(ValueError, match="needs a group of the 2 ranks with experts"):
        runner(moe, Layout(dp=2, ep=2))


def test_a_group_of_other_ranks_is_refused(moe: Path) -> None:
    def on_rank(members: Members) -> None:
        with pytest.raises(ValueError, match="rank 0 of 1 that share experts has a group"):
            runner(moe, Layout(), experts=members.group)

    on_ranks(on_rank, dp=2)


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_a_dp_rank_without_tokens_takes_part(moe: Path, dispatch: str) -> None:
    def on_rank(members: Members) -> Tensor:
        split = member(moe, members, dispatch=dispatch)
        chunks = [] if members.layout.dp_rank else [CHUNK]
        return split.forward(chunks, dp_tokens=(11, 0))

    busy, idle = on_ranks(on_rank, dp=2, ep=2)
    torch.testing.assert_close(busy, runner(moe).forward([CHUNK]), rtol=1e-5, atol=1e-5)
    assert idle.shape == (0, busy.shape[1])


@pytest.mark.parametrize("dp_tokens", [None, (11,), (3, 11), (12, 0)])
def test_other_numbers_of_tokens_than_there_are_are_refused(moe: Path, dp_tokens: Any) -> None:
    def on_rank(members: Members) -> None:
        split = member(moe, members)
        if members.layout.dp_rank == 0:
            with pytest.raises(BatchError, match="dp rank 0 of 2 has 11 tokens"):
                split.forward([CHUNK], dp_tokens=dp_tokens)

    on_ranks(on_rank, dp=2, ep=2)


def test_a_pass_without_any_tokens_is_refused(moe: Path) -> None:
    def on_rank(members: Members) -> None:
        with pytest.raises(BatchError, match="some dp rank"):
            member(moe, members).forward([], dp_tokens=(0, 0))

    on_ranks(on_rank, dp=2, ep=2)


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_experts_that_change_places_change_nothing(moe: Path, dispatch: str) -> None:
    """Two experts swap ranks, and one more gets a replica in place of a replica of another."""
    before = ExpertMap(8, ((0, 1, 2, 3, 6), (4, 5, 6, 7, 0)))
    after = ExpertMap(8, ((0, 1, 4, 3, 6), (2, 5, 6, 7, 1)))

    def on_rank(members: Members) -> list[Tensor]:
        split = member(moe, members, dispatch=dispatch, expert_maps={1: before, 2: before})
        found = [split.forward([CHUNK], dp_tokens=(11, 11))]
        staged = stage(split.experts, members.layout.ep_rank, 2, after, Reader(moe).fill)
        assert {slot: expert for slot, (expert, _) in staged.puts.items()} == (
            {0: 2, 4: 1} if members.layout.ep_rank else {2: 4}
        )
        found.append(split.forward([CHUNK], dp_tokens=(11, 11)))
        switch(split.experts, staged)
        return [*found, split.forward([CHUNK], dp_tokens=(11, 11))]

    wanted = runner(moe).forward([CHUNK])
    for found in on_ranks(on_rank, dp=2, ep=2):
        for each in found:
            torch.testing.assert_close(each, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(experts_cpu._native() is None, reason="needs the compiled experts")
@pytest.mark.parametrize("dispatch", ["alltoall", "padded"])
def test_experts_that_move_change_no_bit_in_bf16(moe: Path, dispatch: str) -> None:
    before = ExpertMap(8, ((0, 1, 2, 3), (4, 5, 6, 7)))
    after = ExpertMap(8, ((0, 6, 2, 5), (4, 3, 1, 7)))

    def on_rank(members: Members) -> None:
        split = member(
            moe, members, dispatch=dispatch, expert_maps={1: before}, dtype=torch.bfloat16
        )
        found = split.forward([CHUNK], dp_tokens=(11, 11))
        rank = members.layout.ep_rank
        switch(split.experts, stage(split.experts, rank, 1, after, Reader(moe).fill))
        assert torch.equal(split.forward([CHUNK], dp_tokens=(11, 11)), found)

    on_ranks(on_rank, dp=2, ep=2)


def test_redundant_experts_change_nothing_and_are_neighbours(moe: Path) -> None:
    def on_rank(members: Members) -> Tensor:
        split = member(moe, members, redundant_experts=2)
        held = (4, 5, 6, 7, 0, 1) if members.layout.ep_rank else (0, 1, 2, 3, 4, 5)
        assert {split.experts.held(layer) for layer in range(3)} == {held}
        return split.forward([CHUNK], dp_tokens=(11, 11))

    wanted = runner(moe).forward([CHUNK])
    for found in on_ranks(on_rank, dp=2, ep=2):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_more_redundant_experts_than_there_are_others_are_refused(moe: Path) -> None:
    def on_rank(members: Members) -> None:
        with pytest.raises(UnsupportedError, match=r"5 redundant experts .* use 0 to 4"):
            member(moe, members, redundant_experts=5)

    on_ranks(on_rank, dp=2, ep=2)
    with pytest.raises(UnsupportedError, match="redundant_experts=1 with ep=1: use 0"):
        runner(moe, redundant_experts=1)


def test_a_map_of_what_slots_do_not_hold_is_refused(moe: Path) -> None:
    even = ExpertMap(8, ((0, 1, 2, 3), (4, 5, 6, 7)))
    other = ExpertMap(8, ((0, 1, 2, 4), (3, 5, 6, 7)))

    def on_rank(members: Members) -> None:
        split = member(moe, members)
        with pytest.raises(UnsupportedError, match=r"layers\.2\.mlp: .* `put` them first"):
            split.experts.place({1: even, 2: other})
        with pytest.raises(UnsupportedError, match="a map for it is of 4 on 2"):
            split.experts.place({2: ExpertMap(4, ((0, 1, 2, 3), (0,)))})

    on_ranks(on_rank, dp=2, ep=2)


def test_a_map_of_another_split_is_refused(moe: Path) -> None:
    def on_rank(members: Members) -> None:
        maps = {0: ExpertMap(8, (tuple(range(8)),))}
        with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp has 8 experts on 2 ep ranks"):
            member(moe, members, expert_maps=maps)

    on_ranks(on_rank, dp=2, ep=2)


def test_an_expert_that_the_model_lacks_is_refused(moe: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(moe, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    tensors[name.format(8)] = tensors[name.format(7)].clone()
    save_file(tensors, folder / "model.safetensors")

    def on_rank(members: Members) -> None:
        with pytest.raises(WeightError, match=r"holds 1 tensors .* such as .*experts\.8\.up_proj"):
            member(folder, members)

    on_ranks(on_rank, dp=2, ep=2)


def test_maps_without_a_dispatcher_are_refused(moe: Path) -> None:
    with pytest.raises(ValueError, match="maps of experts need a group"):
        runner(moe, expert_maps={0: ExpertMap(8, ((7, 6, 5, 4, 3, 2, 1, 0),))})


def test_loads_are_of_the_tokens_since_they_were_taken(moe: Path) -> None:
    def on_rank(members: Members) -> None:
        split = member(moe, members)
        split.warm_up()
        split.experts.measure(2)
        split.forward([CHUNK], dp_tokens=(11, 11))
        loads = split.experts.take_loads()
        assert {layer: int(load.sum()) for layer, load in loads.items()} == {0: 22, 1: 22, 2: 2}
        assert not any(load.any() for load in split.experts.take_loads().values())

    on_ranks(on_rank, dp=2, ep=2)
