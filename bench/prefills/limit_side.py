"""Times torch's own bf16 matrix products, and one layer's attention beside torch's own.

A product's time is the shortest of what torch offers for it, in the middle of several tries:
with a constant weight as it is or in oneDNN's order, or batched into memory that is there already.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.prefills.limit import Product
from bench.prefills.works import BLOCK_SIZE, Span, Work, blocks, passes
from bench.sides.answers import serve
from engine.batch import Batch, Chunk, make_batch
from engine.config import ModelConfig, load_config
from engine.kernels import attention_kernel, product_kernel
from engine.kvcache import KVCache
from engine.parallel import Layout
from service.malloc import keep_freed_memory

_CPU = torch.device("cpu")
_TRIES, _MOST_TRIES = 3, 30
_TRY_FOR_S = 0.03


class Limit:
    """What the machine does when nothing but products or attention is to be done."""

    def products(self, *, products: list[tuple[int, int, int, int, bool]]) -> dict[str, Any]:
        """Answer with the seconds of each product."""
        with torch.inference_mode():
            return {"seconds": [self._seconds(Product(*sizes)) for sizes in products]}

    def attention(self, *, model: str, tokens: int, budget: int, ours: bool) -> dict[str, Any]:
        """Answer with the seconds of one layer's attention over a prompt, ours or torch's."""
        config = replace(load_config(Path(model)), num_layers=1)
        torch.manual_seed(0)
        make = _ours if ours else _torch
        with torch.inference_mode():
            run = make(config, Work(tokens=tokens, count=1), budget)
            began = time.perf_counter()
            run()
            return {"seconds": time.perf_counter() - began}

    def _seconds(self, product: Product) -> float:
        left = torch.randn(product.batch, product.rows, product.inner, dtype=torch.bfloat16)
        right = torch.randn(product.batch, product.columns, product.inner, dtype=torch.bfloat16)
        if not product.weighted:
            out = left.new_empty(product.batch, product.rows, product.columns)
            # The second product of attention has its values row by row, the first its keys.
            other = right.transpose(1, 2)
            if product.inner > product.columns:
                other = other.contiguous()
            return _middle(lambda: torch.bmm(left, other, out=out))
        [x], [weight] = left, right
        packed = product_kernel(_CPU)(weight)
        return min(_middle(lambda: F.linear(x, weight)), _middle(lambda: packed(x)))


def _middle(run: Callable[[], Any]) -> float:
    """Return the median of some tries after a first one."""
    run()
    tries: list[float] = []
    while len(tries) < _TRIES or (sum(tries) < _TRY_FOR_S and len(tries) < _MOST_TRIES):
        began = time.perf_counter()
        run()
        tries.append(time.perf_counter() - began)
    return statistics.median(tries)


def _ours(config: ModelConfig, work: Work, budget: int) -> Callable[[], None]:
    """Our kernel over one chunk after another, each with all keys before it in the cache."""
    table = range(blocks([work], BLOCK_SIZE))
    cache = KVCache(
        config=config,
        dtype=torch.bfloat16,
        device=_CPU,
        num_blocks=len(table),
        block_size=BLOCK_SIZE,
        layout=Layout(),
    )
    cache.tensor.normal_()
    kernel = attention_kernel(_CPU)
    steps = [_step(config, cache, span, table) for [span] in passes(work, budget)]

    def run() -> None:
        for qkv_TNH, batch in steps:
            kernel(qkv_TNH, cache.runs[0], batch, config.num_heads)

    return run


def _step(config: ModelConfig, cache: KVCache, span: Span, table: range) -> tuple[Tensor, Batch]:
    tokens, heads = span.end - span.start, config.num_heads + 2 * config.num_kv_heads
    qkv_TNH = torch.randn(tokens, heads, config.head_size, dtype=torch.bfloat16)
    qkv_TNH[:, : config.num_heads] *= config.head_size**-0.5
    chunk = Chunk(token_ids=[0] * tokens, start=span.start, block_table=table)
    return qkv_TNH, make_batch([chunk], cache, config.vocab_size)


def _torch(config: ModelConfig, work: Work, budget: int) -> Callable[[], Any]:
    """torch's own attention over all queries at once."""

    def heads(count: int) -> Tensor:
        return torch.randn(1, count, work.tokens, config.head_size, dtype=torch.bfloat16)

    q, k, v = map(heads, (config.num_heads, config.num_kv_heads, config.num_kv_heads))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


if __name__ == "__main__":
    keep_freed_memory()
    limit = Limit()
    serve({"products": limit.products, "attention": limit.attention})
