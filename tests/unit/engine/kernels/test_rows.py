"""What is done to rows, compiled and by torch, against float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from engine.kernels import rows_cpu
from engine.kernels.rows import NormWeight, RowKernels, TorchRows

EPS = 1e-6
# The unit of rounding to bf16, and then some for what was rounded on the way.
ONE_ROUNDING, TWO_ROUNDINGS = 2**-8, 2**-7


def native() -> RowKernels:
    made = rows_cpu.rows(torch.bfloat16)
    if not isinstance(made, rows_cpu.NativeRows):
        pytest.skip("there is no C++ compiler")
    return made


def by_torch() -> RowKernels:
    return TorchRows(torch.bfloat16)


forms = pytest.mark.parametrize("make", [native, by_torch])
Make = Callable[[], RowKernels]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scaled(weight: Tensor) -> NormWeight:
    return NormWeight(weight * weight.shape[-1] ** 0.5, EPS)


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def assert_near(found: Tensor, exact: Tensor, unit: float, scale: float = 1.0) -> None:
    torch.testing.assert_close(found.double(), exact, rtol=unit, atol=unit * 1e-3 * scale)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@forms
@pytest.mark.parametrize("more", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "size"), [(0, 8), (1, 1), (3, 7), (5, 64), (700, 1000)])
def test_norm_adds_in_place_and_normalises(
    make: Make, tokens: int, size: int, more: torch.dtype | None
) -> None:
    x_TD, weight_D = random(tokens, size), random(size, seed=1)
    more_TD = None if more is None else random(tokens, size, seed=2, dtype=more)
    sum_TD = x_TD if more_TD is None else x_TD + more_TD
    found_TD = make().norm(x_TD, more_TD, scaled(weight_D))
    assert found_TD.dtype == torch.bfloat16
    assert torch.equal(x_TD, sum_TD)
    assert_near(found_TD, normalised(sum_TD, weight_D), ONE_ROUNDING)


@forms
def test_norm_of_zeros_is_zero(make: Make) -> None:
    found_TD = make().norm(torch.zeros(2, 16), None, scaled(torch.ones(16)))
    assert not found_TD.any()


@pytest.mark.usefixtures("threads")
@forms
@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize(("tokens", "size"), [(0, 8), (1, 2), (5, 24), (300, 128)])
def test_heads_are_normalised_and_turned_and_others_left_alone(
    make: Make, tokens: int, size: int, normalises: bool
) -> None:
    heads, others = 5, 2
    whole = random(tokens, heads + others, size, dtype=torch.bfloat16)
    before, x_TMH = whole.clone(), whole[:, :heads]
    weight_MH, angle_T1H = random(heads, size, seed=1), random(tokens, 1, size // 2, seed=2)
    cos = angle_T1H.cos().repeat(1, 1, 2)
    sin = torch.cat((-angle_T1H.sin(), angle_T1H.sin()), -1)
    heads_TMH = before[:, :heads]
    if normalises:
        norm, exact = scaled(weight_MH), normalised(heads_TMH, weight_MH)
    else:
        norm, exact = NormWeight(weight_MH, None), heads_TMH.double() * weight_MH
    exact = exact * cos + exact.roll(size // 2, dims=-1) * sin
    make().norm_rotate(x_TMH, norm, cos, sin)
    assert_near(x_TMH, exact, ONE_ROUNDING)
    assert torch.equal(whole[:, heads:], before[:, heads:])


@pytest.mark.usefixtures("threads")
@forms
@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_heads_are_inserted_where_their_slots_are(make: Make, tokens: int) -> None:
    whole = random(tokens, 6, 64, dtype=torch.bfloat16)
    kv_TXH = whole[:, 2:]
    cells = torch.zeros(5000, 64, dtype=torch.bfloat16)
    slots = torch.randperm(5000, generator=torch.Generator().manual_seed(3))[: tokens * 4]
    expected = cells.clone()
    expected[slots] = kv_TXH.reshape(-1, 64)
    make().insert(cells, slots.view(tokens, 4), kv_TXH)
    assert torch.equal(cells, expected)


@forms
def test_a_slot_beyond_the_cells_is_refused(make: Make) -> None:
    memory = torch.zeros(9, 8, dtype=torch.bfloat16)
    slots_TX = torch.tensor([[1, 7]])
    with pytest.raises(IndexError):
        make().insert(memory[:7], slots_TX, random(1, 2, 8, dtype=torch.bfloat16))
    assert not memory[7:].any()


@pytest.mark.usefixtures("threads")
@forms
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 34), (2, 3, 50), (300, 1000)])
def test_gated_is_silu_of_gate_times_up(make: Make, shape: tuple[int, ...]) -> None:
    gate_up = random(*shape, dtype=torch.bfloat16) * 4
    gate, up = gate_up.double().chunk(2, -1)
    found = make().gated(gate_up)
    assert_near(found, gate / (1 + (-gate).exp()) * up, TWO_ROUNDINGS)


@forms
def test_gates_far_from_zero_are_open_or_shut(make: Make) -> None:
    gate_up = torch.tensor([[1e4, 100.0, -100.0, -1e4, 0.0, torch.nan] + 6 * [2.0]])
    found = make().gated(gate_up.bfloat16())[0]
    expected = torch.tensor([2e4, 200.0, 0.0, 0.0, 0.0, torch.nan])
    torch.testing.assert_close(
        found.float(), expected, rtol=ONE_ROUNDING, atol=1e-30, equal_nan=True
    )


@pytest.mark.usefixtures("threads")
@forms
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (1, 5, 5), (900, 160, 8)])
def test_routes_are_the_highest_scores_and_their_order(
    make: Make, tokens: int, experts: int, top_k: int, normalise: bool
) -> None:
    logits_TE = random(tokens, experts) * 3
    probs_TE = logits_TE.double().softmax(-1)
    exact_TK, experts_TK = probs_TE.topk(top_k, dim=-1)
    if normalise:
        exact_TK = exact_TK / exact_TK.sum(-1, keepdim=True)
    routes = make().route(logits_TE, top_k, normalise)
    assert torch.equal(routes.experts_TK, experts_TK)
    torch.testing.assert_close(routes.weights_TK.double(), exact_TK, rtol=1e-5, atol=0)
    assert routes.pairs.loads == experts_TK.flatten().bincount(minlength=experts).tolist()
    order_P = experts_TK.flatten().argsort(stable=True)
    assert torch.equal(routes.pairs.tokens_P, order_P // top_k)
    assert torch.equal(routes.pairs.place_TK.flatten()[order_P], torch.arange(tokens * top_k))


def test_routes_of_scores_that_are_no_numbers_stay_within_bounds() -> None:
    routes = native().route(torch.full((3, 4), torch.nan), 2, True)
    assert sum(routes.pairs.loads) == 6
    assert sorted(routes.pairs.place_TK.flatten().tolist()) == list(range(6))


def test_a_row_is_the_same_whatever_is_beside_it() -> None:
    rows = native()
    x_TD, more_TD = random(900, 200), random(900, 200, seed=1)
    norm = scaled(random(200, seed=2))
    all_TD = rows.norm(x_TD.clone(), more_TD, norm)
    one_TD = rows.norm(x_TD[7:8].clone(), more_TD[7:8], norm)
    assert torch.equal(one_TD, all_TD[7:8])
    gate_up = random(900, 400, dtype=torch.bfloat16)
    assert torch.equal(rows.gated(gate_up[7:8]), rows.gated(gate_up)[7:8])
    logits_TE = random(900, 160)
    one, every = (rows.route(x.clone(), 8, True) for x in (logits_TE[7:8], logits_TE))
    assert torch.equal(one.weights_TK, every.weights_TK[7:8])
