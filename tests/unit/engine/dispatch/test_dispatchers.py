"""Tokens to their experts and back, over random routings."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine.dispatch import DISPATCHERS, Choices, ExpertMap, Members
from engine.dispatch.padded import bucket_of
from engine.parallel import Layout
from tests.unit.engine.dispatch.loopback import on_ranks

EXPERTS, HIDDEN = 8, 12
LAYOUTS = [
    {"tp": 2},
    {"tp": 2, "ep": 2},
    {"tp": 4, "ep": 2},
    {"dp": 2, "ep": 2},
    {"dp": 2, "tp": 2, "ep": 1},
    {"dp": 2, "tp": 2, "ep": 2},
    {"dp": 2, "tp": 2, "ep": 4},
    {"dp": 4, "ep": 4},
]
REPLICATED = ((0, 1, 2, 3, 7), (4, 5, 6, 7, 0))


class Chosen:
    """A router that chooses at random, but the same for a dp rank's row wherever it is asked."""

    def __init__(self, members: Members, rows: int, top_k: int, seed: int, held: ExpertMap) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + members.layout.dp_rank)
        scores = torch.rand(rows, EXPERTS, generator=generator)
        scores[:, 3] += seed % 2  # everybody's favourite in some routings
        self.experts_TK = scores.topk(top_k).indices
        self.weights_TK = torch.rand(rows, top_k, generator=generator)
        self._tables = held.tables(torch.device("cpu"))
        self.counted = 0

    def __call__(self, x_TD: Tensor, first: int, counted: slice = slice(None)) -> Choices:
        rows = slice(first, first + len(x_TD))
        self.counted += len(range(len(x_TD))[counted])
        return Choices(
            slots_TK=self._tables.look_up(self.experts_TK[rows], first),
            weights_TK=self.weights_TK[rows],
            width=self._tables.width,
        )


def experts_of(members: Members, held: ExpertMap, matrices_EDD: Tensor) -> "Matrices":
    """Return this rank's experts: products with its part of their matrices' inner dimension."""
    part = members.layout.expert_inner_part(HIDDEN)
    return Matrices(matrices_EDD[list(held.slots[members.layout.ep_rank])][:, :, part], part)


class Matrices:
    def __init__(self, parts: Tensor, part: slice) -> None:
        self._parts = parts
        self._part = part

    def __call__(self, x_RD: Tensor, tokens_P: Tensor, slots_P: Tensor) -> Tensor:
        assert not x_RD[tokens_P][slots_P >= 0].isnan().any()
        y_PD = torch.zeros(len(tokens_P), HIDDEN)
        for pair, (token, slot) in enumerate(zip(tokens_P.tolist(), slots_P.tolist(), strict=True)):
            if slot >= 0:
                y_PD[pair] = self._parts[slot] @ x_RD[token, self._part].float()
        return y_PD.to(x_RD.dtype)


def run(
    dispatcher: str,
    layout: dict[str, int],
    rows: Sequence[int],
    matrices_EDD: Tensor,
    *,
    top_k: int = 3,
    seed: int = 0,
    slots: tuple[tuple[int, ...], ...] | None = None,
) -> list[tuple[Members, Tensor, Chosen, Tensor]]:
    """Return each rank's members, tokens, choices and what came back."""

    def on_rank(members: Members) -> tuple[Members, Tensor, Chosen, Tensor]:
        even = ExpertMap.even(EXPERTS, members.layout)
        held = even if slots is None else ExpertMap(EXPERTS, slots)
        own = rows[members.layout.dp_rank]
        generator = torch.Generator().manual_seed(50 + members.layout.dp_rank)
        x_TD = torch.randn(own, HIDDEN, generator=generator)
        router = Chosen(members, own, top_k, seed, held)
        experts = experts_of(members, held, matrices_EDD)
        found = DISPATCHERS[dispatcher](members)(x_TD, router, experts, max(rows))
        return members, x_TD, router, found

    return on_ranks(on_rank, **layout)


