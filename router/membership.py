"""Owns the table of instances: who may join, what they all share, who replaces whom.

No stream and no clock of its own; `registration` feeds it from the wire and acts on its answers.
"""

from dataclasses import dataclass, field
from enum import Enum

from router.views import Capacity, InstanceKey, Link, Pace
from service.errors import Incompatible
from service.step_fit import StepSpeed

# Names whose last epoch is remembered after they left, so that an old process cannot come back.
_REMEMBERED_NAMES = 1024


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, kw_only=True)
class Model:
    """What an instance serves, as it said itself."""

    name: str
    fingerprint: str
    architecture: str
    dtype: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    assets_digest: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an instance splits its KV cache; the router only compares `shape` and hands on `wire`.

    `cp` is over how many ranks a sequence's tokens are spread.
    """

    shape: tuple[int, int, int, str]  # layers, kv heads, head size, dtype
    summary: str
    wire: bytes
    cp: int = 1


@dataclass(frozen=True, kw_only=True)
class Instance:
    """What an instance said of itself when it joined."""

    key: InstanceKey
    role: Role
    address: str
    model: Model
    layout: Layout
    capacity: Capacity
    data_token: bytes = field(repr=False)
    version: str
    # What the keys of its prefix cache are made from; empty where it does not tell of them.
    prefix_seed: bytes = field(default=b"", repr=False)
    # Whether it divides what it has among routers.
    credits: bool = False


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """An instance's KV blocks by state."""

    total: int = 0
    free: int = 0
    reserved: int = 0
    used: int = 0
    quarantined: int = 0
    cached: int = 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A data connection to one rank of a decode instance; `note` says what is wrong with it."""

    peer: str
    rank: int
    transport: str
    rtt_s: float
    bytes_per_s: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What an instance last said of its load."""

    blocks: Blocks = Blocks()
    running: int = 0
    waiting: int = 0
    pairs: tuple[Pair, ...] = ()
    speed: StepSpeed | None = None

    @property
    def pace(self) -> Pace:
        """What placement goes by: the slowest pair with a decode instance counts for each rank."""
        links: dict[str, Link] = {}
        for peer in dict.fromkeys(pair.peer for pair in self.pairs):
            pairs = [pair for pair in self.pairs if pair.peer == peer]
            ranks = len({pair.rank for pair in pairs})
            links[peer] = Link(
                ranks * min(pair.bytes_per_s for pair in pairs), max(pair.rtt_s for pair in pairs)
            )
        return Pace(speed=self.speed, links=links)


@dataclass(frozen=True, kw_only=True)
class Credit:
    """How much of a decode instance this router may promise: blocks of each dp rank, and sequences.

    Where it is `shared`, what waits for room is to be told; where it is `scarce`, all that comes
    back as well.
    """

    serial: int = 0
    blocks: tuple[int, ...] = ()
    sequences: int = 0
    shared: bool = False
    scarce: bool = False


@dataclass(eq=False)
class Member:
    """One instance in the table. `credit` is None where all of it is this router's."""

    instance: Instance
    seen_at: float
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    draining: bool = False
    credit: Credit | None = None


class Members:
    """All instances that are in service or draining, by name."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._epochs: dict[str, int] = {}
        self._model: Model | None = None

    def __len__(self) -> int:
        return len(self._members)

    @property
    def model(self) -> Model | None:
        """The model of all instances; stays known while none is there, until another comes."""
        return self._model

    @property
    def max_model_len(self) -> int:
        """Tokens that every instance's model takes."""
        lengths = [m.instance.model.max_model_len for m in self._members.values()]
        return min(lengths, default=self._model.max_model_len if self._model is not None else 0)

    def all(self) -> list[Member]:
        return list(self._members.values())

    def of(self, role: Role) -> list[Member]:
        return [m for m in self._members.values() if m.instance.role is role]

    def get(self, name: str) -> Member | None:
        return self._members.get(name)

    def join(self, instance: Instance, now: float) -> tuple[Member, Member | None]:
        """Takes an instance in; returns its member and the one it replaces.

        Raises Incompatible for a stale epoch, another model and what is colocated beside what is
        not, naming what differs.
        """
        old = self._members.get(instance.key.name)
        self._check_epoch(instance, old)
        others = [m for m in self._members.values() if m is not old]
        if others:
            check_same_model(instance, others[0].instance)
            _check_same_way(instance, others[0].instance)
        if not others or self._model is None:
            self._model = instance.model
        member = Member(instance, seen_at=now)
        self._members[instance.key.name] = member
        self._remember(instance.key)
        return member, old

    def leave(self, member: Member) -> bool:
        """Takes a member out; False where it is out already or has been replaced."""
        name = member.instance.key.name
        if self._members.get(name) is not member:
            return False
        del self._members[name]
        return True

    def _check_epoch(self, instance: Instance, old: Member | None) -> None:
        name, epoch = instance.key
        last = self._epochs.get(name, 0)
        if epoch < last:
            raise Incompatible(
                f"instance {name!r} came with epoch {epoch}, and epoch {last} has been here: "
                "an older process with the same name still runs, or the clock went back",
                reason="STALE_EPOCH",
            )
        # The very same process may come again before its broken stream is noticed here; its
        # secret of this epoch tells it from another process of the same name.
        if old is not None and epoch == old.instance.key.epoch and instance != old.instance:
            raise Incompatible(
                f"instance {name!r} is registered already with epoch {epoch}: "
                "give each instance a name of its own",
                reason="NAME_TAKEN",
            )

    def _remember(self, key: InstanceKey) -> None:
        self._epochs.pop(key.name, None)
        self._epochs[key.name] = key.epoch
        if len(self._epochs) > _REMEMBERED_NAMES:
            gone = next(n for n in self._epochs if n not in self._members)
            del self._epochs[gone]


def check_same_model(instance: Instance, other: Instance) -> None:
    """Raises Incompatible naming the first thing that differs."""
    ours, theirs = other, instance
    for what, found, expected in (
        ("architecture", theirs.model.architecture, ours.model.architecture),
        ("dtype", theirs.model.dtype, ours.model.dtype),
        ("vocab_size", theirs.model.vocab_size, ours.model.vocab_size),
        ("KV layers", theirs.layout.shape[0], ours.layout.shape[0]),
        ("KV heads", theirs.layout.shape[1], ours.layout.shape[1]),
        ("KV head size", theirs.layout.shape[2], ours.layout.shape[2]),
        ("KV dtype", theirs.layout.shape[3], ours.layout.shape[3]),
        ("fingerprint", theirs.model.fingerprint, ours.model.fingerprint),
        ("assets_digest", theirs.model.assets_digest, ours.model.assets_digest),
    ):
        if found != expected:
            raise Incompatible(
                f"{what} of instance {theirs.key.name!r} is {found}, and {ours.key.name!r} "
                f"serves {ours.model.name!r} with {expected}: serve the same model folder "
                "with the same settings on all instances",
                reason="MODEL_MISMATCH",
            )


def _check_same_way(instance: Instance, other: Instance) -> None:
    if instance.capacity.colocated is not other.capacity.colocated:
        found, there = (
            f"{'colocated' if i.capacity.colocated else i.role.value} instance {i.key.name!r}"
            for i in (instance, other)
        )
        raise Incompatible(
            f"{found} came to a router that has {there}: colocated instances do all the work of"
            " their requests; give them a router of their own",
            reason="COLOCATED_MISMATCH",
        )
