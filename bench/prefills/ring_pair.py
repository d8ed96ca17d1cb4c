"""Runs prompts on two context-parallel ranks of a thread each, beside one rank of two threads."""

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench import checkpoints
from bench.prefills import ring
from bench.prefills.figures import RingRounds, crossing_row, variant_rows
from bench.prefills.settings import Settings
from bench.prefills.works import BLOCK_SIZE, WARM_UP, Work, blocks, passes, prompts
from bench.report import Row
from bench.sides import servers
from bench.sides.process import Bystanders, Side
from engine.config import ModelConfig, load_config
from service.threads import thread_env

Say = Callable[[str], None]

MODES = ("pass-kv", "pass-q")


class Pair:
    """Two ranks that are asked the same; a context manager that ends them."""

    def __init__(self, folder: Path, tokens: int) -> None:
        """Start both, with room for a prompt of `tokens`; raises SideFailed."""
        with ExitStack() as stack:
            command = [sys.executable, "-m", "bench.prefills.ring_side"]
            self.sides = [
                stack.enter_context(Side(f"rank {rank}", command, thread_env(1)))
                for rank in range(ring.RANKS)
            ]
            opened = {"model": str(folder), "port": servers.free_port(), "tokens": tokens}
            _together(self.sides, "open", [{**opened, "rank": rank} for rank in range(ring.RANKS)])
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Let both do the same at once; returns their answers, the first rank's first."""
        return _together(self.sides, do, [arguments] * len(self.sides))


def _together(
    sides: Sequence[Side], do: str, arguments: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    for side, each in zip(sides, arguments, strict=True):
        side.tell(do, **each)
    answers = [side.hear() for side in sides]
    # Not before: one may need the other until it has answered.
    for side in sides:
        side.rest()
    return answers


def speeds(settings: Settings, say: Say) -> list[Row]:
    """Measure prompts on two ranks, bytes and waits, beside one rank; raises SideFailed."""
    works = [
        Work(tokens=tokens, count=1)
        for tokens in settings.ring_tokens
        if settings.wants(_name(tokens))
    ]
    if not works:
        return []
    folder = checkpoints.kept(settings.checkpoints, checkpoints.DENSE)
    config = load_config(folder)
    all_works = [*works, WARM_UP]
    command = [sys.executable, "-m", "bench.prefills.ours_side"]
    rows: list[Row] = []
    with (
        Pair(folder, max(work.tokens for work in all_works)) as pair,
        Side("one rank", command, thread_env(ring.RANKS)) as one_rank,
    ):
        room = blocks(all_works, BLOCK_SIZE)
        one_rank.ask("open", model=str(folder), num_blocks=room, budget=settings.budget)
        for work in works:
            others = Bystanders([*pair.sides, one_rank])
            rows += _speed(work, config, pair, one_rank, settings).rows()
            say(f"measured {_name(work.tokens)}; {others}")
    return rows


def variants(settings: Settings, say: Say) -> list[Row]:
    """Measure pass-KV and pass-Q after a cached prefix, and where they cross; raises SideFailed."""
    cached = settings.ring_cached
    name = f"ring, after {cached:,} cached"
    if not settings.wants(name):
        return []
    folder = checkpoints.kept(settings.checkpoints, checkpoints.DENSE)
    config = load_config(folder)
    most = max(settings.ring_new)
    seconds: dict[str, dict[int, list[float]]] = {mode: {} for mode in MODES}
    [prefix] = prompts(Work(tokens=cached, count=1), config.vocab_size, 0)
    with Pair(folder, cached + most) as pair:
        others = Bystanders(pair.sides)
        for mode in MODES:
            pair.ask("run", mode=mode, start=0, token_ids=prefix, budget=settings.budget)
        for new in settings.ring_new:
            for number in range(settings.rounds + 1):
                [token_ids] = prompts(Work(tokens=new, count=1), config.vocab_size, number)
                for mode in MODES:
                    said = pair.ask(
                        "run", mode=mode, start=cached, token_ids=token_ids, budget=most
                    )
                    kept = seconds[mode].setdefault(new, [])
                    if number:  # the first is a warm-up
                        kept.append(said[0]["seconds"])
        say(f"measured {name}; {others}")
    kv_s, q_s = (seconds[mode] for mode in MODES)
    measured = ring.measured_crossing(_medians(kv_s), _medians(q_s))
    if measured is None:
        say(f"{name}: pass-Q is the faster one up to {most:,} new tokens")
    chosen = ring.chosen_crossing(config, cached, most)
    return [*variant_rows(name, kv_s, q_s), *crossing_row(name, measured, chosen)]


def _speed(
    work: Work, config: ModelConfig, pair: Pair, one_rank: Side, settings: Settings
) -> RingRounds:
    chunks = [span for one in passes(work, ring.RANKS * settings.budget) for span in one]
    found = RingRounds(
        name=_name(work.tokens),
        tokens=work.tokens,
        expected_bytes=ring.expected_bytes(config, chunks),
    )
    asked = {"mode": "auto", "start": 0, "budget": ring.RANKS * settings.budget}
    warm_up = prompts(WARM_UP if work.is_long else work, config.vocab_size, 0)
    pair.ask("run", token_ids=warm_up[0], **asked)
    one_rank.ask("run", prompts=warm_up)
    for number in range(1, settings.rounds_of(work.tokens) + 1):
        made = prompts(work, config.vocab_size, number)
        said = pair.ask("run", token_ids=made[0], **asked)
        found.ring_s.append(said[0]["seconds"])
        found.waited_s.append(statistics.mean(each["waited"] for each in said))
        found.sent_bytes.append(sum(each["sent"] for each in said))
        alone = pair.ask("repeat")
        found.alone_s.append(statistics.mean(each["seconds"] for each in alone))
        found.one_rank_s.append(one_rank.ask("run", prompts=made)["seconds"])
    return found


def _name(tokens: int) -> str:
    return f"ring, {tokens:,} tokens"


def _medians(seconds: dict[int, list[float]]) -> dict[int, float]:
    return {new: statistics.median(each) for new, each in seconds.items()}
