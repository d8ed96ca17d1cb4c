"""A sparse layer's experts on a GPU against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.gpu.tune import Tile
from engine.kernels.table import PagedKernels
from tests.unit.engine.kernels.gpu.tensors import BATCHES, DTYPES, apart, assert_near, random

SMALL = Tile(rows=16, keys=32, warps=4, stages=2)


def exact(
    x_TD: Tensor, gate_up: Tensor, down: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    sum_TD = torch.zeros(x_TD.shape, dtype=torch.float64, device=x_TD.device)
    for token, (experts, weights) in enumerate(zip(experts_TK, weights_TK, strict=True)):
        for expert, weight in zip(experts.tolist(), weights.tolist(), strict=True):
            if expert >= 0:
                both = gate_up[expert].double() @ x_TD[token].double()
                gate, up = both.chunk(2)
                sum_TD[token] += weight * (down[expert].double() @ (gate * gate.sigmoid() * up))
    return sum_TD


def layer(
    seed: int, experts: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    gate_up = random(seed, experts, 2 * inner, hidden, dtype=dtype, device=device)
    down = random(seed + 1, experts, hidden, inner, dtype=dtype, device=device)
    return apart(gate_up * hidden**-0.5), apart(down * inner**-0.5)


def chosen(
    seed: int, tokens: int, experts: int, choices: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Choices of which some experts have none, and some are not here."""
    generator = torch.Generator().manual_seed(seed)
    hot = torch.randperm(experts, generator=generator)[: max(1, experts // 2)]
    experts_TK = hot[torch.randint(len(hot), (tokens, choices), generator=generator)]
    experts_TK[torch.rand(tokens, choices, generator=generator) < 0.2] = -1
    weights_TK = torch.rand(tokens, choices, generator=generator)
    return experts_TK.to(device), weights_TK.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 6),
    choices=st.integers(1, 4),
    hidden=st.integers(1, 90),
    inner=st.integers(1, 70),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None)
def test_each_token_gets_the_weighted_sum_of_its_experts(
    gpu: PagedKernels,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    experts: int,
    choices: int,
    hidden: int,
    inner: int,
    seed: int,
) -> None:
    x_TD = apart(random(seed + 2, tokens, hidden, dtype=dtype, device=device))
    gate_up, down = layer(seed, experts, hidden, inner, dtype, device)
    experts_TK, weights_TK = chosen(seed, tokens, experts, choices, device)
    found_TD = gpu.experts(x_TD, gate_up, down, experts_TK, weights_TK)
    assert found_TD.dtype == torch.float32
    assert_near(found_TD, exact(x_TD, gate_up, down, experts_TK, weights_TK), dtype)


