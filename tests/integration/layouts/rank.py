"""One rank of a split model: runs the passes it is told to, and keeps the logits."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from service.threads import thread_env

os.environ.update(thread_env(1))  # before torch: its threads are made when it is imported

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from engine.collectives import GroupCollectives
from engine.config import load_config
from engine.parallel import Collectives, Layout
from engine.ring import GroupComm, Wire
from engine.runner import Chunk, ModelRunner

BLOCK_SIZE = 16
LENGTHS = (1, 7, 64, 101, 203)


def passes(vocab_size: int, block_tokens: int, ranks: int) -> Iterator[list[Chunk]]:
    """Prompts of mixed lengths in two parts, then three tokens more of each.

    They begin at different ones of `ranks` cp ranks.
    """
    random = torch.Generator().manual_seed(5)
    blocks, sequences = 0, []
    for length in LENGTHS:
        count = -(-(length + 3) // block_tokens)
        tokens = torch.randint(vocab_size, (length + 3,), generator=random).tolist()
        sequences.append((length, tokens, list(range(blocks, blocks + count)), length % ranks))
        blocks += count

    def step(cuts: list[tuple[int, int]]) -> list[Chunk]:
        return [
            Chunk(token_ids=tokens[begin:end], start=begin, block_table=table, cp_first=first)
            for (begin, end), (_, tokens, table, first) in zip(cuts, sequences, strict=True)
            if end > begin
        ]

    yield step([(0, (length + 1) // 2) for length, *_ in sequences])
    yield step([((length + 1) // 2, length) for length, *_ in sequences])
    for more in range(3):
        yield step([(length + more, length + more + 1) for length, *_ in sequences])


def logits(
    folder: Path,
    layout: Layout,
    dtype: str,
    ranks: Collectives | None = None,
    ring: Wire | None = None,
    mode: str = "auto",
) -> torch.Tensor:
    """Return the logits after each chunk of every pass, [S, V]."""
    config = load_config(folder)
    runner = ModelRunner(
        folder=folder,
        config=config,
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
        num_blocks=32,
        block_size=BLOCK_SIZE,
        layout=layout,
        ranks=ranks,
        ring=ring,
        ring_mode=mode,
    )
    runner.warm_up()
    made = passes(config.vocab_size, runner.block_tokens, layout.cp)
    return torch.cat([runner.forward(chunks) for chunks in made])


def main() -> None:
    """Take part in every case: {name, model, tp, cp, grain, mode, dtype}; write the logits."""
    rank, world, port = (int(text) for text in sys.argv[1:4])
    cases, out = json.loads(sys.argv[4]), Path(sys.argv[5])
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    for case in cases:
        tp, cp = case["tp"], case["cp"]
        of_tp = [dist.new_group([c * tp + t for t in range(tp)]) for c in range(cp)]
        of_cp = [dist.new_group([c * tp + t for c in range(cp)]) for t in range(tp)]
        if rank >= tp * cp:
            continue
        cp_rank, tp_rank = divmod(rank, tp)
        layout = Layout(tp=tp, tp_rank=tp_rank, cp=cp, cp_rank=cp_rank, cp_grain=case["grain"])
        found = logits(
            Path(case["model"]),
            layout,
            case["dtype"],
            GroupCollectives(of_tp[cp_rank]),
            Wire(GroupComm(of_cp[tp_rank], timeout_s=30)),
            case["mode"],
        )
        save_file({"logits": found}, out / f"{case['name']}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
