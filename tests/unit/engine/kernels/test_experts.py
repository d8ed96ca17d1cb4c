"""A layer's experts, compiled and as products, against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import experts_cpu, linear_cpu
from engine.kernels.experts import Experts, ProductExperts
from engine.kernels.rows import Routes, TorchRows

BF16 = torch.bfloat16
Make = Callable[[Tensor, Tensor], Experts]


def native(gate_up: Tensor, down: Tensor) -> Experts:
    foreign = experts_cpu._native()
    if foreign is None:
        pytest.skip("there is no C++ compiler, or no AVX512-BF16")
    return experts_cpu.NativeExperts(foreign, gate_up, down)


def by_products(gate_up: Tensor, down: Tensor) -> Experts:
    return ProductExperts(gate_up, down, linear_cpu.product, TorchRows(gate_up.dtype))


def weights(experts: int, hidden: int, inner: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5
    return gate_up.to(BF16), down.to(BF16)


def tokens_and_routes(tokens: int, experts: int, hidden: int, top_k: int) -> tuple[Tensor, Routes]:
    """Return rows, and routes that load some experts much and others with nothing."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(tokens, hidden, generator=generator).to(BF16)
    logits_TE = torch.randn(tokens, experts, generator=generator)
    logits_TE += 3 * torch.linspace(-1, 1, experts)
    return x_TD, TorchRows(BF16).route(logits_TE, top_k, True)


def exactly(x_TD: Tensor, routes: Routes, gate_up: Tensor, down: Tensor) -> Tensor:
    sum_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    choices = zip(routes.experts_TK.tolist(), routes.weights_TK.tolist(), strict=True)
    for t, (chosen, shares) in enumerate(choices):
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = (gate_up[expert].double() @ x_TD[t].double()).chunk(2)
            sum_TD[t] += share * (down[expert].double() @ (F.silu(gate) * up))
    return sum_TD


SHAPES = [
    # tokens, experts, hidden, inner, top_k
    (1, 1, 2, 2, 1),
    (1, 8, 64, 32, 2),
    (7, 5, 40, 24, 3),
    (130, 3, 66, 34, 1),
    (300, 4, 128, 64, 4),
]


# Products round gate, up and their silu on the way, and so twice as much.
@pytest.mark.parametrize(("make", "share"), [(native, 0.004), (by_products, 0.008)])
@pytest.mark.parametrize(("tokens", "experts", "hidden", "inner", "top_k"), SHAPES)
def test_experts_are_as_near_to_exact_as_bf16_lets_them(
    make: Make, share: float, tokens: int, experts: int, hidden: int, inner: int, top_k: int
) -> None:
    gate_up, down = weights(experts, hidden, inner)
    x_TD, routes = tokens_and_routes(tokens, experts, hidden, top_k)
    exact_TD = exactly(x_TD, routes, gate_up, down)
    found_TD = make(gate_up, down)(x_TD, routes)
    assert found_TD.dtype == torch.float32
    error = (found_TD - exact_TD).square().mean().sqrt()
    assert error <= share * exact_TD.square().mean().sqrt()


def test_a_token_gets_the_same_whatever_is_beside_it_and_on_any_number_of_threads() -> None:
    gate_up, down = weights(6, 128, 64)
    experts = native(gate_up, down)
    x_TD, routes = tokens_and_routes(400, 6, 128, 2)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(experts(x_TD, routes))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    one_x, one_routes = x_TD[9:10], _alone(routes, 9, 6)
    assert torch.equal(experts(one_x, one_routes), found[0][9:10])


def pairs_of(routes: Routes) -> tuple[Tensor, Tensor]:
    """Return all pairs in a disorder, some of them without an expert: tokens and experts."""
    top_k = routes.experts_TK.shape[1]
    tokens_P = torch.arange(len(routes.experts_TK)).repeat_interleave(top_k)
    order_P = torch.randperm(len(tokens_P), generator=torch.Generator().manual_seed(2))
    experts_P = routes.experts_TK.flatten()[order_P].clone()
    experts_P[::5] = -1
    return tokens_P[order_P], experts_P


