"""Plans: every element that a target needs comes exactly once, from a rank that holds it."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.errors import LayoutMismatch
from kvtransfer.layout import (
    KVLayout,
    KVShape,
    Shard,
    Span,
    check_compatible,
    compatibility_hash,
    uniform,
)
from kvtransfer.plan import plan, regions
from tests.unit.kvtransfer.layouts import layouts, shapes

SHAPE = KVShape(layers=4, kv_heads=4, head_size=8, dtype="bfloat16")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_element_comes_once_from_a_holder(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    source, target = data.draw(layouts(shape)), data.draw(layouts(shape))
    total = data.draw(st.integers(1, 50))
    tokens = Span(0, total)
    made = plan(source, target, tokens, total)
    for shard in target.shards:
        wanted = {
            (layer, head, token)
            for layer in shard.layers
            for head in shard.heads
            for span in target.tokens_of(shard, total)
            for token in span
        }
        got: Counter[tuple[int, int, int]] = Counter()
        for piece in made.for_target(shard.rank):
            holder = source.shard(piece.source_rank)
            assert piece.layer in holder.layers
            assert holder.heads.contains(piece.heads)
            assert any(s.contains(piece.tokens) for s in source.tokens_of(holder, total))
            assert piece.tokens.begin % made.unit == 0
            got.update((piece.layer, h, t) for h in piece.heads for t in piece.tokens)
        assert set(got) == wanted
        assert set(got.values()) <= {1}
    per_source = [p for s in source.shards for p in made.for_source(s.rank)]
    assert Counter(per_source) == Counter(made.pieces)
    boxes = regions(made.pieces)
    assert sum(len(b.layers) for b in boxes) == len(made.pieces)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_token_shares_partition_the_sequence_on_block_boundaries(data: st.DataObject) -> None:
    layout = data.draw(layouts(data.draw(shapes())))
    total = data.draw(st.integers(0, 100))
    one_holding = {s.cp_rank: s for s in layout.shards}.values()
    spans = sorted(s for shard in one_holding for s in layout.tokens_of(shard, total))
    assert [t for span in spans for t in span] == list(range(total))
    assert all(span.begin % layout.block_size == 0 for span in spans)


def test_replicated_heads_share_the_work_evenly() -> None:
    shape = KVShape(layers=4, kv_heads=2, head_size=8, dtype="float32")
    source, target = uniform(shape, 16, tp=4), uniform(shape, 16, tp=2)
    made = plan(source, target, Span(0, 64), 64)
    work = {s.rank: len(made.for_source(s.rank)) for s in source.shards}
    assert work == {0: 2, 1: 2, 2: 2, 3: 2}


def test_a_prefix_that_decode_has_is_left_out() -> None:
    layout = uniform(SHAPE, 16)
    made = plan(layout, layout, Span(32, 70), 70)
    assert {p.tokens for p in made.pieces} == {Span(32, 70)}


def test_tokens_off_the_grain_are_refused() -> None:
    layout = uniform(SHAPE, 16)
    for tokens, total in ((Span(8, 32), 32), (Span(0, 24), 32), (Span(0, 64), 32)):
        with pytest.raises(ValueError, match="tokens"):
            plan(layout, layout, tokens, total)


def test_zigzag_pairs_early_and_late_chunks() -> None:
    layout = uniform(SHAPE, 4, cp=2, cp_order="zigzag")
    assert layout.tokens_of(layout.shard(0), 32) == (Span(0, 8), Span(24, 32))
    assert layout.tokens_of(layout.shard(1), 32) == (Span(8, 24),)


def test_heads_are_replicated_when_tp_exceeds_them() -> None:
    shards = uniform(SHAPE, 16, tp=8).shards
    assert [s.heads for s in shards] == [Span(h, h + 1) for h in (0, 0, 1, 1, 2, 2, 3, 3)]


def test_layouts_with_gaps_or_overlaps_are_refused() -> None:
    gap = (Shard(rank=0, layers=Span(0, 3), heads=Span(0, 4)),)
    overlap = (
        Shard(rank=0, layers=Span(0, 4), heads=Span(0, 3)),
        Shard(rank=1, layers=Span(0, 4), heads=Span(2, 3)),
    )
    for shards in (gap, overlap):
        with pytest.raises(ValueError, match=r"shards|overlap"):
            KVLayout(shape=SHAPE, block_size=16, shards=shards)


def test_incompatible_layouts_are_refused_by_name() -> None:
    other = KVShape(layers=4, kv_heads=4, head_size=16, dtype="bfloat16")
    with pytest.raises(LayoutMismatch, match="head_size differs: 8 here, 16 there"):
        check_compatible(uniform(SHAPE, 16), uniform(other, 16))
    check_compatible(uniform(SHAPE, 16), uniform(SHAPE, 32, tp=2))


def test_compatibility_hash_depends_on_each_part() -> None:
    hashes = {
        compatibility_hash(1, "a", SHAPE),
        compatibility_hash(2, "a", SHAPE),
        compatibility_hash(1, "b", SHAPE),
        compatibility_hash(1, "a", KVShape(layers=4, kv_heads=4, head_size=8, dtype="float16")),
    }
    assert len(hashes) == 4
    assert {len(h) for h in hashes} == {32}
