"""A transfer cut off anywhere and finished by a second one is as good as one whole transfer."""

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.coverage import Coverage, kept_by_all, kept_tokens
from kvtransfer.layout import KVShape, Span, uniform
from kvtransfer.plan import Plan, plan
from tests.unit.kvtransfer.layouts import cache_pairs, caches, token_ranges, whole
from tests.unit.kvtransfer.moves import WAYS, Message, Side, carry, messages, move

Elements = Counter[tuple[int, int, int, int]]


def cut_off(
    made: Plan, source: Side, target: Side, rng: random.Random, *, way: str, in_order: bool
) -> tuple[dict[int, list[Coverage]], Elements]:
    """Carry out the plan up to a random message; return each target rank's coverage by source."""
    coverage = {
        (s, t): Coverage([r for r in made.for_target(t) if r.source_rank == s], made.unit)
        for s in source.ranks
        for t in target.ranks
    }
    cut = messages(made.regions, made.unit, rng)
    if in_order:
        cut.sort(key=lambda m: m.tokens.begin)
    carried = cut[: rng.randint(0, len(cut))]
    for message in carried:
        region = message.region
        owed = coverage[region.source_rank, region.target_rank]
        assert owed.take(message.layers, region.heads, message.tokens) is None
        carry(message, made.unit, source, target, way)
    of_target = {t: [coverage[s, t] for s in source.ranks] for t in target.ranks}
    return of_target, elements(carried)


def elements(carried: list[Message]) -> Elements:
    """Every (target rank, layer, head, token) in the messages."""
    return Counter(
        (m.region.target_rank, layer, head, token)
        for m in carried
        for layer in m.layers
        for head in m.region.heads
        for token in m.tokens
    )


def all_of(made: Plan) -> Elements:
    """Every element of a plan."""
    return elements([Message(r, r.layers, r.tokens) for r in made.regions])


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_cut_off_and_resumed_is_as_good_as_whole(data: st.DataObject) -> None:
    a, b = data.draw(cache_pairs())
    grain = max(group.block_size for group in b.groups)
    sizes = st.sampled_from([s for s in (1, 2, 4, 8) if grain % s == 0 or s % grain == 0])
    second = data.draw(caches(tuple(g.shape for g in b.groups), data.draw(sizes)))
    total = data.draw(st.integers(1, 50))
    tokens = data.draw(token_ranges(total, a, b, second))
    rng = random.Random(data.draw(st.integers(0, 1000)))
    way, in_order = data.draw(st.sampled_from(WAYS)), data.draw(st.booleans())
    for first_layout, second_layout, layout in zip(a.groups, second.groups, b.groups, strict=True):
        cache = whole(layout.shape, total, seed=1)
        first, other = (Side.make(x, total, rng).fill(cache) for x in (first_layout, second_layout))
        target = Side.make(layout, total, rng)
        made = plan(first_layout, layout, tokens, total)
        coverage, carried = cut_off(made, first, target, rng, way=way, in_order=in_order)
        kept = kept_by_all([kept_tokens(layout, tokens, total, of) for of in coverage.values()])
        rest = plan(second_layout, layout, tokens, total, kept)
        move(rest, other, target, rng, way)
        target.check(cache, tokens)
        # Of the whole, the second sends all that is not kept; what is kept has arrived.
        end = layout.group_tokens(tokens, total)[1]
        floors = [k if k == end else k // rest.unit * rest.unit for k in kept]
        everything, again = all_of(made), all_of(rest)
        assert again == Counter(e for e in everything if e[3] >= floors[e[1]])
        assert everything - again <= carried


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_what_arrived_in_order_is_not_sent_twice(data: st.DataObject) -> None:
    shape = KVShape(layers=3, kv_heads=2, head_size=4, dtype="float32")
    source_size, target_size = data.draw(st.sampled_from([(4, 4), (2, 4), (8, 4)]))
    source, target = uniform(shape, source_size), uniform(shape, target_size)
    total = data.draw(st.integers(1, 40))
    tokens, rng = Span(0, total), random.Random(data.draw(st.integers(0, 1000)))
    made = plan(source, target, tokens, total)
    cut = sorted(messages(made.regions, made.unit, rng), key=lambda m: m.tokens.begin)
    carried = cut[: data.draw(st.integers(0, len(cut)))]
    coverage = Coverage(made.regions, made.unit)
    for message in carried:
        assert coverage.take(message.layers, message.region.heads, message.tokens) is None
    kept = kept_tokens(target, tokens, total, [coverage])
    again = all_of(plan(source, target, tokens, total, kept))
    assert again + elements(carried) == all_of(made)
