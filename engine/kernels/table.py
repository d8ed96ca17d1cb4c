"""What computes over the paged cache on which device: Triton's kernels on CUDA, torch on the CPU.

Owns the choice, which no model makes. Legend: as in engine.kernels.gpu's modules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from engine.errors import UnsupportedError
from engine.kernels.gpu import (
    block_torch,
    blocks_torch,
    decode_torch,
    draw_torch,
    experts_torch,
    insert_torch,
    latent_torch,
    merge_torch,
    pack_torch,
)
from engine.kernels.rows import RowKernels, TorchRows

Attended = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class PagedKernels:
    """What `x_torch` documents for each `x`; the same whatever the device, to within rounding."""

    rows: Callable[[torch.dtype], RowKernels]
    rotate_insert: Callable[..., None]
    decode: Callable[..., Attended]
    block: Callable[..., tuple[Tensor, Tensor]]
    merge: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    latent: Callable[..., Attended]
    experts: Callable[..., Tensor]
    expert_pairs: Callable[..., Tensor]
    draw: Callable[..., Tensor]
    move: Callable[..., None]
    copy_blocks: Callable[[Tensor, Tensor, range, Tensor], None]


def paged_kernels(device: torch.device) -> PagedKernels:
    """Return the kernels of a device; raises UnsupportedError where there are none."""
    if device.type not in _FORMS:
        known = ", ".join(_FORMS)
        raise UnsupportedError(f"no kernels for the device {device.type}; there are: {known}")
    return _FORMS[device.type]()


def _by_torch() -> PagedKernels:
    return PagedKernels(
        rows=TorchRows,
        rotate_insert=insert_torch.rotate_insert,
        decode=decode_torch.decode,
        block=block_torch.block,
        merge=merge_torch.merge,
        latent=latent_torch.attend,
        experts=experts_torch.experts,
        expert_pairs=experts_torch.expert_pairs,
        draw=draw_torch.draw,
        move=pack_torch.move,
        copy_blocks=blocks_torch.copy_blocks,
    )


@cache
def _by_triton() -> PagedKernels:
    # Only now: a machine without a GPU need not have Triton.
    try:
        from engine.kernels.gpu import (
            block,
            blocks,
            decode,
            draw,
            experts,
            insert,
            latent,
            merge,
            pack,
            rows,
        )
    except ImportError as exc:
        raise UnsupportedError(
            f"the kernels for GPUs need Triton, which cannot be imported ({exc}): "
            "install the package triton, 3.6 or newer"
        ) from exc
    return PagedKernels(
        rows=rows.TritonRows,
        rotate_insert=insert.rotate_insert,
        decode=decode.decode,
        block=block.block,
        merge=merge.merge,
        latent=latent.attend,
        experts=experts.experts,
        expert_pairs=experts.expert_pairs,
        draw=draw.draw,
        move=pack.move,
        copy_blocks=blocks.copy_blocks,
    )


_FORMS: Mapping[str, Callable[[], PagedKernels]] = {"cpu": _by_torch, "cuda": _by_triton}
