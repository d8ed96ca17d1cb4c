"""Placement by expected times: to the first token, for the hand-over, and for each token after it.

A prefill instance is done with a prompt once its busiest rank has computed what it owes and what is
not cached of this one. The KV then follows as far as computing has not hidden its transfer. A
decode instance's step grows with its sequences and the tokens that they hold; one more is waited
for by all that are there, at each of its tokens. What is least in sum is taken.
"""

from collections.abc import Sequence
from math import inf
from statistics import fmean
from typing import NamedTuple

from router.policies.fitting import Fitting, beginnings, fit
from router.policies.least_loaded import first_done, roomiest
from router.views import (
    UNKNOWN_LINK,
    CachedTokens,
    DecodeView,
    InstanceKey,
    Need,
    Placement,
    PrefillView,
)
from service.step_fit import StepSpeed

# Of each role, so many of the best are looked at in pairs, for the ways between them.
_PAIRED = 3
# What a way carries that nobody has measured: as a slow network does.
_ASSUMED_BYTES_PER_S = 1e9
# What differs by less is alike: speeds are measured, and not to the last percent. Of those alike
# the least loaded is taken, by a stable order, so that beginnings are found where they were before.
_ALIKE = 1.05
# How much of a limit is aimed at: what is expected is not what comes.
_MARGIN = 0.8


class _First(NamedTuple):
    """A prefill instance for one request, which begins at cp rank `first`.

    `late` is how far it misses the limit, in parts of it; `cost_s` is to be small; `compute_s` the
    prompt alone takes.
    """

    view: PrefillView
    first: int
    late: float
    cost_s: float
    compute_s: float


class _Then(NamedTuple):
    """A decode instance for one request: its step then, and what each token costs in all."""

    view: DecodeView
    held_tokens: int
    step_s: float
    cost_s: float


class Expected:
    """The placement with the least expected times among those that keep the request's limits.

    Where none keeps them, the least late. What an instance computes for the prompt counts
    `work_weight` times besides: those that come later wait for it too. As long as no instance of a
    role has said how fast it is, the least loaded is taken.
    """

    def __init__(self, *, work_weight: float = 0.5) -> None:
        self._work_weight = work_weight

    def choose(
        self,
        prefills: Sequence[PrefillView],
        decodes: Sequence[DecodeView],
        need: Need,
        cached_tokens: CachedTokens,
    ) -> Placement | None:
        fitting = fit(prefills, decodes, need, cached_tokens)
        if fitting is None:
            return None
        paired = _PAIRED if len(fitting.able) > 1 and len(fitting.roomy) > 1 else 1
        firsts = self._firsts(fitting, paired)
        thens = _thens(fitting, paired) if need.decodes else []
        if thens:
            _, _, i, j = min(
                (*_together(first, then, need), i, j)
                for i, first in enumerate(firsts)
                for j, then in enumerate(thens)
            )
            return fitting.placement(firsts[i].view, thens[j].view, first=firsts[i].first)
        return fitting.placement(firsts[0].view, roomiest(fitting), first=firsts[0].first)

    def _firsts(self, fitting: Fitting, most: int) -> list[_First]:
        """Returns the prefill instances that are best for a prompt, best first."""
        able, need, cached = fitting.able, fitting.need, fitting.cached
        # Most have nothing of the prompt, and are compared by what is known of them beforehand.
        weighed = need.prompt_tokens * (1 + self._work_weight)
        scores = [p.ready_s + weighed * p.rank_token_s for p in able]
        likely = _likely(scores, most)
        closer = {able[i].key: able[i] for i in likely if scores[i] < inf}
        closer |= {p.key: p for p in fitting.knowing}
        usual_s = 0.0
        if inf in scores:
            known = [p.rank_token_s for p in able if p.pace.speed is not None]
            if not known:
                view, first = first_done(fitting)
                return [_First(view, first, 0.0, 0.0, 0.0)]
            usual_s = fmean(known)
            closer |= {p.key: p for p, score in zip(able, scores, strict=True) if score == inf}
        firsts = [self._first(p, need, cached.get(p.key, 0), usual_s) for p in closer.values()]
        late, limit_s = min((first.late, first.cost_s) for first in firsts)
        firsts = [
            first._replace(cost_s=limit_s)
            if first.late == late and first.cost_s <= _ALIKE * limit_s
            else first
            for first in firsts
        ]
        firsts.sort(key=lambda first: (first.late, first.cost_s, first.view.load))
        return firsts[:most]

    def _first(self, view: PrefillView, need: Need, cached_tokens: int, usual_s: float) -> _First:
        token_s = view.rank_token_s if view.pace.speed is not None else usual_s
        if view.capacity.cp == 1:
            tokens, first = view.owed_tokens[0] + need.prompt_tokens - cached_tokens, 0
        else:
            tokens, first = min(
                (view.tokens_until(need.prompt_tokens, cached_tokens, first), first)
                for first in beginnings(view, need)
            )
        compute_s = (need.prompt_tokens - cached_tokens) * token_s / view.capacity.cp
        ttft_s = view.step_s + tokens * token_s
        late = max(0.0, ttft_s / (_MARGIN * need.ttft_s) - 1)
        return _First(view, first, late, ttft_s + self._work_weight * compute_s, compute_s)


