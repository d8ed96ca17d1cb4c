"""Layouts: who holds what, which of them are refused, and plans of known layouts."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.errors import LayoutMismatch
from kvtransfer.layout import (
    CacheLayout,
    CpOrder,
    KVLayout,
    KVShape,
    Shard,
    Span,
    check_compatible,
    compatibility_hash,
    uniform,
    uniform_cache,
)
from kvtransfer.plan import Region, plan, plan_cache
from tests.unit.kvtransfer.layouts import layouts, shapes

SHAPE = KVShape(layers=4, kv_heads=4, head_size=8, dtype="bfloat16")
LATENT = KVShape(name="latent", layers=4, kv_heads=1, head_size=8, dtype="bfloat16", planes=1)
STATE = replace(LATENT, name="state", kv_heads=8, state=True)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_token_shares_partition_the_group_at_the_grain(data: st.DataObject) -> None:
    layout = data.draw(layouts(data.draw(shapes()), data.draw(st.sampled_from([1, 4, 6]))))
    total = data.draw(st.integers(1, 100))
    one_holding = {s.cp_rank: s for s in layout.shards}.values()
    spans = sorted(s for shard in one_holding for s in layout.tokens_of(shard, total))
    whole, end = layout.group_tokens(Span(0, total), total)
    assert [t for span in spans for t in span] == list(whole)
    assert whole == Span(0, end)
    assert all(span.begin % layout.grain == 0 for span in spans)


def test_zigzag_pairs_early_and_late_chunks() -> None:
    layout = uniform(SHAPE, 4, cp=2, cp_order="zigzag")
    assert layout.tokens_of(layout.shard(0), 32) == (Span(0, 8), Span(24, 32))
    assert layout.tokens_of(layout.shard(1), 32) == (Span(8, 24),)


@pytest.mark.parametrize(
    ("order", "total", "holder"),
    [("contiguous", 64, 3), ("contiguous", 20, 2), ("zigzag", 64, 0), ("zigzag", 24, 2)],
)
def test_a_state_is_held_where_the_last_token_is(order: CpOrder, total: int, holder: int) -> None:
    kv, state = uniform_cache((SHAPE, STATE), 4, cp=4, cp_order=order).groups
    of_last = [s.rank for s in kv.shards if any(total - 1 in x for x in kv.tokens_of(s, total))]
    assert of_last == [holder]
    assert [s.rank for s in state.shards if state.tokens_of(s, total)] == [holder]
    assert state.tokens_of(state.shard(holder), total) == (Span(0, 1),)


def test_a_state_goes_with_the_last_token_only() -> None:
    state = uniform(STATE, 16)
    assert state.group_tokens(Span(0, 70), 70) == (Span(0, 1), 1)
    assert state.group_tokens(Span(64, 70), 70) == (Span(0, 1), 1)
    assert state.group_tokens(Span(0, 64), 70) == (Span(0, 0), 1)
    assert state.group_tokens(Span(70, 70), 70) == (Span(0, 0), 1)


def test_a_window_begins_at_a_whole_block_of_the_target() -> None:
    shape = replace(SHAPE, window=20)
    small, large = uniform(shape, 8), uniform(shape, 16)
    made = plan(small, large, Span(0, 70), 70)
    assert [region.tokens for region in made.regions] == [Span(48, 70)]
    assert [r.tokens for r in plan(large, small, Span(0, 70), 70).regions] == [Span(48, 70)]
    assert [r.tokens for r in plan(small, large, Span(64, 70), 70).regions] == [Span(64, 70)]
    assert plan(small, large, Span(0, 32), 70).regions == ()
    assert [r.tokens for r in plan(small, large, Span(0, 16), 16).regions] == [Span(0, 16)]


def test_heads_are_replicated_when_tp_exceeds_them() -> None:
    shards = uniform(SHAPE, 16, tp=8).shards
    assert [s.heads for s in shards] == [Span(h, h + 1) for h in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert {s.heads for s in uniform(LATENT, 16, tp=8).shards} == {Span(0, 1)}


def test_each_group_is_split_over_stages_for_itself() -> None:
    cache = uniform_cache((replace(SHAPE, layers=6), replace(STATE, layers=3)), 16, pp=3)
    kv, state = cache.groups
    assert [s.layers for s in kv.shards] == [Span(0, 2), Span(2, 4), Span(4, 6)]
    assert [s.layers for s in state.shards] == [Span(0, 1), Span(1, 2), Span(2, 3)]


def test_a_dp_rank_keeps_the_numbers_of_its_ranks() -> None:
    cache = uniform_cache((SHAPE, LATENT), 16, tp=2, pp=2, dp=3)
    second = cache.dp_rank(1, 3)
    assert second.ranks == (4, 5, 6, 7)
    assert second == cache.of_ranks(range(4, 8))
    source = uniform_cache((SHAPE, LATENT), 16, tp=4)
    for made in plan_cache(source, second, Span(0, 64), 64):
        assert {r.target_rank for r in made.regions} == set(second.ranks)
    for wrong in ((3, 3), (0, 5)):
        with pytest.raises(ValueError, match="dp rank"):
            cache.dp_rank(*wrong)
    with pytest.raises(ValueError, match="shards"):
        cache.of_ranks([0, 1])


def test_layouts_with_gaps_or_overlaps_are_refused() -> None:
    gap = (Shard(rank=0, layers=Span(0, 3), heads=Span(0, 4)),)
    overlap = (
        Shard(rank=0, layers=Span(0, 4), heads=Span(0, 3)),
        Shard(rank=1, layers=Span(0, 4), heads=Span(2, 3)),
    )
    for shards in (gap, overlap):
        with pytest.raises(ValueError, match=r"shards|overlap"):
            KVLayout(shape=SHAPE, block_size=16, shards=shards)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"name": ""}, "name"),
        ({"name": "a b"}, "name"),
        ({"planes": 0}, "positive"),
        ({"layers": 0}, "positive"),
        ({"dtype": "int3"}, "unknown"),
        ({"window": 0}, "window"),
        ({"window": 4, "state": True}, "window"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(wrong: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(SHAPE, **wrong)  # type: ignore[arg-type]


def test_caches_that_make_no_sense_are_refused() -> None:
    one = uniform(SHAPE, 16)
    for groups, match in (
        ((), "1 to 255"),
        ((one, one), "names"),
        ((one, uniform(LATENT, 16, tp=2)), "other ranks"),
    ):
        with pytest.raises(ValueError, match=match):
            CacheLayout(groups)
    with pytest.raises(ValueError, match="1 for a state"):
        replace(uniform(STATE, 16), block_size=2)
    with pytest.raises(ValueError, match="cp_grain"):
        replace(one, cp_grain=24)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"head_size": 16}, "head_size of cache group 'kv' differs: 8 here, 16 there"),
        ({"name": "other"}, "name of cache group 'kv' differs"),
        ({"planes": 1}, "planes of cache group 'kv' differs"),
        ({"window": 8}, "window of cache group 'kv' differs: None here, 8 there"),
        ({"dtype": "float16"}, "dtype of cache group 'kv' .* not supported yet"),
    ],
)
def test_incompatible_caches_are_refused_by_name(change: dict[str, object], match: str) -> None:
    ours = uniform_cache((LATENT, SHAPE), 16)
    theirs = uniform_cache((LATENT, replace(SHAPE, **change)), 16)  # type: ignore[arg-type]
    with pytest.raises(LayoutMismatch, match=match):
        check_compatible(ours, theirs)


def test_compatible_caches_may_differ_in_ranks_and_block_sizes_that_divide() -> None:
    ours = uniform_cache((SHAPE, STATE), 16)
    check_compatible(ours, uniform_cache((SHAPE, STATE), 32, tp=2))
    check_compatible(uniform_cache((SHAPE, STATE), 32, cp=2), ours)
    with pytest.raises(LayoutMismatch, match="block_size of cache group 'kv' differs: 16"):
        check_compatible(ours, uniform_cache((SHAPE, STATE), 24))
    with pytest.raises(LayoutMismatch, match="groups differ: 2 here, 1 there"):
        check_compatible(ours, uniform_cache((SHAPE,), 16))


def test_compatibility_hash_depends_on_each_part() -> None:
    changes = (
        {"name": "k"},
        {"layers": 5},
        {"kv_heads": 2},
        {"head_size": 4},
        {"dtype": "float16"},
        {"planes": 1},
        {"window": 8},
        {"state": True},
    )
    hashes = [
        compatibility_hash(1, "a", [SHAPE]),
        compatibility_hash(2, "a", [SHAPE]),
        compatibility_hash(1, "b", [SHAPE]),
        compatibility_hash(1, "a", [SHAPE, LATENT]),
        compatibility_hash(1, "a", [LATENT, SHAPE]),
        *(compatibility_hash(1, "a", [replace(SHAPE, **c)]) for c in changes),
    ]
    assert set(Counter(hashes).values()) == {1}
    assert {len(h) for h in hashes} == {32}
    assert compatibility_hash(1, "a", [replace(SHAPE)]) == hashes[0]


def test_equal_layouts_hash_alike() -> None:
    a, b = (uniform_cache((SHAPE, STATE), 16, tp=2) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != uniform_cache((SHAPE, STATE), 16, tp=4)


def test_a_prefix_that_decode_has_is_left_out() -> None:
    layout = uniform(SHAPE, 16)
    made = plan(layout, layout, Span(32, 70), 70)
    assert made.regions == (Region(0, 0, Span(0, 4), Span(0, 4), Span(32, 70)),)


def test_layers_of_which_the_same_is_kept_stay_together() -> None:
    layout = uniform(SHAPE, 16)
    made = plan(layout, layout, Span(0, 70), 70, kept=(70, 32, 40, 0))
    assert [(r.layers, r.tokens) for r in made.regions] == [
        (Span(1, 3), Span(32, 70)),
        (Span(3, 4), Span(0, 70)),
    ]
    made = plan(layout, layout, Span(48, 70), 70, kept=(0, 16, 32, 48))
    assert [(r.layers, r.tokens) for r in made.regions] == [(Span(0, 4), Span(48, 70))]


def test_tokens_off_the_grain_are_refused() -> None:
    layout = uniform(SHAPE, 16)
    for tokens, total in ((Span(8, 32), 32), (Span(0, 24), 32), (Span(0, 64), 32)):
        with pytest.raises(ValueError, match="tokens"):
            plan(layout, layout, tokens, total)


def test_a_kept_that_does_not_fit_is_refused() -> None:
    cache = uniform_cache((SHAPE, STATE), 16)
    good: tuple[tuple[int, ...], ...] = ((0, 16, 32, 64), (0, 1, 0, 1))
    assert len(plan_cache(cache, cache, Span(0, 64), 64, good)) == 2
    for wrong in (good[:1], ((0,), good[1]), ((0, 0, 0, 65), good[1]), (good[0], (0, 0, 0, 2))):
        with pytest.raises(ValueError, match="kept"):
            plan_cache(cache, cache, Span(0, 64), 64, wrong)


@pytest.mark.parametrize("grain", [4, 12])
def test_cyclic_shares_do_not_depend_on_what_follows(grain: int) -> None:
    layout = uniform(SHAPE, 4, cp=3, cp_order="cyclic", cp_grain=grain)
    owners = [0, 1, 2, 2, 1, 0, 0, 1, 2]
    for total in range(1, len(owners) * grain + 1):
        for shard in layout.shards:
            held = {token for span in layout.tokens_of(shard, total) for token in span}
            assert held == {t for t in range(total) if owners[t // grain] == shard.cp_rank}


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "cyclic"])
def test_shares_begin_at_the_given_rank_and_follow_in_order(order: CpOrder) -> None:
    layout = uniform(SHAPE, 4, cp=3, cp_order=order)
    shares = [layout.tokens_of(shard, 50) for shard in layout.shards]
    turned = CacheLayout((layout,)).begun_at(2).groups[0]
    assert [turned.tokens_of(shard, 50) for shard in turned.shards] == [*shares[1:], shares[0]]
    with pytest.raises(ValueError, match="cp_first must be one of the cp ranks"):
        CacheLayout((layout,)).begun_at(3)


def test_cyclic_shares_meet_where_the_dealing_turns() -> None:
    layout = uniform(SHAPE, 4, cp=2, cp_order="cyclic", cp_grain=8)
    spans = [layout.tokens_of(shard, 60) for shard in layout.shards]
    assert spans == [
        (Span(0, 8), Span(24, 40), Span(56, 60)),
        (Span(8, 24), Span(40, 56)),
    ]
