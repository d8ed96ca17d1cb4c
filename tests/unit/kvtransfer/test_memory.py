"""Packing and scattering: right bytes in right blocks between any two layouts, nothing else."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.layout import KVLayout, KVShape, Span, uniform
from kvtransfer.memory import KVMemory
from kvtransfer.outgoing import Lane
from kvtransfer.plan import Plan, plan, regions
from tests.unit.kvtransfer.layouts import DTYPES, RankMemory, layouts, shapes, whole


def move(
    made: Plan, sources: list[RankMemory], targets: list[RankMemory], rng: random.Random
) -> None:
    """Do the plan as the agents do: boxes cut into messages, packed, scattered in any order."""
    for source in sources:
        packer = KVMemory(source.kv, source.layout, source.shard.rank)
        from_table = packer.table(source.block_ids, source.total_tokens)
        for target in targets:
            scatterer = KVMemory(target.kv, target.layout, target.shard.rank)
            to_table = scatterer.table(target.block_ids, target.total_tokens)
            boxes = regions(
                p for p in made.for_source(source.shard.rank) if p.target_rank == target.shard.rank
            )
            lane = Lane.of(target.shard.rank, boxes, made.unit)
            lane.add_ready(Span(0, source.layout.shape.layers), Span(0, source.total_tokens))
            messages = []
            while lane.queue:
                box = lane.next_box(rng.randint(1, 9))
                heads = box.region.heads
                size = packer.payload_bytes(box.layers, heads, box.tokens, made.unit)
                payload = np.full(size, 0xAB, dtype=np.uint8)
                packer.pack(payload, from_table, box.layers, heads, box.tokens, made.unit)
                messages.append((payload, box))
            rng.shuffle(messages)
            for payload, box in messages:
                scatterer.scatter(
                    payload, to_table, box.layers, box.region.heads, box.tokens, made.unit
                )
            assert lane.missing_units == 0


def memories(layout: KVLayout, total: int, rng: random.Random) -> list[RankMemory]:
    return [RankMemory.make(layout, shard.rank, total, rng) for shard in layout.shards]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_there_and_back_is_identity_and_touches_nothing_else(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    a, b = data.draw(layouts(shape)), data.draw(layouts(shape))
    total = data.draw(st.integers(1, 50))
    rng = random.Random(data.draw(st.integers(0, 1000)))
    cache = whole(shape, total, seed=1)
    at_a, at_b, back = (memories(layout, total, rng) for layout in (a, b, a))
    for memory in at_a:
        memory.fill(cache)
    move(plan(a, b, Span(0, total), total), at_a, at_b, rng)
    for memory in at_b:
        memory.check(cache, Span(0, total))
    move(plan(b, a, Span(0, total), total), at_b, back, rng)
    for memory in back:
        memory.check(cache, Span(0, total))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_only_the_wanted_tokens_move(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    a, b = data.draw(layouts(shape)), data.draw(layouts(shape))
    total = data.draw(st.integers(1, 50))
    rng = random.Random(0)
    unit = plan(a, b, Span(0, 0), total).unit
    begin = data.draw(st.integers(0, total // unit)) * unit
    end = data.draw(st.sampled_from([total, *range(begin, total, unit)]))
    cache = whole(shape, total, seed=2)
    at_a, at_b = memories(a, total, rng), memories(b, total, rng)
    for memory in at_a:
        memory.fill(cache)
    move(plan(a, b, Span(begin, end), total), at_a, at_b, rng)
    for memory in at_b:
        memory.check(cache, Span(begin, end))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fragmented_tables_and_each_dtype(dtype: str) -> None:
    shape = KVShape(layers=2, kv_heads=2, head_size=8, dtype=dtype)
    layout = uniform(shape, 4)
    total, rng = 4 * 40 + 3, random.Random(3)
    cache = whole(shape, total, seed=3)
    source = RankMemory.make(layout, 0, total, rng)
    target = RankMemory.make(layout, 0, total, rng)
    rng.shuffle(source.block_ids)
    rng.shuffle(target.block_ids)
    source.fill(cache)
    move(plan(layout, layout, Span(0, total), total), [source], [target], rng)
    target.check(cache, Span(0, total))


def test_the_rest_of_a_last_block_is_zeroed_on_arrival() -> None:
    shape = KVShape(layers=1, kv_heads=1, head_size=4, dtype="float32")
    rng = random.Random(0)
    a, b = uniform(shape, 4), uniform(shape, 16)
    cache = whole(shape, 20, seed=4)
    source, target = RankMemory.make(a, 0, 20, rng), RankMemory.make(b, 0, 20, rng)
    source.fill(cache)
    move(plan(a, b, Span(0, 20), 20), [source], [target], rng)
    assert bool((target.kv[:, :, target.block_ids[1], :, 4:] == 0).all())


def test_wrong_memory_and_tables_are_refused() -> None:
    shape = KVShape(layers=2, kv_heads=2, head_size=8, dtype="float32")
    layout = uniform(shape, 4)
    good = torch.zeros(2, 2, 5, 2, 4, 8)
    with pytest.raises(ValueError, match="needs"):
        KVMemory(torch.zeros(2, 2, 5, 2, 8, 8), layout, 0)
    with pytest.raises(ValueError, match="float32"):
        KVMemory(good.to(DTYPES["bfloat16"]), layout, 0)
    memory = KVMemory(good, layout, 0)
    for ids, match in (([0], "need 2"), ([0, 5], "beyond"), ([1, 1], "twice"), ([-1, 0], "beyond")):
        with pytest.raises(ValueError, match=match):
            memory.table(ids, 8)
