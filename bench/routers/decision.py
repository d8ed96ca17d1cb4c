"""How long it takes to place one request: queue, shares, forecast, policy and ledger.

No process and no socket: the pure parts alone, with as much in them as a large cluster has.
"""

import itertools
import random
import time
from collections import deque
from collections.abc import Callable

from bench.report import Row, median_and_spread
from bench.routers.settings import Settings
from router.fairness import Tenants
from router.gate import Gate
from router.ledger import Capacity, InstanceKey, Ledger, Placement
from router.membership import Instance, Layout, Model, Role
from router.policies import POLICIES, PolicyName
from router.prefix_index import PrefixEvents, PrefixIndex
from router.queue import Waiting
from router.request import Sampling, Stop, ValidRequest
from router.views import Link, Pace
from service.prefix_keys import PrefixKeys, prefix_salt, short_key
from service.step_fit import StepSpeed

_BLOCK = 32
_SEQUENCES = 256
_BLOCKS = 1 << 14
_SEED = b"seed"
# Beginnings of prompts that some instances have, and how many instances each of them is at.
_BEGINNINGS = 64
_HOLDERS = 8
_KNOWN_BLOCKS = 16
# Requests whose prompts prefill has not computed yet.
_PREFILLING = 256
_FAR = 1e9
_TENANTS = 16
# Between two requests.
_STEP_S = 0.01


class Cluster:
    """A ledger with `instances` of both roles, half of each, and `running` requests on them.

    With `caches` each of them has told of its prefix cache, and every prompt begins as some of
    them know; else nobody has a cache.
    """

    def __init__(
        self,
        instances: int,
        running: int,
        *,
        caches: bool,
        policy: PolicyName = "least-loaded",
        seed: int = 0,
    ) -> None:
        self._rng = random.Random(seed)
        self._now = 0.0
        self._index = PrefixIndex()
        self._ids = iter(range(1, 1 << 62))
        self._placed: deque[int] = deque()
        self._prefilling: deque[int] = deque()
        self.ledger = Ledger(max_prefill_requests=_SEQUENCES)
        members = [_instance(number) for number in range(instances)]
        for member in members:
            add = self.ledger.add_prefill if member.role is Role.PREFILL else self.ledger.add_decode
            add(member.key, member.capacity)
            self.ledger.set_pace(member.key, _pace(member, members))
        self._gate = Gate(
            ledger=self.ledger,
            policy=POLICIES[policy](),
            tenants=Tenants(),
            max_queue=1024,
            max_bypasses=64,
            grace_s=1.0,
            refuses_early=True,
        )
        self._gate.instances_changed(self._now)
        self._beginnings = [
            tuple(self._rng.randrange(1000) for _ in range(_KNOWN_BLOCKS * _BLOCK))
            for _ in range(_BEGINNINGS)
        ]
        if caches:
            self._tell(members)
        for _ in range(running):
            self.place(self.waiting())

    def waiting(self) -> Waiting:
        """Return one more request, as it comes to the queue."""
        rest = tuple(self._rng.randrange(1000) for _ in range(self._rng.randrange(1, 512)))
        request = ValidRequest(
            prompt_token_ids=self._rng.choice(self._beginnings) + rest,
            sampling=Sampling(
                temperature=0.0,
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                repetition_penalty=1.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                seed=None,
                logprobs=None,
            ),
            stop=Stop(
                max_new_tokens=self._rng.randrange(64, 512),
                min_new_tokens=0,
                strings=(),
                token_ids=(),
                ignore_eos=False,
            ),
            priority=0,
        )
        return Waiting(
            request_id=next(self._ids),
            need=request.need,
            priority=0,
            start_by=_FAR,
            tenant=f"tenant-{self._rng.randrange(_TENANTS)}",
            cached_tokens=self._index.lookup(request),
        )

    def place(self, waiting: Waiting) -> None:
        """Place a request, and let the oldest of those whose prompts are computed be done."""
        self.decide(waiting)
        self._placed.append(waiting.request_id)
        self._prefilling.append(waiting.request_id)
        if len(self._prefilling) > _PREFILLING:
            self._gate.end_prefill(self._prefilling.popleft(), self._now)

    def decide(self, waiting: Waiting) -> None:
        """What admission does from the arrival of a request to its booking."""
        self._now += _STEP_S
        self._gate.offer(waiting, self._now)
        [(placed, placement)] = self._gate.decide(self._now)
        assert placed is waiting
        assert isinstance(placement, Placement)

    def end_oldest(self) -> None:
        """Let the request end that was placed first."""
        self._gate.release(self._placed.popleft(), self._now)

    def _tell(self, members: list[Instance]) -> None:
        keys = [_keys(beginning) for beginning in self._beginnings]
        of_role = [[m for m in members if m.role is role] for role in Role]
        stored: dict[InstanceKey, set[int]] = {member.key: set() for member in members}
        for known in keys:
            for alike in of_role:
                for member in self._rng.sample(alike, min(_HOLDERS, len(alike))):
                    stored[member.key].update(known)
        for member in members:
            self._index.join(member)
            # Of other prompts as well.
            told = [*stored[member.key], *(self._rng.getrandbits(64) for _ in range(256))]
            events = PrefixEvents(sequence=1, reset=True, stored=told, removed=())
            self._index.take(member.key, events)


