"""Runs batches and a load through whole systems, seen from their clients, round by round."""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import checkpoints
from bench.decodes import limit
from bench.decodes.batches import ELEMENT_BYTES
from bench.decodes.figures import Gaps, Given, gaps_s, latency_rows, speed, speed_rows
from bench.decodes.settings import Settings
from bench.decodes.works import Work, prompts, together
from bench.report import Row
from bench.sides import peers
from bench.sides.process import Side
from engine.config import ModelConfig, load_config
from service.threads import default_threads

Say = Callable[[str], None]

_MIB = 1 << 20
# Of a cache, so that what it remembers of one row is not in the way of the next.
_ROOM = 1.25


def of_batches(model: str, settings: Settings, say: Say) -> list[Row]:
    """Measure a batch's tokens as they reach the client; raises SideFailed."""
    names = {f"{model}, {work.name}, served": work for work in settings.served}
    wanted = {name: work for name, work in names.items() if settings.wants(name)}
    if not wanted:
        return []
    config = load_config(checkpoints.kept(settings.checkpoints, model))
    tokens = sum(work.batch * work.tokens for work in wanted.values())
    longest = max(work.tokens for work in wanted.values())
    rows: list[Row] = []
    with _systems(model, settings, len(settings.cores), tokens, longest) as sides:
        for name, work in wanted.items():
            rows += _batch(name, work, sides, config, settings)
            say(f"measured {name}")
    return rows


def of_load(model: str, settings: Settings, say: Say) -> list[Row]:
    """Measure the time between tokens while requests come and go; raises SideFailed."""
    name, load = f"{model}, inter-token latency under load", settings.load
    if not settings.wants(name):
        return []
    vocab_size = load_config(checkpoints.kept(settings.checkpoints, model)).vocab_size
    rounds = max(2, settings.rounds // 2)
    made = [load.requests(vocab_size, number) for number in range(rounds + 1)]
    tokens = load.count * load.tokens
    found: dict[str, list[list[float]]] = {}
    with _systems(model, settings, default_threads(), tokens, load.tokens) as sides:
        for number, requests in enumerate(made):
            for side in sides:
                asked = side.ask("stream", requests=requests, in_flight=load.in_flight)
                if number:  # the first is a warm-up
                    gaps = gaps_s(asked["arrivals"], load.in_flight)
                    found.setdefault(side.name, []).append(gaps)
        say(f"measured {name}")
    ours, *others = (Gaps(name=side, rounds=each) for side, each in found.items())
    return latency_rows(name, ours, others[0] if others else None)


@contextmanager
def _systems(
    model: str, settings: Settings, threads: int, tokens: int, longest: int
) -> Iterator[list[Side]]:
    """Start whole systems, ours first, with room for `tokens` and for sequences of `longest`.

    Ours has `threads` in each of its instances.
    """
    folder = checkpoints.kept(settings.checkpoints, model)
    cell_bytes = ELEMENT_BYTES * limit.kv_elements(load_config(folder))
    kv_mib = math.ceil(_ROOM * tokens * cell_bytes / _MIB)
    with ExitStack() as stack:
        served = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoints.add_tokenizer(folder, served)
        ours = peers.served().open(model=str(served), threads=threads, kv_mib=max(256, kv_mib))
        sides = [stack.enter_context(ours)]
        if settings.vllm_python:
            side = peers.vllm_served(
                settings.vllm_python, settings.cores, 1 + math.ceil(kv_mib / 1024)
            ).open(model=str(served), max_model_len=longest, prefix_caching=True)
            sides.append(stack.enter_context(side))
        yield sides


def _batch(
    name: str, work: Work, sides: Sequence[Side], config: ModelConfig, settings: Settings
) -> list[Row]:
    # The same prompts in all rounds: after the first they are cached, and all begin at once.
    asked = together(work, prompts(work, config.vocab_size, 0))
    speeds: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(settings.rounds + 1):
        for side in sides:
            arrivals = side.ask("stream", requests=asked, in_flight=len(asked))["arrivals"]
            if number:  # the first is a warm-up
                speeds[side.name].append(speed(arrivals))
    ours, *others = (Given(name=side, speeds=each) for side, each in speeds.items())
    return speed_rows(name, ours, others, None)