@pytest.mark.parametrize(("make", "share"), [(native, 0.004), (by_products, 0.008)])
@pytest.mark.parametrize(("tokens", "experts", "hidden", "inner", "top_k"), SHAPES)
def test_pairs_are_as_near_to_exact_and_zero_without_an_expert(
    make: Make, share: float, tokens: int, experts: int, hidden: int, inner: int, top_k: int
) -> None:
    gate_up, down = weights(experts, hidden, inner)
    x_TD, routes = tokens_and_routes(tokens, experts, hidden, top_k)
    tokens_P, experts_P = pairs_of(routes)
    found_PD = make(gate_up, down).pairs(x_TD, tokens_P, experts_P)
    exact_PD = torch.zeros(found_PD.shape, dtype=torch.float64)
    for pair, (token, expert) in enumerate(zip(tokens_P, experts_P, strict=True)):
        if expert >= 0:
            gate, up = (gate_up[expert].double() @ x_TD[token].double()).chunk(2)
            exact_PD[pair] = down[expert].double() @ (F.silu(gate) * up)
    assert not found_PD[experts_P < 0].any()
    error = (found_PD - exact_PD).square().mean().sqrt()
    # One rounding more than the weighted sum's: of the output itself.
    assert error <= 1.5 * share * exact_PD.square().mean().sqrt()


def test_a_pair_gets_the_same_whatever_is_beside_it_and_what_a_whole_layer_gives() -> None:
    gate_up, down = weights(6, 128, 64)
    experts = native(gate_up, down)
    x_TD, routes = tokens_and_routes(300, 6, 128, 2)
    tokens_P, experts_P = pairs_of(routes)
    found_PD = experts.pairs(x_TD, tokens_P, experts_P)
    for pair in (1, 77, 403):
        one = slice(pair, pair + 1)
        assert torch.equal(experts.pairs(x_TD, tokens_P[one], experts_P[one]), found_PD[one])
    first = routes.experts_TK[:, 0].contiguous()
    only = TorchRows(BF16).route(F.one_hot(first, 6).float(), 1, True)
    whole_TD = experts(x_TD, only)
    assert torch.equal(experts.pairs(x_TD, torch.arange(300), first).float(), whole_TD)


def test_an_expert_that_is_not_there_is_refused() -> None:
    for wrong in (3, -2):
        with pytest.raises(IndexError, match="1 pairs name an expert that is none of the 3"):
            native(*weights(3, 64, 32)).pairs(
                torch.ones(1, 64, dtype=BF16), torch.tensor([0]), torch.tensor([wrong])
            )


@pytest.mark.parametrize("make", [native, by_products])
def test_no_pairs_are_no_outputs(make: Make) -> None:
    none = torch.empty(0, dtype=torch.int64)
    experts = make(*weights(3, 64, 32))
    assert experts.pairs(torch.empty(0, 64, dtype=BF16), none, none).shape == (0, 64)
    x_TD, nobody = torch.ones(2, 64, dtype=BF16), torch.tensor([-1, -1])
    assert not experts.pairs(x_TD, torch.tensor([0, 1]), nobody).any()


@pytest.mark.parametrize("make", [native, by_products])
def test_an_expert_that_was_put_is_as_if_it_had_been_there(make: Make) -> None:
    gate_up, down = weights(4, 64, 48)
    x_TD, routes = tokens_and_routes(5, 3, 64, 2)
    experts = make(gate_up[:3].clone(), down[:3].clone())
    experts.stage(gate_up[3], down[3])(1)
    chosen = [0, 3, 2]
    other = make(gate_up[chosen], down[chosen])
    assert torch.equal(experts(x_TD, routes), other(x_TD, routes))
    tokens_P, experts_P = pairs_of(routes)
    found, wanted = (each.pairs(x_TD, tokens_P, experts_P) for each in (experts, other))
    assert torch.equal(found, wanted)


def test_odd_sizes_and_fp32_are_left_to_products() -> None:
    for gate_up, down in (weights(2, 5, 4), weights(2, 4, 5), map(Tensor.float, weights(2, 4, 4))):
        assert isinstance(experts_cpu.experts(gate_up, down), ProductExperts)


def _alone(routes: Routes, token: int, experts: int) -> Routes:
    one = slice(token, token + 1)
    return Routes(routes.weights_TK[one], routes.experts_TK[one], experts)
