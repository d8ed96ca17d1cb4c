"""Plans between any two layouts: each element once, from a holder, the work shared evenly."""

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.layout import KVLayout, KVShape, Shard, Span, uniform
from kvtransfer.plan import Plan, plan, plan_cache
from tests.unit.kvtransfer.layouts import cache_pairs, token_ranges

Elements = Counter[tuple[int, int, int]]


def arriving(made: Plan, rank: int) -> Elements:
    """Every (layer, head, token) that comes to a rank, and how often."""
    return Counter(
        (layer, head, token)
        for r in made.for_target(rank)
        for layer in r.layers
        for head in r.heads
        for token in r.tokens
    )


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_every_element_comes_once_from_a_holder(data: st.DataObject) -> None:
    a, b = data.draw(cache_pairs())
    total = data.draw(st.integers(1, 50))
    tokens = data.draw(token_ranges(total, a, b))
    kept = [
        [data.draw(st.integers(0, g.group_tokens(tokens, total)[1])) for _ in range(g.shape.layers)]
        for g in b.groups
    ]
    plans = plan_cache(a, b, tokens, total, data.draw(st.sampled_from([(), kept])))
    with_kept = plans == plan_cache(a, b, tokens, total, kept)
    for i, (source, target, made) in enumerate(zip(a.groups, b.groups, plans, strict=True)):
        end = target.group_tokens(tokens, total)[1]
        for shard in target.shards:
            wanted = set()
            for layer in shard.layers:
                have = kept[i][layer] if with_kept else 0
                have = have if have == end else have // made.unit * made.unit
                wanted |= {
                    (layer, head, token)
                    for head in shard.heads
                    for span in target.tokens_of(shard, total)
                    for token in span.meet(target.wanted(tokens, total))
                    if token >= have
                }
            assert arriving(made, shard.rank) == Counter(wanted)
        for r in made.regions:
            holder, taker = source.shard(r.source_rank), target.shard(r.target_rank)
            for layout, shard in ((source, holder), (target, taker)):
                assert shard.layers.contains(r.layers)
                assert shard.heads.contains(r.heads)
                assert any(s.contains(r.tokens) for s in layout.tokens_of(shard, total))
            assert r.tokens.begin % made.unit == 0
            assert r.tokens.end % made.unit == 0 or r.tokens.end == end


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_both_ends_see_the_same_regions_in_the_same_order(data: st.DataObject) -> None:
    a, b = data.draw(cache_pairs())
    total = data.draw(st.integers(1, 50))
    plans = plan_cache(a, b, Span(0, total), total)
    for source, target, made in zip(a.groups, b.groups, plans, strict=True):
        for rank in target.shards:
            expected = [r for r in made.regions if r.target_rank == rank.rank]
            assert list(made.for_target(rank.rank)) == expected
        for rank in source.shards:
            expected = [r for r in made.regions if r.source_rank == rank.rank]
            assert list(made.for_source(rank.rank)) == expected
        assert len(set(made.regions)) == len(made.regions)
    assert plans == plan_cache(a, b, Span(0, total), total)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_replicas_send_alike_to_within_one_layer(data: st.DataObject) -> None:
    a, b = data.draw(cache_pairs())
    total = data.draw(st.integers(1, 50))
    for source, made in zip(a.groups, plan_cache(a, b, Span(0, total), total), strict=True):
        loads: Counter[int] = Counter()
        for r in made.regions:
            loads[r.source_rank] += len(r.layers) * len(r.heads) * len(r.tokens)
        replicas: defaultdict[object, list[Shard]] = defaultdict(list)
        for shard in source.shards:
            replicas[shard.layers, shard.heads, shard.cp_rank].append(shard)
        for equal in replicas.values():
            held = sum(map(len, source.tokens_of(equal[0], total)))
            sent = [loads[shard.rank] for shard in equal]
            assert max(sent) - min(sent) <= len(equal[0].heads) * held


@pytest.mark.parametrize(
    ("heads", "layers", "source", "target"),
    [
        (2, 4, {"tp": 4}, {"tp": 2}),
        (1, 6, {"tp": 2}, {"pp": 4}),
        (1, 2, {"tp": 2, "cp": 2}, {"pp": 2, "cp": 2}),
    ],
    ids=["as-many-layers", "stages-of-one-and-two", "with-cp"],
)
def test_replicas_that_can_share_evenly_do(
    heads: int, layers: int, source: dict[str, int], target: dict[str, int]
) -> None:
    shape = KVShape(layers=layers, kv_heads=heads, head_size=8, dtype="float32")
    ours, theirs = uniform(shape, 16, **source), uniform(shape, 16, **target)  # type: ignore[arg-type]
    made = plan(ours, theirs, Span(0, 64), 64)
    work = {
        sum(len(r.layers) * len(r.tokens) for r in made.for_source(shard.rank))
        for shard in ours.shards
    }
    assert len(work) == 1


def test_a_wide_box_counts_for_more_than_a_narrow_one() -> None:
    shape = KVShape(layers=2, kv_heads=4, head_size=8, dtype="float32")
    boxes = ((Span(0, 1), Span(0, 4)), (Span(1, 2), Span(0, 1)), (Span(1, 2), Span(1, 4)))
    shards = tuple(Shard(rank=i, layers=x, heads=y) for i, (x, y) in enumerate(boxes))
    whole = Shard(rank=0, layers=Span(0, 2), heads=Span(0, 4))
    source = KVLayout(shape=shape, block_size=16, shards=(whole, replace(whole, rank=1)))
    target = KVLayout(shape=shape, block_size=16, shards=shards)
    made = plan(source, target, Span(0, 16), 16)
    work = [sum(len(r.layers) * len(r.heads) for r in made.for_source(rank)) for rank in (0, 1)]
    assert work == [4, 4]


def test_a_latent_on_eight_ranks_goes_to_eight_without_a_favourite() -> None:
    shape = KVShape(layers=61, kv_heads=1, head_size=576, dtype="bfloat16", planes=1)
    made = plan(uniform(shape, 64, tp=8), uniform(shape, 64, tp=8), Span(0, 4096), 4096)
    work = [sum(len(r.layers) for r in made.for_source(rank)) for rank in range(8)]
    assert max(work) - min(work) <= 1
    first = {made.for_target(rank)[0].source_rank for rank in range(8)}
    assert len(first) == 8
