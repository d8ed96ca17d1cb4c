"""Runs batches in every engine, round by round, and what reading memory alone would take."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import checkpoints
from bench.decodes import limit
from bench.decodes.figures import Given, limit_speed, overhead_row, speed_rows, step_s
from bench.decodes.settings import Settings
from bench.decodes.works import Work, prompts
from bench.report import Row
from bench.sides import peers
from bench.sides.process import Bystanders, Side
from engine.config import ModelConfig, load_config
from service.threads import thread_env

Say = Callable[[str], None]

ELEMENT_BYTES = 2
_GIB = 1 << 30
# Prompts that transformers computes in a second or two.
_TRANSFORMERS_TOKENS = 1024


def of_model(model: str, settings: Settings, say: Say) -> list[Row]:
    """Measure one model's rows; raises SideFailed. `say` hears how it went."""
    works = [work for work in settings.works if settings.wants(f"{model}, {work.name}")]
    if not works:
        return []
    folder = checkpoints.kept(settings.checkpoints, model)
    config = load_config(folder)
    rows: list[Row] = []
    with ExitStack() as stack:
        memory = stack.enter_context(_side("memory", settings))
        ours = stack.enter_context(_ours(folder, works, settings))
        others = [stack.enter_context(one) for one in _peers(folder, config, works, settings)]
        for work in works:
            sides = [side for side in others if _takes(side, work)]
            turns = Turns(config=config, memory=memory, ours=ours, peers=sides, settings=settings)
            bystanders = Bystanders([memory, ours, *others])
            rows += turns.measure(f"{model}, {work.name}", work)
            say(f"measured {model}, {work.name}; {bystanders}")
    return rows


def of_overhead(model: str, settings: Settings, say: Say) -> list[Row]:
    """Measure what our steps take beside the model's compute; raises SideFailed."""
    work = settings.overhead
    name = f"{model}, overhead, {work.name}"
    if not settings.wants(name):
        return []
    folder = checkpoints.kept(settings.checkpoints, model)
    vocab_size = load_config(folder).vocab_size
    outside_s: list[float] = []
    with _ours(folder, [work], settings) as ours:
        bystanders = Bystanders([ours])
        for number in range(settings.rounds + 1):
            said = ours.ask("run", **_asked(work, prompts(work, vocab_size, number)))
            if number:  # the first is a warm-up
                outside_s += said["outside"]
        say(f"measured {name}; {bystanders}")
    return [overhead_row(name, outside_s)]


def _side(name: str, settings: Settings) -> Side:
    command = [sys.executable, "-m", f"bench.decodes.{name}_side"]
    return Side(name, command, thread_env(len(settings.cores)))


def _ours(folder: Path, works: Sequence[Work], settings: Settings) -> Side:
    num_blocks = max(work.blocks for work in works)
    return _side("ours", settings).open(model=str(folder), num_blocks=num_blocks)


def _peers(
    folder: Path, config: ModelConfig, works: Sequence[Work], settings: Settings
) -> Iterator[Side]:
    """Start the peers, each named by its version; for whoever takes them to end."""
    if any(_is_small(work) for work in works):
        command = [sys.executable, "-m", "bench.decodes.transformers_side"]
        side = Side("transformers", command, peers.settings(settings.cores))
        yield side.open(model=str(folder))
    if settings.vllm_python:
        tokens = max(work.batch * (work.tokens + 128) for work in works)
        kv_gib = 1 + math.ceil(ELEMENT_BYTES * limit.kv_elements(config) * tokens / _GIB)
        side = peers.vllm(settings.vllm_python, settings.cores, kv_gib)
        longest = max(work.tokens for work in works)
        yield side.open(model=str(folder), max_model_len=longest, filled=True)


def _takes(side: Side, work: Work) -> bool:
    return _is_small(work) or not side.name.startswith("transformers")


def _is_small(work: Work) -> bool:
    return work.batch * work.context <= _TRANSFORMERS_TOKENS


def _asked(work: Work, made: Sequence[Sequence[int]]) -> dict[str, Any]:
    last_tokens = [prompt[-1] for prompt in made]
    return {"last_tokens": last_tokens, "context": work.context, "steps": work.steps}


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Open sides of one model that decode the same batches one after another."""

    config: ModelConfig
    memory: Side
    ours: Side
    peers: Sequence[Side]
    settings: Settings

    def measure(self, name: str, work: Work) -> list[Row]:
        """Run a work's rounds; raises SideFailed."""
        experts, bytes_per_s = 0.0, []
        speeds: dict[str, list[float]] = {side.name: [] for side in (self.ours, *self.peers)}
        for number in range(self.settings.rounds + 1):
            made = prompts(work, self.config.vocab_size, number)
            asked = _asked(work, made)
            steps = {self.ours.name: self.ours.ask("run", **asked)["steps"]}
            for peer in self.peers:
                steps[peer.name] = peer.ask("run", prompts=made, new_tokens=work.steps)["steps"]
            if not number:  # a warm-up
                experts = self.ours.ask("experts", **asked)["experts"]
                continue
            bytes_per_s.append(self.memory.ask("read")["bytes_per_s"])
            for side, taken in steps.items():
                speeds[side].append(work.batch / step_s(taken, work.batch))
        needed = limit.step_bytes(
            self.config,
            element_bytes=ELEMENT_BYTES,
            batch=work.batch,
            cached_tokens=work.mean_cached,
            experts=experts,
        )
        ours, *others = (Given(name=side, speeds=each) for side, each in speeds.items())
        return speed_rows(name, ours, others, limit_speed(work, needed, bytes_per_s))