def rows_for(layout: dict[str, int], seed: int) -> list[int]:
    """Return how many tokens each dp rank has; in one routing the last one has none."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 8, (layout.get("dp", 1),), generator=random).tolist()
    if seed == 1 and len(rows) > 1:
        rows[-1] = 0
    return [int(each) for each in rows]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_there_and_back_through_identity_experts_is_the_identity(
    dispatcher: str, layout: dict[str, int], seed: int
) -> None:
    same = torch.eye(HIDDEN).expand(EXPERTS, -1, -1)
    for _, x_TD, router, found in run(dispatcher, layout, rows_for(layout, seed), same, seed=seed):
        total_T1 = router.weights_TK.sum(1, keepdim=True)
        torch.testing.assert_close(found, total_T1 * x_TD)


@pytest.mark.parametrize("slots", [None, REPLICATED])
@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each.get("ep") == 2], ids=str)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_every_token_goes_through_the_experts_that_it_chose(
    dispatcher: str, layout: dict[str, int], slots: tuple[tuple[int, ...], ...] | None
) -> None:
    matrices_EDD = torch.randn(EXPERTS, HIDDEN, HIDDEN)
    rows = rows_for(layout, 2)
    ran = run(dispatcher, layout, rows, matrices_EDD, slots=slots)
    for _, x_TD, router, found in ran:
        y_TKD = torch.einsum("tkde,te->tkd", matrices_EDD[router.experts_TK], x_TD)
        wanted_TD = (y_TKD * router.weights_TK[..., None]).sum(1)
        torch.testing.assert_close(found, wanted_TD, rtol=1e-5, atol=1e-5)
    assert sum(router.counted for _, _, router, _ in ran) == sum(rows)


@pytest.mark.parametrize("dispatcher", ["alltoall", "padded"])
def test_no_bit_depends_on_where_experts_are(dispatcher: str) -> None:
    matrices_EDD = torch.randn(EXPERTS, HIDDEN, HIDDEN)
    places = [None, ((6, 0, 3, 4), (2, 7, 1, 5)), REPLICATED]
    layout = {"dp": 2, "tp": 2, "ep": 2}
    even, *others = (
        [found for *_, found in run(dispatcher, layout, (5, 3), matrices_EDD, slots=slots)]
        for slots in places
    )
    assert len(others) == 2
    for other in others:
        assert all(map(torch.equal, even, other))


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_a_token_that_is_not_finite_spoils_no_other(dispatcher: str) -> None:
    def on_rank(members: Members) -> Tensor:
        held = ExpertMap.even(EXPERTS, members.layout)
        x_TD = torch.ones(3, HIDDEN)
        x_TD[1] = torch.inf
        router = Chosen(members, 3, 2, 0, held)

        def pairs(x_RD: Tensor, tokens_P: Tensor, slots_P: Tensor) -> Tensor:
            return x_RD[tokens_P].masked_fill(slots_P[:, None] < 0, 0)

        return DISPATCHERS[dispatcher](members)(x_TD, router, pairs, 3)

    for found in on_ranks(on_rank, dp=2, ep=2):
        assert found[[0, 2]].isfinite().all()


class Nowhere:
    """A group whose messages have shapes and no values."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rank = 0

    def all_to_all(
        self, x: Tensor, give: Sequence[int] | None = None, take: Sequence[int] | None = None
    ) -> Tensor:
        assert give is None
        assert take is None
        return torch.empty_like(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return x.new_empty(self.size * len(x), *x.shape[1:])

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x[: len(x) // self.size]

    def all_gather_rows(self, x: Tensor, rows: int) -> Tensor:
        return x.new_empty(rows, *x.shape[1:])


def on_no_device(dispatcher: str, dp: int) -> Tensor:
    """Run a dispatcher on tensors without values: whoever asks for one fails."""
    layout = Layout(dp=dp, tp=2, ep=2)
    group = Nowhere(2 * dp)
    members = Members(layout=layout, group=group, tp=group)  # type: ignore[arg-type]
    x_TD = torch.empty(5, HIDDEN, device="meta")

    def router(x_TD: Tensor, first: int, counted: slice = slice(None)) -> Choices:
        slots_TK = torch.empty(len(x_TD), 3, dtype=torch.int64, device="meta")
        return Choices(slots_TK=slots_TK, weights_TK=slots_TK.float(), width=4)

    def experts(x_RD: Tensor, tokens_P: Tensor, slots_P: Tensor) -> Tensor:
        assert tokens_P.shape == slots_P.shape
        return x_RD.new_empty(len(tokens_P), HIDDEN)

    return DISPATCHERS[dispatcher](members)(x_TD, router, experts, 7)


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("dispatcher", ["padded", "allgather"])
def test_the_host_asks_for_no_value(dispatcher: str, dp: int) -> None:
    assert on_no_device(dispatcher, dp).shape == (5, HIDDEN)


def test_the_packed_way_does_ask() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        on_no_device("alltoall", 2)


@pytest.mark.parametrize(("rows", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (8, 8), (9, 16)])
def test_a_bucket_is_the_least_power_of_two_that_is_enough(rows: int, bucket: int) -> None:
    assert bucket_of(rows) == bucket
