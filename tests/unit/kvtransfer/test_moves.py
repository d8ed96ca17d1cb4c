"""Moves between any two layouts: right elements in right blocks, and nothing else touched."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.layout import KVShape, Span, uniform
from kvtransfer.plan import plan, plan_cache
from tests.unit.kvtransfer.layouts import CANARY, cache_pairs, token_ranges, whole
from tests.unit.kvtransfer.moves import WAYS, Side, move, sides


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_what_is_wanted_arrives_and_nothing_else_is_touched(data: st.DataObject) -> None:
    a, b = data.draw(cache_pairs())
    total = data.draw(st.integers(1, 50))
    tokens = data.draw(token_ranges(total, a, b))
    rng = random.Random(data.draw(st.integers(0, 1000)))
    way, strided = data.draw(st.sampled_from(WAYS)), data.draw(st.booleans())
    plans = plan_cache(a, b, tokens, total)
    at_a, at_b = (sides(cache, total, rng, strided=strided) for cache in (a, b))
    for made, source, target in zip(plans, at_a, at_b, strict=True):
        cache = whole(source.layout.shape, total, seed=1)
        move(made, source.fill(cache), target, rng, way)
        target.check(cache, tokens)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_there_and_back_is_identity(data: st.DataObject) -> None:
    a, b = data.draw(cache_pairs())
    total = data.draw(st.integers(1, 50))
    rng = random.Random(data.draw(st.integers(0, 1000)))
    tokens = Span(0, total)
    at_a, at_b, back = (sides(cache, total, rng) for cache in (a, b, a))
    there, and_back = plan_cache(a, b, tokens, total), plan_cache(b, a, tokens, total)
    for i, way in enumerate(rng.choices(WAYS, k=len(there))):
        cache = whole(at_a[i].layout.shape, total, seed=1)
        move(there[i], at_a[i].fill(cache), at_b[i], rng, way)
        move(and_back[i], at_b[i], back[i], rng, way)
        # Of a windowed group b has no more than its own window asked for.
        cache[:, :, :, : at_b[i].layout.window_begin(total)] = CANARY
        back[i].check(cache, tokens)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_kept_is_left_alone(data: st.DataObject) -> None:
    a, b = data.draw(cache_pairs())
    total = data.draw(st.integers(1, 50))
    rng = random.Random(data.draw(st.integers(0, 1000)))
    tokens, way = Span(0, total), data.draw(st.sampled_from(WAYS))
    for source_layout, target_layout in zip(a.groups, b.groups, strict=True):
        shape = source_layout.shape
        unit = min(source_layout.block_size, target_layout.block_size)
        end = source_layout.group_tokens(tokens, total)[1]
        amounts = st.sampled_from([*range(0, end, unit), end])
        kept = [data.draw(amounts) for _ in range(shape.layers)]
        source = Side.make(source_layout, total, rng)
        target = Side.make(target_layout, total, rng)
        cache = whole(shape, total, seed=1)
        made = plan(source_layout, target_layout, tokens, total, kept)
        move(made, source.fill(cache), target, rng, way)
        target.check(cache, tokens, kept)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fragmented_tables_and_each_dtype(dtype: str, way: str) -> None:
    shape = KVShape(layers=2, kv_heads=2, head_size=8, dtype=dtype)
    rng, total = random.Random(3), 4 * 40 + 3
    cache = whole(shape, total, seed=3)
    for source_size, target_size in ((4, 4), (4, 16), (16, 4)):
        source = Side.make(uniform(shape, source_size), total, rng)
        target = Side.make(uniform(shape, target_size), total, rng)
        for side in (source, target):
            rng.shuffle(side.ranks[0].block_ids)
        made = plan(source.layout, target.layout, Span(0, total), total)
        move(made, source.fill(cache), target, rng, way)
        target.check(cache, Span(0, total))


@pytest.mark.parametrize("way", WAYS)
def test_the_rest_of_a_last_block_is_zeroed_on_arrival(way: str) -> None:
    shape = KVShape(layers=1, kv_heads=1, head_size=4, dtype="float32")
    rng = random.Random(0)
    a, b = uniform(shape, 4), uniform(shape, 16)
    cache = whole(shape, 20, seed=4)
    source, target = Side.make(a, 20, rng), Side.make(b, 20, rng)
    move(plan(a, b, Span(0, 20), 20), source.fill(cache), target, rng, way)
    last = target.ranks[0].block_ids[1]
    assert bool((target.ranks[0].kv[:, :, last, :, 4:] == 0).all())
