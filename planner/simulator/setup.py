"""What is simulated: how many instances of which speed and room. Values alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from planner.costs import Costs
from planner.layout import Role
from router.policies import PolicyName
from router.views import Capacity

# A sequence may be as long as there is room for.
_FAR = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Prefills:
    """Prefill instances, all alike.

    Attributes:
        kv_tokens: That an instance has room for.
        max_batched_tokens: Of a step, over all cp ranks.
    """

    costs: Costs
    instances: int
    kv_tokens: int
    max_batched_tokens: int = 2048
    cp: int = 1


@dataclass(frozen=True, kw_only=True)
class Decodes:
    """Decode instances, all alike; with `chunk_tokens` they are colocated.

    Attributes:
        kv_tokens: That an instance has room for, over all dp ranks.
        max_batch: Sequences of a dp rank in a step.
        max_sequences: Reserved or running, of an instance.
        chunk_tokens: Of a dp rank's step at most, where the instances compute prompts, too.
    """

    costs: Costs
    instances: int
    kv_tokens: int
    max_batch: int = 64
    max_sequences: int = 256
    dp: int = 1
    chunk_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """An instance that ends without a word, and does not come back; they are counted from 0."""

    role: Role
    instance: int
    at_s: float


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Seconds that a request takes beside what instances compute and send.

    Attributes:
        request_s: From the client over the router to an instance.
        answer_s: From an instance over the router to the client.
        hand_over_s: From prefill's end until decode may begin, beside the transfer.
    """

    request_s: float = 0.0
    answer_s: float = 0.0
    hand_over_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Shared:
    """How many times as long steps take while an instance of the other role computes.

    For roles that share a machine's cores and memory; apart, they take nothing from each other.
    """

    prefill: float = 1.0
    decode: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that a simulation is of.

    Attributes:
        prefills: None where decode instances are colocated.
        routers: Each has its part of the instances, and gets its part of the requests in turn.
        max_queue: Requests that wait at a router at most; the others are as a router has them.
    """

    prefills: Prefills | None
    decodes: Decodes
    routers: int = 1
    policy: PolicyName = "least-loaded"
    beside: Beside = field(default_factory=Beside)
    shared: Shared = field(default_factory=Shared)
    losses: Sequence[Loss] = ()
    block_size: int = 32
    max_queue: int = 1024
    max_queue_wait_s: float = 60.0
    max_prefill_requests: int = 256
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if (self.prefills is None) is (self.decodes.chunk_tokens is None):
            raise ValueError("give either a prefill pool, or decode instances with chunk_tokens")
        pools = [pool for pool in (self.prefills, self.decodes) if pool is not None]
        fewest = min(pool.instances for pool in pools)
        if not 1 <= self.routers <= fewest:
            raise ValueError(
                f"{self.routers} routers need an instance of each role each; the smaller pool has "
                f"{fewest}"
            )
        for loss in self.losses:
            pool = self.prefills if loss.role is Role.PREFILL else self.decodes
            if pool is None or not 0 <= loss.instance < pool.instances:
                raise ValueError(f"there is no {loss.role.value} instance {loss.instance} to lose")

    @property
    def prefill_capacity(self) -> Capacity:
        """What a prefill instance tells routers that it can hold."""
        pool = self.prefills
        cp = pool.cp if pool is not None else 1
        return Capacity(
            blocks=pool.kv_tokens // (self.block_size * cp) if pool is not None else 0,
            block_size=self.block_size * cp,
            max_sequences=self.max_prefill_requests,
            max_sequence_tokens=_FAR,
            cp=cp,
        )

    @property
    def decode_capacity(self) -> Capacity:
        """The same of a decode instance."""
        pool = self.decodes
        return Capacity(
            blocks=pool.kv_tokens // self.block_size,
            block_size=self.block_size,
            max_sequences=pool.max_sequences,
            max_sequence_tokens=_FAR,
            dp=pool.dp,
            colocated=pool.chunk_tokens is not None,
        )
