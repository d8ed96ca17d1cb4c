"""Owns the choice whether a decode instance computes a request's prompt itself; pure, no clock.

Disaggregated, a prompt waits for what its prefill instance owes already, is computed there, and its
KV is sent. Computed at decode it waits for nothing but other such prompts, and nothing is sent, but
its pieces make the steps of the sequences that run there longer. So there is a bound on what may be
computed there of a prompt, and below it the way is taken that is expected to be done first.

What either takes is learned from first tokens, of each instance; what is not known of one is taken
to be as with the others. While nothing is known of a way it is tried, and one that looks worse is
tried again after a while.
"""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from router.membership import Instance
from router.views import (
    CachedTokens,
    DecodeView,
    InstanceKey,
    Need,
    Placement,
    PrefillView,
)

# How much of a mean each further value is.
_WEIGHT = 0.1
# By how much each short prompt that goes one way makes the other one look better: a bad beginning,
# as that of an instance that has just started, is forgotten, and the way tried again.
_FORGETTING = 0.02
# A prompt computed at prefill that says something of its rate. Short ones take what a step takes.
_TELLING_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds that the two ways take; None where it is not known.

    Attributes:
        prefill_token_s: Each token that is computed at prefill, in a long prompt.
        prefill_s: Computing a short prompt at prefill.
        handoff_s: From the end of compute until decode has all of the KV.
        local_step_s: A step at decode with a piece of a prompt.
    """

    prefill_token_s: float | None = None
    prefill_s: float | None = None
    handoff_s: float | None = None
    local_step_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the two ways have to do before a request's decoding begins, in tokens.

    Attributes:
        owed: What the prefill instance has yet to compute for others.
        prefill: What it would compute of this prompt.
        local_owed: What the decode instance has yet to compute of others' prompts.
        local: What it would compute of this one.
        local_step: What it computes in a step at most.
    """

    owed: int
    prefill: int
    local_owed: int
    local: int
    local_step: int


def disaggregated_s(work: Work, costs: Costs) -> float | None:
    """Returns the seconds until decode could begin with a prompt that prefill computes."""
    if costs.prefill_s is None or costs.handoff_s is None:
        return None
    token_s = costs.prefill_token_s or 0.0
    return work.owed * token_s + max(costs.prefill_s, work.prefill * token_s) + costs.handoff_s


