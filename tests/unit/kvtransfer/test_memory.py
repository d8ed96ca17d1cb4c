"""A rank's memory: what it refuses, the runs that boxes are made of, and what may be written."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.addresses import tables_of
from kvtransfer.device_memory import memories_of
from kvtransfer.layout import Box, KVShape, Span, uniform, uniform_cache
from kvtransfer.memory import KVMemory, element_type
from tests.unit.kvtransfer.layouts import DTYPES, RankMemory, layouts, shapes, whole

SHAPE = KVShape(layers=2, kv_heads=2, head_size=8, dtype="float32")
LAYOUT = uniform(SHAPE, 4)
HEAD_BYTES = 4 * 8 * 4
BLOCK_BYTES = 2 * HEAD_BYTES


def test_wrong_memory_is_refused() -> None:
    good = torch.zeros(2, 2, 5, 2, 4, 8)
    for wrong, match in (
        (torch.zeros(2, 2, 5, 2, 8, 8), "needs"),
        (torch.zeros(2, 1, 5, 2, 4, 8), "needs"),
        (torch.zeros(2, 2, 0, 2, 4, 8), "no blocks"),
        (good.to(DTYPES["bfloat16"]), "float32"),
        (torch.zeros(2, 2, 5, 4, 2, 8).transpose(3, 4), "apart"),
        (torch.zeros(2, 2, 5, 2, 4, 9)[..., :8], "apart"),
        (torch.zeros(2, 1, 5, 2, 4, 8).expand(2, 2, 5, 2, 4, 8), "overlap"),
        (torch.zeros(2, 2, 5, 2, 4, 8, device="meta"), "host memory"),
    ):
        with pytest.raises(ValueError, match=match):
            KVMemory(wrong, LAYOUT, 0)
    with pytest.raises(ValueError, match="backwards"):
        KVMemory.from_numpy(good.view(torch.int32).numpy()[::-1], LAYOUT, 0)
    with pytest.raises(ValueError, match="bits"):
        KVMemory.from_numpy(good.numpy(), LAYOUT, 0)


def test_wrong_tables_are_refused() -> None:
    memory = KVMemory(torch.zeros(2, 2, 5, 2, 4, 8), LAYOUT, 0)
    for ids, match in (([0], "need 2"), ([0, 5], "beyond"), ([1, 1], "twice"), ([-1, 0], "beyond")):
        with pytest.raises(ValueError, match=match):
            memory.table(ids, 8)
    with pytest.raises(ValueError, match="cache groups"):
        memories_of([], uniform_cache((SHAPE,), 4), 0)
    with pytest.raises(ValueError, match="cache groups"):
        tables_of([memory], [[0], [1]], 4)


def test_blocks_that_a_window_left_behind_may_be_any() -> None:
    layout = uniform(replace(SHAPE, window=6), 4)
    memory = KVMemory(torch.zeros(2, 2, 5, 2, 4, 8), layout, 0)
    assert memory.table([0, 0, 0, 3, 2], 18).ids.tolist() == [0, 0, 0, 3, 2]
    for ids in ([0, 0, 3, 3, 2], [0, 0, 0, 2, 2]):
        with pytest.raises(ValueError, match="twice"):
            memory.table(ids, 17)


def test_a_state_has_one_block_for_any_number_of_tokens() -> None:
    layout = uniform(replace(SHAPE, state=True, planes=1), 16)
    memory = KVMemory(torch.zeros(2, 1, 5, 2, 1, 8), layout, 0)
    assert memory.table([3], 1000).held == (Span(0, 1),)
    assert memory.payload_bytes(Box(Span(0, 2), Span(0, 2), Span(0, 1), 1)) == 2 * 2 * 8 * 4
    assert memory.run_bytes(Box(Span(0, 2), Span(0, 2), Span(0, 1), 1)) == 2 * 8 * 4


def test_whole_blocks_of_all_heads_are_one_run_where_they_are_neighbours() -> None:
    memory = KVMemory(torch.zeros(2, 2, 8, 2, 4, 8), LAYOUT, 0)
    table = memory.table([2, 3, 4, 6], 16)
    lengths = [len(v) for v in memory.views(table, Box(Span(0, 1), Span(0, 2), Span(0, 16), 4))]
    assert lengths == [3 * BLOCK_BYTES, BLOCK_BYTES] * 2
    lengths = [len(v) for v in memory.views(table, Box(Span(0, 1), Span(0, 1), Span(0, 16), 4))]
    assert lengths == [HEAD_BYTES] * 8
    assert memory.run_bytes(Box(Span(0, 1), Span(0, 2), Span(0, 4), 4)) == BLOCK_BYTES
    assert memory.run_bytes(Box(Span(0, 1), Span(0, 1), Span(0, 4), 4)) == HEAD_BYTES
    assert memory.run_bytes(Box(Span(0, 1), Span(0, 2), Span(0, 4), 2)) == HEAD_BYTES // 2


def test_units_of_one_head_are_joined_within_their_blocks() -> None:
    memory = KVMemory(torch.zeros(2, 2, 8, 2, 4, 8), LAYOUT, 0)
    table = memory.table([2, 3], 8)
    assert [len(v) for v in memory.views(table, Box(Span(0, 1), Span(1, 2), Span(0, 8), 2))] == [
        HEAD_BYTES
    ] * 4


def test_the_whole_memory_is_one_run() -> None:
    memory = KVMemory(torch.zeros(2, 2, 3, 2, 4, 8), LAYOUT, 0)
    table = memory.table([0, 1, 2], 12)
    (one,) = memory.views(table, Box(Span(0, 2), Span(0, 2), Span(0, 12), 4))
    assert len(one) == 2 * 2 * 3 * BLOCK_BYTES


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_views_are_the_payload_where_it_lies(data: st.DataObject) -> None:
    layout = data.draw(layouts(data.draw(shapes()), data.draw(st.sampled_from([1, 4, 6, 8]))))
    total = data.draw(st.integers(1, 50))
    rank = data.draw(st.sampled_from(layout.shards)).rank
    rng = random.Random(data.draw(st.integers(0, 1000)))
    own = RankMemory.make(layout, rank, total, rng, strided=data.draw(st.booleans()))
    own.fill(whole(layout.shape, total, seed=1))
    memory, shard = KVMemory(own.kv, layout, rank), own.shard
    table = memory.table(own.block_ids, total)
    unit = data.draw(st.sampled_from([u for u in (1, 2, 4, 8) if layout.block_size % u == 0]))
    for span in layout.tokens_of(shard, total):
        tokens = Span(span.begin, span.begin + len(span) // unit * unit)
        if not len(tokens):
            continue
        heads = Span(data.draw(st.integers(0, len(shard.heads) - 1)), len(shard.heads))
        heads = Span(shard.heads.begin + heads.begin, shard.heads.begin + heads.end)
        box = Box(shard.layers, heads, tokens, unit)
        payload = np.zeros(memory.payload_bytes(box), np.uint8)
        memory.pack(payload, table, box)
        views = memory.views(table, box)
        assert b"".join(views) == payload.tobytes()
        assert min(map(len, views)) >= memory.run_bytes(box)


def test_a_part_filled_unit_has_no_views() -> None:
    memory = KVMemory(torch.zeros(2, 2, 8, 2, 4, 8), LAYOUT, 0)
    with pytest.raises(ValueError, match="do not fill"):
        memory.views(memory.table([2, 3], 7), Box(Span(0, 1), Span(0, 1), Span(0, 7), 4))


def test_views_can_be_written_and_those_of_a_mapped_memory_cannot() -> None:
    kv = torch.zeros(2, 2, 3, 2, 4, 8)
    memory = KVMemory(kv, LAYOUT, 0)
    table = memory.table([1], 4)
    box = Box(Span(1, 2), Span(0, 2), Span(0, 4), 4)
    for view in memory.views(table, box):
        view[:] = b"\x01" * len(view)
    written = kv.view(torch.uint8) != 0
    assert bool(written[1, :, 1].all())
    assert int(written.sum()) == written[1, :, 1].numel()

    bits = kv.view(torch.int32).numpy()
    mapped = KVMemory.from_numpy(bits, LAYOUT, 0)
    payload = np.zeros(mapped.payload_bytes(box), np.uint8)
    mapped.pack(payload, table, box)
    assert bool((payload == 1).all())
    for view in mapped.views(table, box):
        assert view.readonly
    with pytest.raises(ValueError, match="read-only"):
        mapped.scatter(payload, table, box)
    with pytest.raises(ValueError, match="read-only"):
        mapped.copy_from(memory, table, table, box)
    assert bits.flags.writeable


def test_nothing_behind_the_tokens_is_brought_over() -> None:
    shape = KVShape(layers=1, kv_heads=1, head_size=2, dtype="float16")
    layout, other = uniform(shape, 4), uniform(shape, 8)
    source = KVMemory(torch.full((1, 2, 4, 1, 4, 2), 9.0, dtype=torch.float16), layout, 0)
    kv = torch.full((1, 2, 3, 1, 8, 2), 5.0, dtype=torch.float16)
    target = KVMemory(kv, other, 0)
    box = Box(Span(0, 1), Span(0, 1), Span(0, 6), 4)
    target.copy_from(source, source.table([3, 1], 6), target.table([2], 6), box)
    assert bool((kv[:, :, 2, :, :6] == 9).all())
    assert bool((kv[:, :, 2, :, 6:] == 0).all())
    assert bool((kv[:, :, :2] == 5).all())


def test_what_lies_behind_the_tokens_is_packed_as_zeros() -> None:
    memory = KVMemory(torch.ones(2, 2, 5, 2, 4, 8), LAYOUT, 0)
    box = Box(Span(0, 2), Span(0, 2), Span(0, 6), 4)
    payload = np.full(memory.payload_bytes(box), 0xAB, np.uint8)
    memory.pack(payload, memory.table([3, 1], 6), box)
    found = payload.view(np.float32).reshape(2, 2, 2, 2, 4, 8)
    assert bool((found[:, :, 0] == 1).all())
    assert bool((found[:, :, 1, :, :2] == 1).all())
    assert bool((found[:, :, 1, :, 2:] == 0).all())


def test_memory_is_wrapped_where_it_lies() -> None:
    kv = torch.zeros(2, 2, 3, 2, 4, 8, dtype=torch.bfloat16)
    layout = uniform(replace(SHAPE, dtype="bfloat16"), 4)
    memory = KVMemory(kv, layout, 0)
    (one,) = memory.views(memory.table([0], 4), Box(Span(1, 2), Span(0, 1), Span(0, 4), 4))[:1]
    address = np.frombuffer(one, np.uint8).__array_interface__["data"][0]
    assert address == kv[1].data_ptr()
    assert element_type("bfloat16") is np.int16
