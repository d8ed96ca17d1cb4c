"""Runs whole prompts in every way, round by round, and what attention and products take alone."""

import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import checkpoints
from bench.prefills import limit
from bench.prefills.figures import Computed, Prompts, attention_row
from bench.prefills.settings import Settings
from bench.prefills.works import BLOCK_SIZE, WARM_UP, Work, blocks, passes, prompts
from bench.report import Row
from bench.sides import peers
from bench.sides.process import Bystanders, Side
from engine.config import ModelConfig, load_config
from service.threads import thread_env

Say = Callable[[str], None]

_VLLM_KV_GIB = 2


def of_model(model: str, settings: Settings, say: Say) -> list[Row]:
    """Measure one model's rows; raises SideFailed. `say` hears how it went."""
    works = [work for work in settings.works if settings.wants(f"{model}, {work.name}")]
    if not works:
        return []
    folder = checkpoints.kept(settings.checkpoints, model)
    rows: list[Row] = []
    with _limit_side(settings) as limits, ExitStack() as stack:
        ways = [stack.enter_context(side) for side in _ways(folder, works, settings)]
        turns = Turns(config=load_config(folder), limits=limits, ways=ways, settings=settings)
        for work in works:
            others = Bystanders([limits, *ways])
            measured = turns.measure(f"{model}, {work.name}", work, say)
            rows += measured.rows()
            say(f"measured {measured.name}; {others}")
    return rows


def of_served(model: str, settings: Settings, say: Say) -> list[Row]:
    """Measure one model's rows through whole systems, from client to client; raises SideFailed."""
    works = [
        work
        for work in settings.works
        if not work.is_long and settings.wants(f"{model}, {work.name}, served")
    ]
    if not works:
        return []
    folder = checkpoints.kept(settings.checkpoints, model)
    rows: list[Row] = []
    with _limit_side(settings) as limits, ExitStack() as stack:
        served = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoints.add_tokenizer(folder, served)
        ways = [stack.enter_context(side) for side in _served_ways(served, works, settings)]
        turns = Turns(config=load_config(folder), limits=limits, ways=ways, settings=settings)
        for work in works:
            measured = turns.measure(f"{model}, {work.name}, served", work, say)
            rows += measured.rows()
            say(f"measured {measured.name}")
    return rows


def of_attention(model: str, settings: Settings, say: Say) -> list[Row]:
    """Measure one layer's attention alone, ours and torch's in turn; raises SideFailed."""
    tokens = settings.attention_tokens
    name = f"{model}, attention at {tokens:,}"
    if not settings.wants(name):
        return []
    folder = checkpoints.kept(settings.checkpoints, model)
    config = load_config(folder)
    spans = [span for one in passes(Work(tokens=tokens, count=1), settings.budget) for span in one]
    needed = limit.attention(config, spans)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    limit_s: list[float] = []
    with _limit_side(settings) as side:
        others = Bystanders([side])
        asked = {"model": str(folder), "budget": settings.budget}
        for ours in seconds:
            side.ask("attention", ours=ours, tokens=min(tokens, WARM_UP.tokens), **asked)
        for _ in range(settings.rounds_of(tokens)):
            for ours, kept in seconds.items():
                kept.append(side.ask("attention", ours=ours, tokens=tokens, **asked)["seconds"])
            limit_s.append(_products_s(side, needed))
        say(f"measured {name}; {others}")
    flops, limit_median_s = limit.flops(needed), statistics.median(limit_s)
    return [attention_row(name, flops, limit_median_s, seconds[True], seconds[False])]


def _limit_side(settings: Settings) -> Side:
    command = [sys.executable, "-m", "bench.prefills.limit_side"]
    return Side("limit", command, thread_env(len(settings.cores)))


def _ways(folder: Path, works: Sequence[Work], settings: Settings) -> Iterator[Side]:
    """Start every way, ours first, each named by its version; for whoever takes it to end."""
    room, cores = [*works, WARM_UP], settings.cores
    python, model = sys.executable, str(folder)
    side = Side("ours", [python, "-m", "bench.prefills.ours_side"], thread_env(len(cores)))
    num_blocks = blocks(room, BLOCK_SIZE)
    yield side.open(model=model, num_blocks=num_blocks, budget=settings.budget)
    command = [python, "-m", "bench.prefills.transformers_side"]
    yield Side("transformers", command, peers.settings(cores)).open(model=model)
    if settings.vllm_python:
        side = peers.vllm(settings.vllm_python, cores, _VLLM_KV_GIB)
        yield side.open(model=model, max_model_len=max(work.tokens for work in room) + 1)


def _served_ways(folder: Path, works: Sequence[Work], settings: Settings) -> Iterator[Side]:
    """Start whole systems, ours first; for whoever takes them to end."""
    cores, model = settings.cores, str(folder)
    yield peers.served().open(model=model, threads=len(cores))
    if settings.vllm_python:
        side = peers.vllm_served(settings.vllm_python, cores, _VLLM_KV_GIB)
        yield side.open(model=model, max_model_len=max(work.tokens for work in works) + 1)


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Open sides of one model, ours first, that compute the same prompts one after another."""

    config: ModelConfig
    limits: Side
    ways: Sequence[Side]
    settings: Settings

    def measure(self, name: str, work: Work, say: Say) -> Prompts:
        """Run a work's rounds; raises SideFailed."""
        needed = limit.products(self.config, work, self.settings.budget)
        for side in self.ways:
            side.forget_peak()
            side.ask("run", prompts=self._prompts(WARM_UP if work.is_long else work, 0))
        said: list[list[dict[str, Any]]] = []
        limit_s: list[float] = []
        for number in range(1, self.settings.rounds_of(work.all_tokens) + 1):
            asked = self._prompts(work, number)
            said.append([side.ask("run", prompts=asked) for side in self.ways])
            limit_s.append(_products_s(self.limits, needed))
        by_way = list(zip(*said, strict=True))
        ours, *peers = (
            Computed(
                name=side.name,
                seconds=[answer["seconds"] for answer in answers],
                peak_bytes=side.peak_bytes(),
            )
            for side, answers in zip(self.ways, by_way, strict=True)
        )
        for peer, answers in zip(peers, by_way[1:], strict=True):
            say(f"{name}: {_alike(answers, by_way[0])} first tokens of {peer.name} are ours")
        return Prompts(
            name=name, work=work, limit_s=statistics.median(limit_s), ours=ours, peers=peers
        )

    def _prompts(self, work: Work, number: int) -> list[list[int]]:
        return prompts(work, self.config.vocab_size, number)


def _alike(theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> str:
    """Tell how many first tokens are the same; a rounding difference may change one."""
    pairs = [
        pair
        for one, other in zip(theirs, ours, strict=True)
        for pair in zip(one["tokens"], other["tokens"], strict=True)
    ]
    return f"{sum(one == other for one, other in pairs)} of {len(pairs)}"


def _products_s(side: Side, needed: Counter[limit.Product]) -> float:
    products = sorted(needed)
    sizes = [[p.batch, p.rows, p.inner, p.columns, p.weighted] for p in products]
    measured = side.ask("products", products=sizes)["seconds"]
    return limit.seconds(needed, dict(zip(products, measured, strict=True)))
