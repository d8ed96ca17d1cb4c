"""Owns what is known of how room comes back, and the wait that follows from it; pure, no clock.

Work at decode is room times the seconds that it is held, and a full pool does as much of it in a
second as it has room, whatever the mix (Little's law). So a request waits for as long as the pool
takes for the work of those before it: not what runs now counts, but what will have been given back
when its turn comes. How long room is held is learned from requests that have ended, however busy
the pools were: a time before the first token, and one for each token that may be generated, by
tenant. The rate at which room came back would say little of a full pool while it was half empty.
Prefill is taken to compute at the rate that it had while requests waited there. Without enough of
either nothing is foretold.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from router.ledger import InstanceKey, Need
from router.queue import Demand

# Ends that are needed before anything is foretold, and about how many the means go back.
MIN_ENDS = 8
_MEMORY_ENDS = 128
# What has not ended for so long, or for so many times what it takes to end, is no evidence.
_STALE_S = 60.0
_STALE_HOLDS = 4.0
# Tenants whose answers are remembered; the one that was first seen is forgotten first.
_MAX_TENANTS = 1024


@dataclass(frozen=True, kw_only=True)
class Load:
    """The pools at one moment, and what a newcomer has before it.

    Room, own room and prompts are in tokens. `owed` is what prefill computes before it comes to
    those who wait at the router.
    """

    before: Demand
    own_tokens: float
    free_tokens: float
    capacity_tokens: float
    free_sequences: float
    capacity_sequences: float
    prefills: tuple[InstanceKey, ...]
    owed: float


class _Mean:
    """A mean of the last ones, by weight; the earlier, the less they count."""

    def __init__(self) -> None:
        self._ends = 0
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        kept = 1 - 1 / _MEMORY_ENDS
        self._ends += 1
        self._sum = kept * self._sum + value * weight
        self._weight = kept * self._weight + weight

    @property
    def value(self) -> float | None:
        """The mean, None as long as there were too few."""
        return self._sum / self._weight if self._ends >= MIN_ENDS and self._weight > 0 else None


class _PrefillRate:
    """Tokens per second of one prefill instance, as long as requests wait there.

    One that has a single short prompt at a time shows nothing of what it can do.
    """

    def __init__(self) -> None:
        self._seconds_per_token = _Mean()
        self._outstanding = 0
        self._since = 0.0

    def begin(self, now: float) -> None:
        if not self._outstanding:
            self._since = now
        self._outstanding += 1

    def end(self, tokens: int, now: float) -> None:
        if self._outstanding > 1 and tokens > 0:
            self._seconds_per_token.add((now - self._since) / tokens, tokens)
        if tokens > 0:
            self._since = now
        self._outstanding -= 1

    @property
    def tokens_per_s(self) -> float | None:
        seconds = self._seconds_per_token.value
        return 1 / seconds if seconds else None


class _PrefillRates:
    """Those of all prefill instances, and what some of them have together."""

    def __init__(self) -> None:
        self._rates: dict[InstanceKey, _PrefillRate] = {}
        # The instances that were last asked about. There are hundreds, of which one changes.
        self._keys: tuple[InstanceKey, ...] = ()
        self._among: frozenset[InstanceKey] = frozenset()
        self._sum = 0.0
        self._unknown = 0

    def begin(self, key: InstanceKey, now: float) -> None:
        self._rates.setdefault(key, _PrefillRate()).begin(now)

    def end(self, key: InstanceKey, tokens: int, now: float) -> None:
        rate = self._rates.get(key)
        if rate is None:
            return
        before = rate.tokens_per_s
        rate.end(tokens, now)
        if key in self._among:
            self._count(before, -1)
            self._count(rate.tokens_per_s, 1)

    def keep(self, keys: set[InstanceKey]) -> None:
        self._rates = {key: rate for key, rate in self._rates.items() if key in keys}
        self._keys, self._among, self._sum, self._unknown = (), frozenset(), 0.0, 0

    def of(self, keys: tuple[InstanceKey, ...]) -> float | None:
        """Returns the tokens per second of these; None where one of them is not known."""
        if keys is not self._keys:
            self._keys, self._among, self._sum, self._unknown = keys, frozenset(keys), 0.0, 0
            for key in keys:
                rate = self._rates.get(key)
                self._count(rate.tokens_per_s if rate is not None else None, 1)
        return self._sum if keys and not self._unknown else None

    def _count(self, tokens_per_s: float | None, sign: int) -> None:
        if tokens_per_s is None:
            self._unknown += sign
        else:
            self._sum += sign * tokens_per_s


class Forecast:
    """Foretells how long a request waits before prefill begins with it."""

    def __init__(self) -> None:
        self._before_decode_s = _Mean()
        self._per_token_s = _Mean()
        self._per_token_of: dict[str, _Mean] = {}
        # By requests, and by the room that they held.
        self._hold_s = _Mean()
        self._token_hold_s = _Mean()
        self._last_end = 0.0
        self._prefills = _PrefillRates()

    @property
    def mean_hold_s(self) -> float | None:
        """How long a request holds its room at decode, None as long as too few have ended."""
        return self._hold_s.value

    def hold_s(self, tenant: str, need: Need) -> float | None:
        """Returns how long a request of a tenant is likely to hold its room, None if unknown."""
        of_all, before_s = self._per_token_s.value, self._before_decode_s.value
        if of_all is None or before_s is None:
            return None
        own = self._per_token_of[tenant].value if tenant in self._per_token_of else None
        return before_s + (of_all if own is None else own) * need.max_new_tokens

    def room_came_back(
        self,
        tenant: str,
        need: Need,
        *,
        tokens: float,
        before_s: float,
        decode_s: float,
        now: float,
    ) -> None:
        """Note that a request gave back so many tokens of room at decode.

        It held them while prefill was not done with it for `before_s`, and then for `decode_s`.
        """
        self._before_decode_s.add(before_s)
        of_tenant = self._per_token_of.setdefault(tenant, _Mean())
        if len(self._per_token_of) > _MAX_TENANTS:
            del self._per_token_of[next(iter(self._per_token_of))]
        for mean in (self._per_token_s, of_tenant):
            mean.add(decode_s / need.max_new_tokens, need.max_new_tokens)
        self._hold_s.add(before_s + decode_s)
        self._token_hold_s.add(before_s + decode_s, tokens)
        self._last_end = now

    def prefill_began(self, key: InstanceKey, now: float) -> None:
        self._prefills.begin(key, now)

    def prefill_ended(self, key: InstanceKey, tokens: int, now: float) -> None:
        """Note that an instance is done with a prompt of which it had so many tokens to compute."""
        self._prefills.end(key, tokens, now)

    def keep_prefills(self, keys: set[InstanceKey]) -> None:
        """Forget all other prefill instances."""
        self._prefills.keep(keys)

    def wait_s(self, load: Load, now: float) -> float | None:
        """Returns the seconds until prefill begins with a request, None where nothing is known."""
        waits = [self._for_prefill(load)]
        if load.own_tokens and not self._is_stale(now):
            waits += [self._for_tokens(load), self._for_sequences(load)]
        known = [wait for wait in waits if wait is not None]
        return max(0.0, *known) if known else None

    def _for_tokens(self, load: Load) -> float | None:
        hold_s = self._token_hold_s.value
        if hold_s is None or load.capacity_tokens <= 0:
            return None
        missing = load.own_tokens - load.free_tokens
        return (load.before.token_s + missing * hold_s) / load.capacity_tokens

    def _for_sequences(self, load: Load) -> float | None:
        hold_s = self._hold_s.value
        if hold_s is None or load.capacity_sequences <= 0:
            return None
        missing = 1 - load.free_sequences
        return (load.before.sequence_s + missing * hold_s) / load.capacity_sequences

    def _is_stale(self, now: float) -> bool:
        stale_s = max(_STALE_S, _STALE_HOLDS * (self._hold_s.value or 0.0))
        return now - self._last_end > stale_s

    def _for_prefill(self, load: Load) -> float | None:
        tokens_per_s = self._prefills.of(load.prefills)
        if tokens_per_s is None:
            return None
        return (load.owed + load.before.prompt_tokens) / tokens_per_s


@dataclass
class Owed:
    """Prompt tokens that prefill has yet to compute, by priority and tenant."""

    _classes: dict[int, dict[str, int]] = field(default_factory=dict)

    def add(self, priority: int, tenant: str, tokens: int) -> None:
        """Note that a tenant is owed more, or less where `tokens` is below 0."""
        amounts = self._classes.setdefault(priority, {})
        amounts[tenant] = amounts.get(tenant, 0) + tokens
        if not amounts[tenant]:
            del amounts[tenant]
        if not amounts:
            del self._classes[priority]

    def before(self, priority: int, tenant: str, tokens: int) -> float:
        """Returns what prefill computes before it is done with a new prompt of so many tokens.

        It shares evenly among the tenants of a class.
        """
        higher = sum(sum(amounts.values()) for p, amounts in self._classes.items() if p > priority)
        amounts: Mapping[str, int] = self._classes.get(priority, {})
        own = amounts.get(tenant, 0)
        in_turn = own + (len(amounts) - (tenant in amounts)) * (own + tokens)
        return higher + min(sum(amounts.values()), in_turn)
