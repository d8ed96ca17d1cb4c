"""The matrix products that passes cannot do without, and what their times make of it. Pure.

A product is [batch, rows, inner] x [batch, inner, columns], done `times` over. Counted as they are
needed: the head, and of the last layer all but keys and values, for the last tokens alone;
attention for the keys that a slice of queries sees. Experts are chosen evenly. Nothing else is
counted: no norms, no softmax, no copies.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.prefills.works import Span, Work, passes
from engine.config import ModelConfig

# Queries that are multiplied at once; keys after the last of them are left out.
SLICE_QUERIES = 128


@dataclass(frozen=True, order=True)
class Product:
    """Sizes of one product; `weighted` where the right side is a constant weight."""

    batch: int
    rows: int
    inner: int
    columns: int
    weighted: bool

    @property
    def flops(self) -> int:
        """Operations: a multiplication and an addition each."""
        return 2 * self.batch * self.rows * self.inner * self.columns


def products(config: ModelConfig, work: Work, budget: int) -> Counter[Product]:
    """Return how often each product is needed for all of a work's prompts."""
    found: Counter[Product] = Counter()
    for spans in passes(work, budget):
        for product, times in _of_pass(config, work, spans):
            found[product] += times
    return found


def attention(config: ModelConfig, spans: Sequence[Span]) -> Counter[Product]:
    """Return one layer's attention: queries by keys, and weights by values."""
    found: Counter[Product] = Counter()
    for span in spans:
        queries = min(SLICE_QUERIES, span.end - span.start)
        slices = math.ceil((span.end - span.start) / queries)
        # Time grows with the keys in a line, so that the middle stands for all slices.
        keys = span.start + (span.end - span.start + queries) // 2
        heads, size, value_size = _heads(config, span)
        rows = queries * config.num_heads // heads
        found[Product(heads, rows, size, keys, weighted=False)] += slices
        found[Product(heads, rows, keys, value_size, weighted=False)] += slices
    return found


def _heads(config: ModelConfig, span: Span) -> tuple[int, int, int]:
    """Return how many heads of keys a span's queries look at, and their and their values' size."""
    latent = config.latent
    if latent is None:
        return config.num_kv_heads, config.head_size, config.head_size
    if latent.makes_keys(span.end - span.start, span.end):
        return config.num_heads, latent.query_size, latent.value_size
    return 1, latent.cell_size, latent.rank


def flops(found: Mapping[Product, int]) -> int:
    """Return the operations of all products."""
    return sum(product.flops * times for product, times in found.items())


def seconds(found: Mapping[Product, int], measured_s: Mapping[Product, float]) -> float:
    """Return the time of all products, each as long as it was measured."""
    return sum(measured_s[product] * times for product, times in found.items())


def _of_pass(
    config: ModelConfig, work: Work, spans: Sequence[Span]
) -> Iterator[tuple[Product, int]]:
    tokens = sum(span.end - span.start for span in spans)
    ended = sum(span.end == work.tokens for span in spans)
    hidden, layers = config.hidden_size, config.num_layers
    last = [Span(s.prompt, s.end - 1, s.end) for s in spans if s.end == work.tokens]
    made = _made if config.latent is None else _made_of_latents
    for attended, times in ((spans, layers - 1), (last, 1)):
        for product in made(config, tokens, attended):
            yield product, times
        for product, count in attention(config, attended).items():
            yield product, count * times
    for layer in range(layers):
        rows = ended if layer == layers - 1 else tokens
        if rows:
            yield from _mlp(config, layer, rows)
    if ended:
        yield _weight(ended, hidden, config.vocab_size), 1


def _made(config: ModelConfig, tokens: int, spans: Sequence[Span]) -> Iterator[Product]:
    """Yield what makes all tokens' keys and values, spans' queries, and the output for these."""
    rows, hidden = _tokens(spans), config.hidden_size
    heads = config.num_heads * config.head_size
    kv_heads = 2 * config.num_kv_heads * config.head_size
    if rows == tokens:
        yield _weight(tokens, hidden, heads + kv_heads)
    else:
        yield _weight(tokens, hidden, kv_heads)
        if rows:
            yield _weight(rows, hidden, heads)
    if rows:
        yield _weight(rows, heads, hidden)


def _made_of_latents(config: ModelConfig, tokens: int, spans: Sequence[Span]) -> Iterator[Product]:
    """As `_made`, with the latents; and what is made of them, or of queries, for attention."""
    latent, rows, hidden = config.latent, _tokens(spans), config.hidden_size
    assert latent is not None
    yield _weight(tokens, hidden, latent.cell_size)
    if not rows:
        return
    width = hidden
    if latent.query_rank is not None:
        yield _weight(rows, hidden, latent.query_rank)
        width = latent.query_rank
    yield _weight(rows, width, config.num_heads * latent.query_size)
    per_head = latent.plain_size + latent.value_size
    for span in spans:
        new = span.end - span.start
        made = span.end if latent.makes_keys(new, span.end) else new
        yield _weight(made, latent.rank, config.num_heads * per_head)
    yield _weight(rows, config.num_heads * latent.value_size, hidden)


def _tokens(spans: Sequence[Span]) -> int:
    return sum(span.end - span.start for span in spans)


def _mlp(config: ModelConfig, layer: int, rows: int) -> Iterator[tuple[Product, int]]:
    hidden = config.hidden_size
    if config.moe is None or not config.moe.is_sparse(layer):
        inner, experts = config.intermediate_size, 1
    else:
        yield _weight(rows, hidden, config.moe.num_experts), 1
        if config.moe.shared_size:
            yield _weight(rows, hidden, 2 * config.moe.shared_size), 1
            yield _weight(rows, config.moe.shared_size, hidden), 1
        inner, pairs = config.moe.intermediate_size, rows * config.moe.top_k
        experts = min(pairs, config.moe.num_experts)
        rows = pairs // experts
    yield _weight(rows, hidden, 2 * inner), experts
    yield _weight(rows, inner, hidden), experts


def _weight(rows: int, inner: int, columns: int) -> Product:
    return Product(1, rows, inner, columns, weighted=True)
