"""Compiles every kernel for a GPU that need not be there, as launches on small tensors ask for it.

A program of its own: Triton decides once in a process whether it interprets. Of kernels with tiles
each tile is compiled that a shape of bf16 may have, and must fit the GPU's shared memory.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

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
from engine.kernels.gpu.options import DecodeOptions, Units, causal
from engine.kernels.rows import NormWeight

HOPPER = GPUTarget("cuda", 90, 32)
BF16, SIZE = torch.bfloat16, 64
SHARED_MOST = 227 * 1024


class AbsentGPU:
    """What the compiler asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> set[str]:
    """Let launches compile and go no further; return the names of what was, as they come."""
    driver.set_active(AbsentGPU())
    launched, run = set(), JITFunction.run

    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        assert made.asm["cubin"]
        assert made.metadata.shared <= SHARED_MOST, f"{kernel.__name__} {options}: too much shared"
        launched.add(kernel.__name__)
        return made

    JITFunction.run = compiled
    return launched


def launch_rows() -> None:
    norm = NormWeight(torch.ones(6, SIZE), 1e-6)
    ours = rows.TritonRows(BF16)
    ours.norm(torch.ones(2, SIZE), torch.ones(2, SIZE, dtype=BF16), NormWeight(torch.ones(64), 0.1))
    ours.gated(torch.ones(2, 128, dtype=BF16))
    angles = torch.ones(2, 1, SIZE)
    qkv, cells = torch.ones(2, 8, SIZE, dtype=BF16), torch.ones(64, SIZE, dtype=BF16)
    insert.rotate_insert(qkv, norm, angles, angles, cells, torch.zeros(2, 4, dtype=torch.int64))


def launch_attention() -> None:
    q, kv = torch.ones(2, 8, SIZE, dtype=BF16), torch.ones(9, 2, 16, SIZE, dtype=BF16)
    tables, lengths = torch.zeros(2, 9, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    options = DecodeOptions(window=90, soft_cap=5.0, split_tokens=64)
    decode.decode(q, kv, kv, tables, lengths, 140, options, with_lse=True)
    seen = causal(2, 100, 40, q.device)
    out, lse = block.block(q, kv, kv, seen, table_B=tables[0], soft_cap=5.0)
    block.block(q, kv[:, :, 0], kv[:, :, 0], causal(2, 9, 5, q.device))
    merge.merge(out, lse, out, lse)
    cells, wide = torch.ones(9, 64, 576, dtype=BF16), torch.ones(2, 128, 576, dtype=BF16)
    latent.attend(wide, cells, 512, tables, lengths, 140, split_tokens=64, with_lse=True)


def launch_tiles() -> None:
    tables, lengths = torch.zeros(2, 9, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    for size in (64, 128, 256, 512):
        q, kv = torch.ones(2, 8, size, dtype=BF16), torch.ones(9, 2, 16, size, dtype=BF16)
        for tile in decode.choices(q, 2, 140).tiles:
            decode.decode(q, kv, kv, tables, lengths, 140, DecodeOptions(), tile=tile)
        seen = causal(2, 100, 40, q.device)
        for tile in block.choices(q, 2, 100).tiles:
            block.block(q, kv, kv, seen, table_B=tables[0], tile=tile)
    cells = torch.ones(9, 64, 576, dtype=BF16)
    for heads in (16, 128):
        q = torch.ones(2, heads, 576, dtype=BF16)
        for tile in latent.choices(q, 512, 140).tiles:
            latent.attend(q, cells, 512, tables, lengths, 140, tile=tile)
    for tokens in (2, 900):
        x, chosen = torch.ones(tokens, SIZE, dtype=BF16), torch.zeros(tokens, 2, dtype=torch.int64)
        gate_up, down = torch.ones(4, 64, SIZE, dtype=BF16), torch.ones(4, SIZE, 32, dtype=BF16)
        for tile in experts.choices_of(x, 4, 32, 2 * tokens).tiles:
            experts.experts(x, gate_up, down, chosen, torch.ones(tokens, 2), tile=tile)


def launch_draw() -> None:
    of_rows = torch.ones(2)
    numbers = of_rows.double()
    draw.draw(torch.ones(2, 5000), of_rows, of_rows.int(), of_rows, of_rows, numbers)


def launch_moves() -> None:
    cache, units = torch.ones(1, 2, 3, 2, 16, SIZE, dtype=BF16), torch.zeros(2, dtype=torch.int64)
    payload = torch.ones(1, 2, 2, 2, 8, SIZE, dtype=BF16)
    box = Units(units, units, slice(0, 2))
    pack.move(payload, cache, None, box, 8, 13)
    pack.move(cache, payload, box, None, 8, 13)
    pack.move(cache, cache.clone(), box, box, 8, 13)
    blocks.copy_blocks(cache, cache.clone(), range(1), units.int())


def launch_experts() -> None:
    x, chosen = torch.ones(3, SIZE, dtype=BF16), torch.zeros(3, 2, dtype=torch.int64)
    gate_up, down = torch.ones(4, 64, SIZE, dtype=BF16), torch.ones(4, SIZE, 32, dtype=BF16)
    experts.experts(x, gate_up, down, chosen, torch.ones(3, 2))
    experts.expert_pairs(x, gate_up, down, chosen[:, 0], chosen[:, 1])


if __name__ == "__main__":
    names = compile_only()
    launch_rows()
    launch_attention()
    launch_experts()
    launch_draw()
    launch_moves()
    launch_tiles()
    print(*sorted(names))
