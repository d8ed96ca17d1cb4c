"""Which kernels a device gets."""

import sys

import pytest
import torch

from engine.errors import UnsupportedError
from engine.kernels import row_kernels, table
from engine.kernels.gpu import decode_torch
from engine.kernels.table import PagedKernels, paged_kernels


def test_a_cpu_gets_torch_and_a_gpu_triton(gpu: PagedKernels) -> None:
    assert paged_kernels(torch.device("cpu")).decode is decode_torch.decode
    assert gpu.decode is not decode_torch.decode


def test_rows_on_a_gpu_are_by_triton(gpu: PagedKernels) -> None:
    found = row_kernels(torch.device("cuda"), torch.bfloat16)
    assert type(found) is type(gpu.rows(torch.bfloat16))


def test_deterministic_rows_on_a_gpu_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no deterministic kernels"):
        row_kernels(torch.device("cuda"), torch.bfloat16, deterministic=True)


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="device meta; there are: cpu, cuda"):
        paged_kernels(torch.device("meta"))


def test_without_triton_a_gpu_is_refused_and_a_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("engine.kernels.gpu.")]:
        monkeypatch.delitem(sys.modules, name)
    # `from package import module` finds what an earlier import left as the package's attribute.
    package = sys.modules["engine.kernels.gpu"]
    for name in (
        "block",
        "blocks",
        "decode",
        "draw",
        "experts",
        "insert",
        "latent",
        "merge",
        "pack",
        "rows",
    ):
        monkeypatch.delattr(package, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    table._by_triton.cache_clear()
    with pytest.raises(UnsupportedError, match="install the package triton"):
        paged_kernels(torch.device("cuda"))
    assert paged_kernels(torch.device("cpu"))


def test_every_kernel_has_a_tile_for_heads_of_every_size(gpu: PagedKernels) -> None:
    from engine.kernels.gpu import block, decode

    for size in (64, 80, 128, 192, 256, 512):
        for dtype in (torch.bfloat16, torch.float32):
            q = torch.empty(1, 8, size, dtype=dtype)
            assert decode.choices(q, 2, 1000).tiles
            assert block.choices(q, 2, 1000).tiles
