"""Owns the types a request and its answer have inside the router; no wire message, no behaviour."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from hashlib import blake2b
from itertools import chain
from math import inf
from typing import NamedTuple

from router.ledger import Need


@dataclass(frozen=True)
class TextPrompt:
    text: str


@dataclass(frozen=True)
class MessagesPrompt:
    """Chat messages as (role, content)."""

    messages: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TokensPrompt:
    token_ids: tuple[int, ...]


Prompt = TextPrompt | MessagesPrompt | TokensPrompt


@dataclass(frozen=True, kw_only=True)
class SamplingInput:
    """What the client asked for, unchecked; None is the default."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class StopInput:
    """What the client asked for, unchecked."""

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True)
class ResumeInput:
    """Where an answer stood when its router was lost, as its client says; unchecked."""

    request_id: str
    output_token_ids: tuple[int, ...] = ()
    text_chars: int = 0
    seed: int | None = None
    max_new_tokens: int = 0
    model_fingerprint: str = ""
    prompt_digest: bytes = b""
    proof: bytes = b""


@dataclass(frozen=True, kw_only=True)
class GenerateInput:
    """One Generate call as it came, unchecked."""

    prompt: Prompt | None
    sampling: SamplingInput = field(default_factory=SamplingInput)
    stop: StopInput = field(default_factory=StopInput)
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    resume: ResumeInput | None = None
    ttft_s: float = inf
    tpot_s: float = inf


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Checked sampling parameters. `logprobs` is None where none are wanted."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    logprobs: int | None


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Checked stop conditions."""

    max_new_tokens: int
    min_new_tokens: int
    strings: tuple[str, ...]
    token_ids: tuple[int, ...]
    ignore_eos: bool

    @property
    def least_new_tokens(self) -> int:
        """Tokens that are sure to be generated."""
        ends_early = self.strings or self.token_ids or not self.ignore_eos
        return self.min_new_tokens if ends_early else self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class ValidRequest:
    """A request that every check has passed; what the router works with from there on.

    Where it goes on after an instance was lost, the last `output_tokens` of its prompt are the ones
    that were generated before; sampling and stop are the same and count them. `came_us` is when it
    came, in microseconds by this host's clock. Its first token should come in `ttft_s`, and each
    one after it in `tpot_s`.
    """

    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    stop: Stop
    priority: int
    cache_salt: str = field(default="", repr=False)
    tenant: str = ""
    output_tokens: int = 0
    came_us: int = 0
    ttft_s: float = inf
    tpot_s: float = inf

    @property
    def need(self) -> Need:
        return Need(
            prompt_tokens=len(self.prompt_token_ids),
            max_new_tokens=self.stop.max_new_tokens - self.output_tokens,
            generated_tokens=self.output_tokens,
            sure_new_tokens=max(0, self.stop.least_new_tokens - self.output_tokens),
            # The first token of what goes on has come long ago.
            ttft_s=inf if self.output_tokens else self.ttft_s,
            tpot_s=self.tpot_s,
        )

    def prompt_digest(self) -> bytes:
        """Returns what tells this prompt's tokens from any other's."""
        return blake2b(array("I", self.prompt_token_ids).tobytes(), digest_size=8).digest()

    def after(self, token_ids: Sequence[int]) -> "ValidRequest":
        """Returns what goes on with this request after `token_ids` were generated for it."""
        return replace(
            self,
            prompt_token_ids=(*self.prompt_token_ids, *token_ids),
            output_tokens=self.output_tokens + len(token_ids),
        )


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """The beginning of an answer, of another router, that its client has; checked.

    `request_id` is the one its client and that router's log know it by. It `goes_ahead` of what is
    new, as answers that have begun do, where it is certain that it has.
    """

    request_id: str
    output_token_ids: tuple[int, ...]
    text_chars: int
    goes_ahead: bool = False


class Finish(Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"


class TokenLogprob(NamedTuple):
    token_id: int
    logprob: float


class PositionLogprobs(NamedTuple):
    """The chosen token of one position, and the most likely ones."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """New tokens of one request, in order. `logprobs` is empty or as long as `token_ids`."""

    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish: Finish | None = None


@dataclass
class Stats:
    """How a request went through the pools; filled in on its way."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    handoff_s: float = 0.0
    kv_bytes: int = 0
    kv_transport: str = ""
    prefill_instance: str = ""
    decode_instance: str = ""
    retries: int = 0
    cached_tokens: int = 0
    decode_cached_tokens: int = 0
    moves: int = 0
    pause_s: float = 0.0
    # For this router's operators only: of `queue_s` its own part and that of the last prefill, the
    # last reservation, and how long after the first token the second one came.
    admit_s: float = 0.0
    prefill_queue_s: float = 0.0
    reserve_s: float = 0.0
    second_token_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AnswerPart:
    """One message of an answer. `finish` is set in the last one."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish: Finish | None
    completion_tokens: int

    def followed_by(self, *later: "AnswerPart") -> "AnswerPart":
        """Returns this part and the ones after it as one."""
        parts = (self, *later)
        return AnswerPart(
            text="".join(part.text for part in parts),
            token_ids=tuple(chain.from_iterable(part.token_ids for part in parts)),
            logprobs=tuple(chain.from_iterable(part.logprobs for part in parts)),
            finish=parts[-1].finish,
            completion_tokens=parts[-1].completion_tokens,
        )
