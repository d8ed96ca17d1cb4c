"""One rank of a split model: runs the passes it is told to, and keeps the logits."""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from service.threads import thread_env

os.environ.update(thread_env(1))  # before torch: its threads are made when it is imported

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import save_file

from engine.collectives import GroupCollectives
from engine.config import load_config
from engine.parallel import Collectives, Layout
from engine.pipeline import Logits
from engine.ring import GroupComm, Wire
from engine.runner import Chunk, ModelRunner
from tests.integration.layouts.groups import TIMEOUT, Groups

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
    stages: Wire | None = None,
    meet: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Return the logits after each chunk of every pass, [S, V].

    With several stages as many passes are under way at once.
    """
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
        stages=stages,
    )
    runner.warm_up()
    under_way, found = deque[Logits](), []
    for chunks in passes(config.vocab_size, runner.block_tokens, layout.cp):
        under_way.append(runner.start(chunks))
        if len(under_way) == layout.pp:
            found.append(under_way.popleft().wait())
    found += [each.wait() for each in under_way]
    meet()  # a rank that ends earlier would take back what it has sent
    return torch.cat(found)


def _lines(places: NDArray[np.int64], axis: int) -> list[list[int]]:
    """Return the ranks that differ in their place on one axis only, line by line."""
    lines: list[list[int]] = np.moveaxis(places, axis, -1).reshape(-1, places.shape[axis]).tolist()
    return lines


def main() -> None:
    """Take part in every case: {name, model, tp, cp, pp, ...}; write the logits."""
    rank, world, port = (int(text) for text in sys.argv[1:4])
    cases, out = json.loads(sys.argv[4]), Path(sys.argv[5])
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )
    groups = Groups()
    for case in cases:
        numbers = np.arange(case["pp"] * case["cp"] * case["tp"])
        places = numbers.reshape(case["pp"], case["cp"], case["tp"])
        everybody = groups.mine(rank, [numbers.tolist()])
        stages, ring, ranks = (groups.mine(rank, _lines(places, axis)) for axis in range(3))
        if rank >= places.size:
            continue
        assert stages is not None
        assert ring is not None
        pp_rank, cp_rank, tp_rank = (int(found) for [found] in np.nonzero(places == rank))
        found = logits(
            Path(case["model"]),
            Layout(
                pp=case["pp"],
                pp_rank=pp_rank,
                cp=case["cp"],
                cp_rank=cp_rank,
                cp_grain=case["grain"],
                tp=case["tp"],
                tp_rank=tp_rank,
                sequence_parallel=case["sp"],
            ),
            case["dtype"],
            GroupCollectives(ranks),
            Wire(GroupComm(ring, timeout_s=30)),
            case["mode"],
            Wire(GroupComm(stages, timeout_s=30)),
            partial(dist.barrier, everybody),
        )
        save_file({"logits": found}, out / f"{case['name']}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