def test_pairs_of_one_token_are_not_sorted(
    gpu: PagedKernels, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.kernels.gpu import experts

    def place(*_: object) -> None:
        raise AssertionError("two launches more")

    monkeypatch.setattr(experts, "place", place)
    x_1D = random(4, 1, 32, dtype=torch.bfloat16, device=device)
    gate_up, down = layer(5, 7, 32, 16, torch.bfloat16, device)
    experts_1K = torch.tensor([[6, -1, 0, 3]], device=device)
    weights_1K = torch.rand(1, 4, device=device)
    found_1D = gpu.experts(x_1D, gate_up, down, experts_1K, weights_1K)
    assert_near(found_1D, exact(x_1D, gate_up, down, experts_1K, weights_1K), torch.bfloat16)


@pytest.mark.parametrize("tokens", BATCHES)
def test_batches_of_any_size(gpu: PagedKernels, device: torch.device, tokens: int) -> None:
    x_TD = random(4, tokens, 32, dtype=torch.bfloat16, device=device)
    gate_up, down = layer(5, 6, 32, 16, torch.bfloat16, device)
    experts_TK, weights_TK = chosen(6, tokens, 6, 2, device)
    found_TD = gpu.experts(x_TD, gate_up, down, experts_TK, weights_TK)
    wanted_TD = exact(x_TD, gate_up, down, experts_TK, weights_TK)
    assert_near(found_TD, wanted_TD, torch.bfloat16)


@pytest.mark.parametrize("pairs", [0, 1, 50])
def test_pairs_of_any_tokens_are_as_torch_has_them(
    gpu: PagedKernels, device: torch.device, pairs: int
) -> None:
    from engine.kernels.gpu import experts_torch

    x_TD = apart(random(1, 9, 40, dtype=torch.float32, device=device))
    gate_up, down = layer(2, 5, 40, 24, torch.float32, device)
    generator = torch.Generator().manual_seed(3)
    tokens_P = torch.randint(9, (pairs,), generator=generator).to(device)
    experts_P = torch.randint(-1, 5, (pairs,), generator=generator).to(device)
    wanted_PD = experts_torch.expert_pairs(x_TD, gate_up, down, tokens_P, experts_P)
    found_PD = gpu.expert_pairs(x_TD, gate_up, down, tokens_P, experts_P)
    torch.testing.assert_close(found_PD, wanted_PD, atol=1e-5, rtol=1e-5)
    assert not found_PD[experts_P < 0].any()


def test_torch_form_is_the_same_sum(device: torch.device) -> None:
    from engine.kernels.gpu import experts_torch

    x_TD = random(1, 7, 16, dtype=torch.float32, device=device)
    gate_up, down = layer(2, 4, 16, 8, torch.float32, device)
    experts_TK, weights_TK = chosen(5, 7, 4, 2, device)
    found_TD = experts_torch.experts(x_TD, gate_up, down, experts_TK, weights_TK)
    assert_near(found_TD, exact(x_TD, gate_up, down, experts_TK, weights_TK), torch.float32)


@pytest.mark.parametrize("rows", [16, 32])
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_pairs_are_placed_by_expert_in_their_order(
    gpu: PagedKernels, device: torch.device, rows: int, data: st.DataObject
) -> None:
    from engine.kernels.gpu import experts

    num_experts = data.draw(st.integers(1, 9))
    of_pairs = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=1, max_size=90))
    placed = experts.place(torch.tensor(of_pairs, device=device), num_experts, rows)
    tiles = placed.order.view(-1, rows).tolist()
    found: dict[int, list[int]] = {}
    for expert, pairs in zip(placed.tile_experts.tolist(), tiles, strict=True):
        if expert >= 0:
            found.setdefault(expert, []).extend(pairs)
    for expert in range(num_experts):
        mine = [pair for pair, of in enumerate(of_pairs) if of == expert]
        filled = mine + [-1] * (-len(mine) % rows)
        assert found.get(expert, []) == filled


def test_every_token_to_one_expert_and_none_to_the_others(
    gpu: PagedKernels, device: torch.device
) -> None:
    x_TD = random(1, 33, 32, dtype=torch.float32, device=device)
    gate_up, down = layer(2, 8, 32, 16, torch.float32, device)
    gate_up[:7], down[:7] = torch.nan, torch.nan  # what nobody chose is not read
    experts_TK = torch.full((33, 1), 7, device=device)
    weights_TK = torch.ones(33, 1, device=device)
    found_TD = gpu.experts(x_TD, gate_up, down, experts_TK, weights_TK)
    assert_near(found_TD, exact(x_TD, gate_up, down, experts_TK, weights_TK), torch.float32)


def test_a_token_gets_the_same_whoever_is_beside_it(
    gpu: PagedKernels, device: torch.device
) -> None:
    x_TD = random(1, 20, 48, dtype=torch.bfloat16, device=device)
    gate_up, down = layer(2, 4, 48, 24, torch.bfloat16, device)
    experts_TK, weights_TK = chosen(3, 20, 4, 2, device)
    together = gpu.experts(x_TD, gate_up, down, experts_TK, weights_TK, tile=SMALL)
    for token in (0, 11, 19):
        one = slice(token, token + 1)
        alone = gpu.experts(x_TD[one], gate_up, down, experts_TK[one], weights_TK[one], tile=SMALL)
        assert torch.equal(alone, together[one])


def test_weights_that_do_not_fit_are_refused(gpu: PagedKernels, device: torch.device) -> None:
    gate_up, down = layer(2, 4, 16, 8, torch.float32, device)
    choice = torch.zeros(2, 1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"rows of 12 for experts of \(4, 16, 16\)"):
        gpu.experts(torch.ones(2, 12, device=device), gate_up, down, choice, choice.float())


def test_there_is_a_tile_for_decode_and_for_prefill(gpu: PagedKernels) -> None:
    from engine.kernels.gpu import experts

    for dtype in DTYPES:
        x = torch.empty(1, 2048, dtype=dtype)
        rows = [experts.choices_of(x, 128, 768, pairs).tiles[0].rows for pairs in (8, 512, 65536)]
        # fp32 is multiplied out of registers, which larger tiles would overflow.
        assert rows == [16, 16, 16 if dtype == torch.float32 else 128]
