"""Runs prompts on two ranks of a thread each that split the model, beside one rank of two."""

import sys
from collections.abc import Callable

from bench import checkpoints
from bench.prefills import ring
from bench.prefills.figures import layout_rows
from bench.prefills.ring_pair import Pair
from bench.prefills.settings import Settings
from bench.prefills.works import BLOCK_SIZE, WARM_UP, Work, blocks, prompts
from bench.report import Row
from bench.sides.process import Bystanders, Side
from engine.config import load_config
from service.threads import thread_env

# By name: the mode of the side, and into how many chunks at least a prompt is cut.
KINDS = {"tp 2": ("tp", 1), "tp 2 by rows": ("tp by rows", 1), "pp 2": ("pp", 4)}


def speeds(settings: Settings, say: Callable[[str], None]) -> list[Row]:
    """Measure prompts in each layout; raises SideFailed."""
    lengths = [tokens for tokens in settings.layout_tokens if settings.wants(_name(tokens))]
    if not lengths:
        return []
    folder = checkpoints.kept(settings.checkpoints, checkpoints.DENSE)
    vocab_size = load_config(folder).vocab_size
    works = [*(Work(tokens=tokens, count=1) for tokens in lengths), WARM_UP]
    command = [sys.executable, "-m", "bench.prefills.ours_side"]
    rows: list[Row] = []
    with (
        Pair(folder, max(work.tokens for work in works)) as pair,
        Side("one rank", command, thread_env(ring.RANKS)) as one_rank,
    ):
        room = blocks(works, BLOCK_SIZE)
        one_rank.ask("open", model=str(folder), num_blocks=room, budget=settings.budget)
        for tokens in lengths:
            others = Bystanders([*pair.sides, one_rank])
            found: dict[str, list[float]] = {name: [] for name in (*KINDS, "one rank")}
            for number in range(settings.rounds_of(tokens) + 1):
                made = prompts(Work(tokens=tokens, count=1), vocab_size, number)
                seconds = _round(pair, one_rank, made, settings.budget)
                if number:  # the first is a warm-up
                    for name, each in seconds.items():
                        found[name].append(each)
            rows += layout_rows(_name(tokens), tokens, found)
            say(f"measured {_name(tokens)}; {others}")
    return rows


def _round(pair: Pair, one_rank: Side, made: list[list[int]], most: int) -> dict[str, float]:
    seconds = {}
    for name, (mode, chunks) in KINDS.items():
        budget = min(most, -(-len(made[0]) // chunks))
        said = pair.ask("run", mode=mode, start=0, token_ids=made[0], budget=budget)
        seconds[name] = said[0]["seconds"]
    seconds["one rank"] = one_rank.ask("run", prompts=made)["seconds"]
    return seconds


def _name(tokens: int) -> str:
    return f"layout, {tokens:,} tokens"
