"""The kernels under test, and where their tensors are."""

import pytest
import torch

from engine.errors import UnsupportedError
from engine.kernels.table import PagedKernels, paged_kernels


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one; else the CPU, where Triton interprets its kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> PagedKernels:
    try:
        found = paged_kernels(torch.device("cuda"))
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    from engine.kernels.gpu.runtime import INTERPRETED

    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("there is no GPU, and TRITON_INTERPRET=1 was not set before Triton was loaded")
    return found
