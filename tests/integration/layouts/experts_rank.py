"""One rank of a layout with experts or sequences of its own: keeps logits, and what it counted."""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from service.threads import thread_env

os.environ.update(thread_env(1))  # before torch: its threads are made when it is imported

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from engine.collectives import GroupCollectives, GroupExperts
from engine.config import load_config
from engine.dispatch import ExpertMap
from engine.expert_moves import Staged, stage, switch
from engine.parallel import Layout
from engine.pipeline import Logits
from engine.ring import GroupComm, Wire
from engine.runner import Chunk, ModelRunner
from engine.weights import Reader
from tests.integration.layouts.groups import TIMEOUT, Groups

BLOCK_SIZE = 16
# Sequences of each dp rank: (tokens of the prompt, passes it sits out before it begins).
SEQUENCES: Sequence[Sequence[tuple[int, int]]] = (
    ((5, 0), (33, 0), (1, 1)),
    ((18, 2), (7, 0)),
)
STEPS = 6
# Passes before which experts that move are read, and put in their new places.
MOVE_READ, MOVE = 1, 3


def passes(dp_rank: int, vocab_size: int) -> list[list[Chunk]]:
    """Return a dp rank's chunks of each pass: a prompt, then its tokens one by one.

    Rank 1 has none in some passes while rank 0 has some.
    """
    random = torch.Generator().manual_seed(dp_rank)
    found: list[list[Chunk]] = [[] for _ in range(STEPS)]
    for i, (length, late) in enumerate(SEQUENCES[dp_rank]):
        tokens = torch.randint(vocab_size, (length + STEPS,), generator=random).tolist()
        cuts = [0, *range(length, length + STEPS - late)]
        table = range(4 * i, 4 * i + 4)
        last = STEPS - 2 if dp_rank else STEPS  # the last two steps are rank 0's alone
        for step, (begin, end) in enumerate(pairwise(cuts), late):
            if step < last:
                chunk = Chunk(token_ids=tokens[begin:end], start=begin, block_table=table)
                found[step].append(chunk)
    return found


def tokens_of(chunks: Sequence[Chunk]) -> int:
    """Return the tokens of a pass."""
    return sum(len(chunk.token_ids) for chunk in chunks)


def make_runner(folder: Path, layout: Layout, dtype: str = "float32", **more: Any) -> ModelRunner:
    """Return one rank's runner."""
    return ModelRunner(
        folder=folder,
        config=load_config(folder),
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
        num_blocks=16,
        block_size=BLOCK_SIZE,
        layout=layout,
        **more,
    )


def logits(runner: ModelRunner, before: Callable[[int], None]) -> Tensor:
    """Return the logits after each chunk of this dp rank's passes, [S, V], or [0, V].

    `before` is called with each pass's number before it begins.
    """
    layout = runner.layout
    of_all = [passes(rank, runner.config.vocab_size) for rank in range(layout.dp)]
    under_way, found = deque[Logits](), []
    for step in range(STEPS):
        dp_tokens = [tokens_of(each[step]) for each in of_all]
        before(step)
        under_way.append(runner.start(of_all[layout.dp_rank][step], dp_tokens=dp_tokens))
        if len(under_way) == layout.pp:
            found.append(under_way.popleft().wait())
    return torch.cat(found + [each.wait() for each in under_way])


def _moving(case: dict[str, Any], runner: ModelRunner) -> Callable[[int], None]:
    """Return what moves experts in the middle of the passes, to where `case` says."""
    rank = runner.layout.ep_rank
    fill = Reader(Path(case["model"])).fill
    maps = {int(layer): _map(case, slots) for layer, slots in case.get("moves", {}).items()}
    staged: list[Staged] = []

    def before(step: int) -> None:
        if step == MOVE_READ:
            staged.extend(stage(runner.experts, rank, *each, fill) for each in maps.items())
        elif step == MOVE:
            for each in staged:
                switch(runner.experts, each)

    return before


def _map(case: dict[str, Any], slots: Sequence[Sequence[int]]) -> ExpertMap:
    return ExpertMap(case["experts"], tuple(map(tuple, slots)))


def _decode_counts(runner: ModelRunner) -> dict[str, list[int]]:
    """Return the calls and bytes of the last pass, one of single tokens, once more."""
    layout = runner.layout
    of_all = [passes(rank, runner.config.vocab_size)[3] for rank in range(layout.dp)]
    runner.tally.take()
    runner.forward(of_all[layout.dp_rank], dp_tokens=[tokens_of(each) for each in of_all])
    return {kind: [count.calls, count.bytes] for kind, count in runner.tally.take().items()}


def _run(case: dict[str, Any], rank: int, groups: Groups, out: Path) -> None:
    dp, pp, tp = (case.get(name, 1) for name in ("dp", "pp", "tp"))
    places = np.arange(dp * pp * tp).reshape(dp, pp, tp)
    everybody = groups.mine(rank, [places.flatten().tolist()])
    of_tp = groups.mine(rank, places.reshape(-1, tp).tolist())
    of_pp = groups.mine(rank, places.transpose(0, 2, 1).reshape(-1, pp).tolist())
    of_experts = groups.mine(rank, places.transpose(1, 0, 2).reshape(pp, -1).tolist())
    if rank >= places.size:
        return
    assert of_pp is not None
    dp_rank, pp_rank, tp_rank = (int(found) for [found] in np.nonzero(places == rank))
    layout = Layout(
        dp=dp,
        dp_rank=dp_rank,
        pp=pp,
        pp_rank=pp_rank,
        tp=tp,
        tp_rank=tp_rank,
        ep=case.get("ep", 1),
    )
    assert layout.rank == rank
    maps = {int(layer): _map(case, slots) for layer, slots in case.get("maps", {}).items()}
    runner = make_runner(
        Path(case["model"]),
        layout,
        case.get("dtype", "float32"),
        ranks=GroupCollectives(of_tp),
        experts=GroupExperts(of_experts),
        dispatch=case["dispatch"],
        expert_maps=maps,
        stages=Wire(GroupComm(of_pp, timeout_s=30)),
    )
    if case["dispatch"] == "auto":
        runner.warm_up()
    if case["dispatch"] == "auto":
        runner.experts.measure(4)
    runner.experts.take_loads()
    found = {"logits": logits(runner, _moving(case, runner))}
    loads = runner.experts.take_loads()
    found |= {f"loads.{layer}": load for layer, load in loads.items()}
    counts = _decode_counts(runner)
    table = runner.experts.dispatch.table if runner.experts.dispatch else {}
    (out / f"{case['name']}.{rank}.json").write_text(
        json.dumps({"counts": counts, "table": {str(k): v for k, v in table.items()}})
    )
    save_file(found, out / f"{case['name']}.{rank}")
    dist.barrier(everybody)  # a rank that ends earlier would take back what it has sent


def main() -> None:
    """Take part in every case: {name, model, dispatch, dp, pp, tp, ep, maps, ...}."""
    rank, world, port = (int(text) for text in sys.argv[1:4])
    cases, out = json.loads(Path(sys.argv[4]).read_text()), Path(sys.argv[5])
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )
    groups = Groups()
    for case in cases:
        _run(case, rank, groups, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
