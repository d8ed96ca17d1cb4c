"""How Triton runs here: compiled for a GPU, or step by step on the CPU. Owns no kernel."""

import torch
import triton
from torch import Tensor

# Read when a kernel is defined, so it holds for the process.
INTERPRETED: bool = triton.knobs.runtime.interpret
# What a tile's operands may take of the 227 KiB that a multiprocessor of a Hopper GPU gives; the
# rest is for what Triton itself puts there.
SHARED_BYTES = 220 * 1024
_SMALLEST_DOT = 16
_MOST_GRID = 65535  # of the second and third axis


def padded(size: int) -> int:
    """Return the power of two that a tile has for so many elements."""
    power: int = triton.next_power_of_2(size)
    return power


def most_of(dtype: torch.dtype) -> int:
    """Return how many rows, and how many keys, a tile of this type may have.

    fp32 is multiplied exactly, which matrix units do not do: operands lie in registers, and of
    larger tiles they would not.
    """
    return _SMALLEST_DOT if dtype == torch.float32 else _MOST_GRID


def paged_buffers(stages: int) -> int:
    """Return how many tiles of a paged cache lie in shared memory when a loop has so many stages.

    Half of them are for the table's entries, which say where the tiles are.
    """
    return max(2, (stages + 1) // 2)


def padded_rows(rows: int) -> int:
    """Return how many rows a tile has for so many in a matrix product."""
    return max(_SMALLEST_DOT, padded(rows))


def check_rows(*tensors: Tensor) -> None:
    """Raise ValueError unless the elements of each last dimension lie side by side."""
    for tensor in tensors:
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"the last dimension of {tuple(tensor.shape)} has the stride {tensor.stride(-1)}; "
                "kernels need 1: make the tensor contiguous"
            )


def check_heads(q_TNH: Tensor, kv_heads: int, size: int) -> None:
    """Raise ValueError unless as many query heads share each KV head, all of one size."""
    heads, q_size = q_TNH.shape[1:]
    if heads % kv_heads or q_size != size:
        raise ValueError(
            f"{heads} query heads of {q_size} elements for {kv_heads} KV heads of {size}: "
            "each KV head must serve as many query heads, and sizes must be alike"
        )


def check_grid(size: int, what: str) -> None:
    """Raise ValueError for more than a launch can have beside its first axis."""
    if size > _MOST_GRID:
        raise ValueError(f"{size} {what} in one launch; there can be {_MOST_GRID}: split the call")


def multiprocessors(device: torch.device) -> int:
    """Return how many programs a device runs at the same time, roughly."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