def decisions_s(
    cluster: Cluster, decisions: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Return the seconds of each of some decisions, while as many requests end as come."""
    found = []
    for _ in range(decisions):
        waiting = cluster.waiting()
        cluster.end_oldest()
        began = clock()
        cluster.place(waiting)
        found.append(clock() - began)
    cluster.ledger.check_integrity()
    return found


def rows(settings: Settings, say: Callable[[str], None]) -> list[Row]:
    """Measure decisions with and without anything known of prefix caches."""
    instances, running, decisions = (16, 100, 50) if settings.quick else (256, 10_000, 2000)
    found = []
    policies: tuple[PolicyName, ...] = ("least-loaded", "expected")
    for policy, caches in itertools.product(policies, (False, True)):
        beside = "prefix caches known" if caches else "no caches"
        name = f"decision, {policy}, {instances} instances, {running} running, {beside}"
        if not settings.wants(name):
            continue
        cluster = Cluster(instances, running, caches=caches, policy=policy)
        middle_s, spread_s = median_and_spread(decisions_s(cluster, decisions))
        say(f"measured {name}")
        found.append(
            Row(
                row=name,
                ours=middle_s * 1e6,
                unit="us",
                higher_is_better=False,
                spread=spread_s * 1e6,
            )
        )
    return found


def _keys(tokens: tuple[int, ...]) -> list[int]:
    """Return the short keys of a prompt's full blocks."""
    keys = PrefixKeys(seed=_SEED)
    above, found = keys.root(prefix_salt(0, b"")), []
    for start in range(0, len(tokens), _BLOCK):
        above = keys.block(above, keys.piece(tokens[start : start + _BLOCK]))
        found.append(short_key(above))
    return found


def _pace(member: Instance, members: list[Instance]) -> Pace:
    """Return what an instance reports: no two are as fast, and prefill knows the ways to decode."""
    rng = random.Random(member.key.name)
    if member.role is Role.DECODE:
        return Pace(
            speed=StepSpeed(base_s=0.02 * rng.uniform(0.9, 1.1), sequence_s=1e-4, token_s=1e-7)
        )
    peers = [other.key.name for other in members if other.role is Role.DECODE]
    return Pace(
        speed=StepSpeed(base_s=0.0, sequence_s=1e-3, token_s=1e-4 * rng.uniform(0.9, 1.1)),
        links={name: Link(rng.uniform(1e9, 1e10), 1e-4) for name in peers},
    )


def _instance(number: int) -> Instance:
    return Instance(
        key=InstanceKey(f"instance-{number}", 1),
        role=Role.PREFILL if number % 2 else Role.DECODE,
        address="127.0.0.1:1",
        model=Model(
            name="m",
            fingerprint="f",
            architecture="a",
            dtype="bfloat16",
            max_model_len=1 << 16,
            vocab_size=1000,
            eos_token_ids=(),
            assets_digest="d",
        ),
        layout=Layout(shape=(1, 1, 8, "bfloat16"), summary="tp1", wire=b""),
        capacity=Capacity(
            blocks=_BLOCKS,
            block_size=_BLOCK,
            max_sequences=_SEQUENCES,
            max_sequence_tokens=1 << 16,
            token_bytes=1 << 16,
        ),
        data_token=b"",
        version="",
        prefix_seed=_SEED,
    )
