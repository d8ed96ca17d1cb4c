"""Whole models on a GPU, beside Hugging Face transformers on the same one.

Models in the shapes of published ones, with made-up weights, each engine by itself: tokens a second
of a batch that is decoded greedily, with the choice of each token, where the peer uses its
continuous batching; and of one prompt, to the logits after it, beside the products that it cannot
do without at the rate of a large one in the same run.
"""

import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from bench.gpus.device import timer_of
from bench.gpus.steps import WORKS, Weights, Work
from bench.kernel_timing import flops_per_s
from bench.prefills import limit
from bench.prefills.works import Work as Prompts
from bench.report import GrowingReport, Row, median_and_spread
from engine.config import ModelConfig
from engine.runner import Chunk, ModelRunner
from engine.sampling import SamplingParams, SequenceState, sample

_BLOCK = 32
_CHUNK = 8192  # tokens of a pass with a prompt
_PEER = "transformers"


def decode_name(work: Work, sequences: int, keys: int) -> str:
    """Return the row of a batch that is decoded."""
    return f"{work.name}, decode, {sequences} x {keys} keys"


def prefill_name(work: Work, tokens: int) -> str:
    """Return the row of a prompt."""
    return f"{work.name}, prefill, {tokens} tokens"


class Ours:
    """This engine with made-up weights."""

    def __init__(self, config: ModelConfig, device: torch.device, most_tokens: int) -> None:
        self._vocab_size = config.vocab_size
        self._device = device
        self._runner = ModelRunner(
            folder=None,
            config=config,
            dtype=torch.bfloat16,
            device=device,
            num_blocks=-(-most_tokens // _BLOCK),
            block_size=_BLOCK,
            fill=Weights().fill,
        )
        self._runner.cache.tensor.normal_()

    def decode(self, sequences: int, keys: int, steps: int) -> list[float]:
        """Return the tokens a second of each of some steps, from so many keys on."""
        each = -(-(keys + steps) // _BLOCK)
        tables = [range(i * each, (i + 1) * each) for i in range(sequences)]
        if self._device.type == "cuda":
            self._runner.record_steps(sequences, keys + steps)
        greedy = SamplingParams()
        states = [SequenceState(greedy, prompt_len=keys) for _ in range(sequences)]
        tokens, rates = [1 + i for i in range(sequences)], []
        for step in range(steps):
            began = time.perf_counter()
            chunks = [
                Chunk(token_ids=[token], start=keys - 1 + step, block_table=table)
                for token, table in zip(tokens, tables, strict=True)
            ]
            logits_SV = self._runner.step(self._runner.prepare(chunks), tokens, lambda: None)
            tokens = [chosen.token_id for chosen in sample(logits_SV, states)]
            for state, token in zip(states, tokens, strict=True):
                state.append(token)
            rates.append(sequences / (time.perf_counter() - began))
        return rates

    def prefill(self, tokens: int) -> None:
        """Compute a prompt, until its logits are there."""
        ids = _ids(tokens, self._vocab_size)
        table = range(-(-tokens // _BLOCK))
        for start in range(0, tokens, _CHUNK):
            piece = ids[start : start + _CHUNK]
            chunk = Chunk(token_ids=piece, start=start, block_table=table, is_prompt=True)
            logits_SV = self._runner.forward([chunk])
        logits_SV.cpu()


class Transformers:
    """The peer with made-up weights, and its defaults for a GPU."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        import transformers

        self._transformers: Any = transformers
        self._vocab_size = config.vocab_size
        with torch.device(device):
            auto: Any = transformers.AutoModelForCausalLM
            self._model = auto.from_config(_their_config(config), dtype=torch.bfloat16).eval()

    def decode(self, sequences: int, keys: int, steps: int) -> list[float]:
        """Return the tokens a second of each step in which all sequences are decoded."""
        prompts = [_ids(keys, self._vocab_size, seed=i) for i in range(sequences)]
        settings = self._transformers.GenerationConfig(
            max_new_tokens=steps, do_sample=False, eos_token_id=-1
        )
        done = self._model.generate_batch(
            prompts, generation_config=settings, record_timestamps=True
        )
        if len(done) != sequences or any(it.error is not None for it in done.values()):
            raise RuntimeError(f"{_PEER} has answered {len(done)} of {sequences} requests")
        moments = [it.timestamps for it in done.values()]
        begin, end = max(of[0] for of in moments), min(of[-1] for of in moments)
        steps_s = sorted(moment for moment in moments[0] if begin <= moment <= end)
        return [sequences / (after - before) for before, after in pairwise(steps_s)]

    @torch.inference_mode()
    def prefill(self, tokens: int) -> None:
        """Compute a prompt, until its logits are there."""
        ids = torch.tensor([_ids(tokens, self._vocab_size)], device=self._model.device)
        self._model(ids, use_cache=True, logits_to_keep=1).logits.cpu()


def _their_config(config: ModelConfig) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
    }
    if config.moe is None:
        return transformers.LlamaConfig(**common)
    return transformers.Qwen3MoeConfig(
        **common,
        num_experts=config.moe.num_experts,
        num_experts_per_tok=config.moe.top_k,
        moe_intermediate_size=config.moe.intermediate_size,
        norm_topk_prob=config.moe.norm_topk_prob,
    )


def _ids(tokens: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(vocab_size, (tokens,), generator=generator).tolist()
    return ids


def _rates(compute: Callable[[int], None], tokens: int, repeats: int) -> list[float]:
    compute(tokens)  # what is compiled the first time is not measured
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        compute(tokens)
        rates.append(tokens / (time.perf_counter() - began))
    return rates


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured of a model: batches (sequences, keys of each) and lengths of prompts."""

    batches: Sequence[tuple[int, int]]
    prompts: Sequence[int]
    steps: int
    repeats: int

    @property
    def most_tokens(self) -> int:
        """Of a cache that is enough for each."""
        ends = [(keys + self.steps + _BLOCK) * count for count, keys in self.batches]
        return max(ends + list(self.prompts))

    def runs(self, work: Work, engine: Ours | Transformers) -> dict[str, Callable[[], list[float]]]:
        """Return what gives each row's rates, in tokens a second."""
        return {
            **{
                decode_name(work, *batch): partial(self._decoded, engine, *batch)
                for batch in self.batches
            },
            **{
                prefill_name(work, tokens): partial(_rates, engine.prefill, tokens, self.repeats)
                for tokens in self.prompts
            },
        }

    def limits(self, work: Work, flops_per_s: float) -> dict[str, float]:
        """Return at how many tokens a second the products alone would be done, of each prompt."""
        needed = {
            tokens: limit.products(work.config, Prompts(tokens=tokens, count=1), _CHUNK)
            for tokens in self.prompts
        }
        return {
            prefill_name(work, tokens): tokens * flops_per_s / limit.flops(products)
            for tokens, products in needed.items()
        }

    def _decoded(self, engine: Ours | Transformers, sequences: int, keys: int) -> list[float]:
        return engine.decode(sequences, keys, self.steps)[self.steps // 4 :]


def measure_ours(
    work: Work,
    device: torch.device,
    asked: Asked,
    flops_per_s: float | None,
    figures: GrowingReport,
) -> None:
    """Measure a model by this engine."""
    limits = asked.limits(work, flops_per_s) if flops_per_s is not None else {}
    engine = Ours(work.config, device, asked.most_tokens)
    for name, run in asked.runs(work, engine).items():
        with figures.attempt(name):
            rate, spread = median_and_spread(run())
            row = Row(
                row=name,
                ours=rate,
                unit="tokens/s",
                higher_is_better=True,
                limit=limits.get(name),
                spread=spread,
            )
            figures.put(row)


def measure_peer(work: Work, device: torch.device, asked: Asked, figures: GrowingReport) -> None:
    """Put the peer beside those rows that there are."""
    engine = Transformers(work.config, device)
    for name, run in asked.runs(work, engine).items():
        if name in figures.rows:
            with figures.attempt(f"{name}, {_PEER}"):
                rate, _ = median_and_spread(run())
                figures.put(replace(figures.rows[name], peer=rate, peer_name=_PEER))


BATCHES = ((1, 1024), (32, 1024))
PROMPTS = (1024, 8192, 32_768)


def measure(
    device: torch.device,
    pattern: str,
    figures: GrowingReport,
    *,
    batches: Sequence[tuple[int, int]] = (),
    prompts: Sequence[int] = (),
    steps: int = 96,
    repeats: int = 6,
) -> None:
    """Measure the batches, of `steps` tokens each, and prompts whose names match."""
    flops = flops_per_s(timer_of(device), device, repeats) if device.type == "cuda" else None
    for work in WORKS:
        some = [of for of in batches if re.search(pattern, decode_name(work, *of))]
        others = [of for of in prompts if re.search(pattern, prefill_name(work, of))]
        if some or others:
            asked = Asked(batches=some, prompts=others, steps=steps, repeats=repeats)
            # One engine after the other has the GPU's memory.
            with figures.attempt(work.name):
                measure_ours(work, device, asked, flops, figures)
            _give_back(device)
            with figures.attempt(f"{work.name}, {_PEER}"):
                measure_peer(work, device, asked, figures)
            _give_back(device)


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
