"""Forms whose result for a row is its own: tiles that are found to sum alike, rows at any place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import linear_cpu, rows_cpu
from engine.kernels.fixed import FixedProduct, FixedRows
from engine.kernels.router_cpu import router
from engine.kernels.rows import NormWeight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


class Recorded:
    """A product that sums in another order for each of some numbers of rows."""

    def __init__(self, weight_OI: Tensor, odd: set[int], by_place: bool = False) -> None:
        self._weight_OI = weight_OI.double()
        self._odd, self._by_place = odd, by_place
        self.rows: list[int] = []

    def __call__(self, x_TI: Tensor) -> Tensor:
        self.rows.append(len(x_TI))
        found = x_TI.double() @ self._weight_OI.T
        if len(x_TI) in self._odd:
            found += 1e-3
        if self._by_place:
            found += 1e-3 * torch.arange(len(x_TI))[:, None]
        return found.float()


def test_tiles_are_those_that_sum_like_sixteen_rows() -> None:
    weight_OI = random(7, 24)
    product = Recorded(weight_OI, {1, 2, 8, 64})
    fixed = FixedProduct(product, weight_OI)
    assert fixed.tiles == (4, 16, 32, 128)
    for rows, tiles in ((1, [4]), (5, [16]), (16, [16]), (33, [32, 4]), (200, [128, 32, 32, 16])):
        product.rows.clear()
        x_TI = random(rows, 24)
        torch.testing.assert_close(fixed(x_TI), F.linear(x_TI, weight_OI))
        assert product.rows == tiles, rows


def test_rows_go_one_by_one_where_a_place_in_a_tile_matters() -> None:
    weight_OI = random(9, 24)
    product = Recorded(weight_OI, set(), by_place=True)
    fixed = FixedProduct(product, weight_OI)
    assert fixed.tiles == (1,)
    x_TI = random(5, 24)
    torch.testing.assert_close(fixed(x_TI), F.linear(x_TI, weight_OI))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_products_row_is_its_own(dtype: torch.dtype) -> None:
    product = linear_cpu.product(random(200, 300, dtype=dtype), deterministic=True)
    x_TI = random(301, 300, dtype=dtype)
    expected_TO = torch.cat([product(row_I[None]) for row_I in x_TI])
    for rows in (2, 3, 15, 16, 17, 31, 64, 100, 301):
        for begin in (0, 1, 7):
            part = slice(begin, begin + rows)
            assert torch.equal(product(x_TI[part]), expected_TO[part]), (rows, begin)
    assert product(x_TI[:0]).shape == (0, 200)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_routers_scores_are_a_rows_own(dtype: torch.dtype) -> None:
    weight_ED = random(11, 83)
    scores = router(weight_ED, dtype, deterministic=True)
    x_TD = random(150, 83, dtype=dtype)
    expected_TE = torch.cat([scores(row_D[None]) for row_D in x_TD])
    assert torch.equal(scores(x_TD), expected_TE)
    assert torch.equal(scores(x_TD[3:20]), expected_TE[3:20])
    usual_TE = router(weight_ED, dtype)(x_TD)
    torch.testing.assert_close(expected_TE, usual_TE, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_done_to_a_row_is_its_own(dtype: torch.dtype) -> None:
    rows, usual = FixedRows(dtype), rows_cpu.rows(dtype)
    x_TD, wide = random(700, 83), random(700, 2 * 83, dtype=dtype)
    weight = NormWeight(1 + 0.1 * random(83), 1e-6)
    scores_TE = random(700, 9)

    def compare(form: Callable[[slice], Tensor], wanted: Tensor) -> None:
        whole = form(slice(700))
        torch.testing.assert_close(whole, wanted)
        for part in (slice(1), slice(3, 4), slice(5, 22), slice(699)):
            assert torch.equal(form(part), whole[part])

    compare(
        lambda part: rows.norm(x_TD[part].clone(), None, weight),
        usual.norm(x_TD.clone(), None, weight),
    )
    compare(lambda part: rows.gated(wide[part]), usual.gated(wide))
    compare(
        lambda part: rows.choose(scores_TE[part].clone(), 3, True)[0],
        usual.choose(scores_TE.clone(), 3, True)[0],
    )
