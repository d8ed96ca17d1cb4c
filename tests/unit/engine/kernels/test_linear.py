"""Compiled products against float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.kernels import linear_cpu
from engine.kernels.linear_cpu import NativeProduct


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def native(weight_OI: Tensor) -> NativeProduct:
    run = linear_cpu._native()
    if run is None:
        pytest.skip("there is no C++ compiler, or no AVX512-BF16")
    return NativeProduct(run, weight_OI)


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16()


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 16, 95, 97, 300])
@pytest.mark.parametrize(("outputs", "inner"), [(64, 2), (1, 64), (200, 66), (130, 512)])
def test_it_is_the_exact_product_rounded(rows: int, outputs: int, inner: int) -> None:
    weight_OI, x_TI = random(outputs, inner), random(rows, inner)
    exact_TO = x_TI.double() @ weight_OI.double().T
    # Half a unit of bf16 and what sums in fp32 lose.
    torch.testing.assert_close(
        native(weight_OI)(x_TI).double(), exact_TO, rtol=2**-8, atol=1e-4 * inner**0.5
    )


def test_rows_may_lie_apart() -> None:
    product, wide = native(random(70, 32)), random(9, 80)
    assert product(wide[::2, 10:42]).equal(product(wide[::2, 10:42].clone()))


def test_row_depends_neither_on_its_company_nor_on_threads(two_threads: None) -> None:
    product, x_TI = native(random(1000, 300)), random(200, 300)
    whole = product(x_TI)
    torch.set_num_threads(1)
    assert product(x_TI).equal(whole)
    for begin, end in ((0, 1), (1, 5), (90, 103), (199, 200)):
        assert product(x_TI[begin:end]).equal(whole[begin:end])


def test_no_rows_have_no_products() -> None:
    assert native(random(70, 32))(random(0, 32)).shape == (0, 70)


@pytest.mark.parametrize(
    "weight_OI",
    [torch.zeros(8, 7, dtype=torch.bfloat16), torch.zeros(8, 8), torch.zeros(8, 8).half()],
)
def test_other_weights_are_left_to_torch(weight_OI: Tensor) -> None:
    assert not isinstance(linear_cpu.product(weight_OI), NativeProduct)


def test_processor_with_amx_has_onednns_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cpu, "cpu_flags", lambda: frozenset(("amx_bf16",)))
    assert not isinstance(linear_cpu.product(random(8, 8)), NativeProduct)