def local_s(work: Work, costs: Costs) -> float | None:
    """Returns the seconds until decode has computed a prompt itself."""
    if costs.local_step_s is None:
        return None
    return -(-(work.local_owed + work.local) // work.local_step) * costs.local_step_s


def is_local(work: Work, costs: Costs, max_tokens: int) -> bool:
    """Returns whether decode is to compute a prompt, of at most `max_tokens`, itself."""
    if work.local > max_tokens or work.local_step <= 0:
        return False
    here, there = local_s(work, costs), disaggregated_s(work, costs)
    if there is None:
        return False
    return here is None or here < there


class _Learned:
    """A mean of each instance, which begins as that of all."""

    def __init__(self) -> None:
        self._of_all: float | None = None
        self._own: dict[InstanceKey, float] = {}

    def of(self, key: InstanceKey | None) -> float | None:
        return self._own.get(key, self._of_all) if key is not None else self._of_all

    def add(self, key: InstanceKey, value: float) -> None:
        self._own[key] = _mean(self.of(key), value)
        self._of_all = _mean(self._of_all, value)

    def look_better(self) -> None:
        """Forget a part of it: each instance as much of its own as is its share of the work."""
        for key in self._own:
            self._own[key] *= 1 - _FORGETTING / len(self._own)
        if self._of_all is not None:
            self._of_all *= 1 - _FORGETTING

    def keep(self, keys: AbstractSet[InstanceKey]) -> None:
        """Forget all other instances."""
        self._own = {key: value for key, value in self._own.items() if key in keys}


class LocalPrefill:
    """Turns a policy's placements into local ones, and learns what the two ways take.

    Args:
        max_tokens: Tokens of a prompt that decode may compute at most; 0: it computes none.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._prefill_token_s = _Learned()
        self._prefill_s = _Learned()
        self._handoff_s = _Learned()
        self._local_step_s = _Learned()
        self._owed: dict[InstanceKey, int] = {}

    @property
    def is_on(self) -> bool:
        return self._max_tokens > 0

    # ---- the choice

    def choose(
        self,
        placement: Placement | None,
        prefills: Sequence[PrefillView],
        decodes: Sequence[DecodeView],
        need: Need,
        cached_tokens: CachedTokens,
    ) -> Placement | None:
        """Returns the placement that the policy chose, or one without prefill.

        Where there is none, since no prefill instance takes the request, it may fit all the same.
        """
        if not self._max_tokens or not need.decodes:
            return placement
        if placement is None:
            return self._without_prefill(decodes, need, cached_tokens)
        decode = _find(decodes, placement)
        if decode is None or not decode.capacity.local_prefill_tokens:
            return placement
        cached = _usable(decode, need, cached_tokens)
        prefill = next((view for view in prefills if view.key == placement.prefill), None)
        work = Work(
            owed=prefill.outstanding_tokens if prefill is not None else 0,
            prefill=need.prompt_tokens - placement.cached_tokens,
            local_owed=self._owed.get(decode.key, 0) // decode.capacity.dp,
            local=need.prompt_tokens - cached,
            local_step=decode.capacity.local_prefill_tokens,
        )
        costs = self.costs(placement.prefill, placement.decode)
        if not is_local(work, costs, self._max_tokens):
            return placement
        return replace(placement, prefill=None, cached_tokens=cached, cp_first=None)

    def can_do_without(
        self, decodes: Sequence[DecodeView], need: Need, cached_tokens: CachedTokens
    ) -> bool:
        """Whether some decode instance could compute the prompt, had it room."""
        return need.decodes and any(
            self._may_compute(view, _usable(view, need, cached_tokens), need) for view in decodes
        )

    def _without_prefill(
        self, decodes: Sequence[DecodeView], need: Need, cached_tokens: CachedTokens
    ) -> Placement | None:
        able = [
            (need.prompt_tokens - cached + self._owed.get(view.key, 0), view.load, cached, view)
            for view in decodes
            if view.fits(need)
            and self._may_compute(view, cached := _usable(view, need, cached_tokens), need)
        ]
        if not able:
            return None
        _, _, cached, decode = min(able, key=lambda each: each[:2])
        return Placement(
            prefill=None, decode=decode.key, cached_tokens=cached, dp_rank=decode.dp_rank
        )

    def _may_compute(self, view: DecodeView, cached: int, need: Need) -> bool:
        if not view.capacity.local_prefill_tokens:
            return False
        return need.prompt_tokens - cached <= self._max_tokens

    # ---- what is under way

    def began(self, placement: Placement, need: Need) -> None:
        """A placement has been booked."""
        if placement.prefill is None and placement.decode is not None:
            tokens = need.prompt_tokens - placement.cached_tokens
            self._owed[placement.decode] = self._owed.get(placement.decode, 0) + tokens

    def ended(self, placement: Placement, need: Need) -> None:
        """Its prompt is computed, or nobody wants it any more."""
        if placement.prefill is None and placement.decode is not None:
            tokens = need.prompt_tokens - placement.cached_tokens
            self._owed[placement.decode] -= tokens
            if not self._owed[placement.decode]:
                del self._owed[placement.decode]

    def owed(self, key: InstanceKey) -> int:
        """Tokens of prompts that a decode instance has yet to compute."""
        return self._owed.get(key, 0)

    # ---- what it takes

    def costs(self, prefill: InstanceKey | None, decode: InstanceKey | None) -> Costs:
        """Returns what is known of two instances; None: of all."""
        return Costs(
            prefill_token_s=self._prefill_token_s.of(prefill),
            prefill_s=self._prefill_s.of(prefill),
            handoff_s=self._handoff_s.of(prefill),
            local_step_s=self._local_step_s.of(decode),
        )

    def keep(self, keys: AbstractSet[InstanceKey]) -> None:
        """Forget what all other instances take."""
        for learned in (
            self._prefill_token_s,
            self._prefill_s,
            self._handoff_s,
            self._local_step_s,
        ):
            learned.keep(keys)

    def computed_at_prefill(self, key: InstanceKey, tokens: int, seconds: float) -> None:
        """Take note of a first token from prefill, for which so many tokens were computed."""
        if tokens >= _TELLING_TOKENS:
            self._prefill_token_s.add(key, seconds / tokens)
        elif tokens > 0:
            self._prefill_s.add(key, seconds)
            self._local_step_s.look_better()

    def sent(self, key: InstanceKey, seconds: float) -> None:
        """Take note that all of a prompt's KV came from prefill so long after it was computed."""
        self._handoff_s.add(key, seconds)

    def computed_at_decode(self, instance: Instance, tokens: int, seconds: float) -> None:
        """Take note of a first token from decode, for which so many tokens were computed."""
        steps = -(-tokens // max(1, instance.capacity.local_prefill_tokens))
        if steps > 0:
            self._local_step_s.add(instance.key, seconds / steps)
            self._prefill_s.look_better()
            self._handoff_s.look_better()


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _WEIGHT * (value - before)


def _find(decodes: Iterable[DecodeView], placement: Placement) -> DecodeView | None:
    wanted = placement.decode, placement.dp_rank
    return next((view for view in decodes if (view.key, view.dp_rank) == wanted), None)


def _usable(view: DecodeView, need: Need, cached_tokens: CachedTokens) -> int:
    """Returns how many tokens decode need not compute; the last one's logits it needs."""
    return min(cached_tokens(view.key, view.dp_rank), need.prompt_tokens - 1)
