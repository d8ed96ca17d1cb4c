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
    run = experts_cpu._native()
    if run is None:
        pytest.skip("there is no C++ compiler, or no AVX512-BF16")
    return experts_cpu.NativeExperts(run, gate_up, down)


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


def test_odd_sizes_and_fp32_are_left_to_products() -> None:
    for gate_up, down in (weights(2, 5, 4), weights(2, 4, 5), map(Tensor.float, weights(2, 4, 4))):
        assert isinstance(experts_cpu.experts(gate_up, down), ProductExperts)


def _alone(routes: Routes, token: int, experts: int) -> Routes:
    chosen = routes.experts_TK[token]
    places = chosen.argsort().argsort()
    return Routes(
        weights_TK=routes.weights_TK[token : token + 1],
        experts_TK=chosen[None],
        tokens_P=torch.zeros_like(chosen),
        place_TK=places[None],
        loads=chosen.bincount(minlength=experts).tolist(),
    )