def _likely(scores: Sequence[float], most: int) -> list[int]:
    """Returns the places of the best; among many that are alike, of those that come first."""
    limit = _ALIKE * min(scores)
    alike = [i for i, score in enumerate(scores) if score <= limit]
    if len(alike) > most:
        return alike[:most]
    return sorted(range(len(scores)), key=scores.__getitem__)[:most]


def _thens(fitting: Fitting, most: int) -> list[_Then]:
    """Returns the decode instances that are best for a sequence, and all that know its prompt.

    None where none has said how fast it is.
    """
    need, roomy = fitting.need, fitting.roomy
    known = next((speed for d in roomy if (speed := d.pace.speed) is not None), None)
    if known is None:
        return []
    tokens = need.total_tokens
    scores = [d.crowd_s + tokens * d.crowd_token_s for d in roomy]
    order = range(len(roomy))
    if need.tpot_s < inf:
        limit_s = _MARGIN * need.tpot_s
        steps = [d.step_s + tokens * d.token_s for d in roomy]
        likely = sorted(order, key=lambda i: (max(limit_s, steps[i]), scores[i]))[:most]
    else:
        likely = _likely(scores, most)
    # A beginning that is there already saves its transfer, and no more than that.
    closer = {_place(view): (view, held) for view, held in fitting.known_at_decode()}
    if inf in scores:
        likely += [i for i in order if scores[i] == inf]
    closer |= {place: (roomy[i], 0) for i in likely if (place := _place(roomy[i])) not in closer}
    thens = [_then(view, need, held, known) for view, held in closer.values()]
    least_s = min(then.cost_s for then in thens)
    thens = [
        then._replace(cost_s=least_s) if then.cost_s <= _ALIKE * least_s else then for then in thens
    ]
    thens.sort(key=lambda then: then.view.load)
    return thens


def _place(view: DecodeView) -> tuple[InstanceKey, int]:
    return view.key, view.dp_rank


def _then(view: DecodeView, need: Need, held_tokens: int, known: StepSpeed) -> _Then:
    if view.pace.speed is None:  # taken to be like another one
        view = view.at_pace(known)
    tokens = need.total_tokens
    return _Then(
        view,
        held_tokens,
        view.step_s + tokens * view.token_s,
        view.crowd_s + tokens * view.crowd_token_s,
    )


def _together(first: _First, then: _Then, need: Need) -> tuple[float, float]:
    """Returns how far two instances together miss the limits, and what they cost in seconds."""
    way = first.view.pace.links.get(then.view.key.name, UNKNOWN_LINK)
    lacking = (need.prompt_tokens - then.held_tokens) * first.view.capacity.token_bytes
    transfer_s = lacking / (way.bytes_per_s or _ASSUMED_BYTES_PER_S)
    handoff_s = max(0.0, transfer_s - first.compute_s) + way.rtt_s
    new = max(1, need.max_new_tokens - 1)  # the first one is prefill's, unless it is all
    late = max(0.0, (then.step_s + handoff_s / new) / (_MARGIN * need.tpot_s) - 1)
    return first.late + late, first.cost_s + handoff_s + new * then.cost_s
