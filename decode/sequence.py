"""What a decode instance knows of one sequence: what was asked, and how far it has come.

Owns no rule by which sequences come and go: those are `decode.admission`'s.
"""

import secrets
from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto

from engine.sampling import SamplingParams, SequenceState
from engine.stopping import StopCriteria
from kvtransfer import Kept


class State(Enum):
    """Where a sequence stands."""

    RESERVED = auto()
    RUNNING = auto()
    ENDED = auto()


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """What a router asks a decode instance to hold for one request.

    Attributes:
        prompt_tokens: Those whose KV arrives, `output_ids` among them.
        prompt_ids: The prompt without `output_ids`; may be empty unless sampling looks at it.
        output_ids: The prompt's last tokens where they were generated before, elsewhere.
        ttl_s: Remaining time of the request.
        cache_salt: Only requests with the same one share blocks.
        dp_rank: Which of the instance's dp ranks is to have it.
        came_us: When the request first came, by its router's clock.
        trace_id: For the log.
        is_local: Whether the prompt is computed here: no KV arrives.
    """

    request_id: int
    router_id: str
    prompt_tokens: int
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    stop: StopCriteria
    ttl_s: float
    cache_salt: bytes = b""
    dp_rank: int = 0
    output_ids: Sequence[int] = ()
    came_us: int = 0
    trace_id: str = ""
    is_local: bool = False

    @property
    def own_prompt_tokens(self) -> int:
        """Tokens that were not generated."""
        return self.prompt_tokens - len(self.output_ids)

    @property
    def known_ids(self) -> Sequence[int]:
        """All tokens whose KV arrives, for the prefix cache; empty where they are not known."""
        if not self.prompt_ids or not self.output_ids:
            return self.prompt_ids
        known = array("I", self.prompt_ids)
        known.extend(self.output_ids)
        return known

    @property
    def max_tokens(self) -> int:
        """Tokens the sequence may come to."""
        return self.own_prompt_tokens + self.stop.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One leave to fill a sequence's blocks. `over` is done once nothing writes under it any more.

    `kept` is what of the KV had arrived under earlier ones.
    """

    transfer_id: int = field(default_factory=lambda: secrets.randbits(63))
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(16), repr=False)
    kept: Kept = ()
    over: "Future[None]" = field(default_factory=Future, repr=False)

    @classmethod
    def none(cls) -> "Transfer":
        """Return that of a sequence which nobody sends anything for: it is over."""
        transfer = cls()
        transfer.over.set_result(None)
        return transfer


@dataclass(kw_only=True)
class SequenceRecord:
    """One sequence on this instance. `Admission` changes it, and `append` the step loop.

    A running one that `is_paused` is in no batch, to go on elsewhere.
    `kept` is what of its KV has arrived, while no transfer is open. Its blocks are the dp rank's.
    The first ones, with the KV of `cached_tokens`, may be others' as well: `own_blocks` are what
    may be written to. One that is `handed_back` steps no more, and ends soon.

    Where the prompt `is_local`, the KV of its first `computed_tokens` is here; `began_s` is when
    the first step for the rest of it began, and `came_s` when it was reserved.
    """

    reservation: Reservation
    transfer: Transfer
    blocks: list[int]
    own_blocks: list[int]
    cached_tokens: int
    deadline_s: float
    sampling: SequenceState
    state: State = State.RESERVED
    kv_complete: bool = False
    kept: Kept = ()
    is_paused: bool = False
    handed_back: bool = False
    computed_tokens: int = 0
    came_s: float = 0.0
    began_s: float | None = None
    output: "array[int]" = field(default_factory=lambda: array("I"), repr=False)

    @property
    def last_token_id(self) -> int | None:
        """The token that the next step begins with; None until the first one is known."""
        return self.output[-1] if self.output else None

    @property
    def missing_tokens(self) -> int:
        """Tokens of the prompt that are to be computed here yet."""
        if not self.reservation.is_local:
            return 0
        return self.reservation.prompt_tokens - self.computed_tokens

    @property
    def request_id(self) -> int:
        """The router's handle."""
        return self.reservation.request_id

    @property
    def dp_rank(self) -> int:
        """Whose blocks it has."""
        return self.reservation.dp_rank

    @property
    def came(self) -> tuple[int, int]:
        """Sorts sequences by when their requests came; ids decide where that is the same moment."""
        return self.reservation.came_us, self.request_id

    def append(self, token_id: int) -> None:
        """Note the sequence's next token."""
        self.output.append(token_id)
        self.sampling.append(token_id)
