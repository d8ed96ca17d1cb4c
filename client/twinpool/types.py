"""What calls take and give back, as plain types; knows nothing of the wire."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

FinishReason: TypeAlias = Literal["stop", "length", "other"]
"""stop: an end token, a stop id or a stop string. length: max_new_tokens. other: newer than us."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `role` is system, user, assistant or what the model's template knows."""

    role: str
    content: str


Prompt: TypeAlias = str | Sequence[Message | Mapping[str, str]] | Sequence[int]
"""Text as it is, messages for the model's chat template, or token ids as they are."""


class GenerateOptions(TypedDict, total=False):
    """Options of a generation; what is left out or None has the server's default."""

    max_new_tokens: int | None
    """Tokens to generate at most."""
    min_new_tokens: int | None
    """No stop condition applies before this many tokens."""
    temperature: float | None
    """0 is greedy, which is the default."""
    top_k: int | None
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float | None
    """Keep the smallest set of tokens whose probability reaches this, in (0, 1]."""
    min_p: float | None
    """Drop tokens less likely than this share of the most likely one's probability."""
    repetition_penalty: float | None
    """Divides (or multiplies) the logits of tokens in prompt or output; 1 is none."""
    presence_penalty: float | None
    """Subtracted once from the logits of tokens in the output."""
    frequency_penalty: float | None
    """Subtracted for each occurrence of a token in the output."""
    seed: int | None
    """The same seed and request give the same answer."""
    logprobs: int | None
    """Report this many of the most likely tokens at each position, and the chosen one."""
    stop: str | Sequence[str] | None
    """Text that ends the answer, and is no part of it."""
    stop_token_ids: Sequence[int] | None
    """Tokens that end the answer, besides the model's own end tokens."""
    ignore_eos: bool | None
    """Go on past the model's own end tokens."""
    priority: int | None
    """Higher goes first while requests queue."""
    cache_salt: str | None
    """Only requests with the same salt share cached prompts; give each of your users one."""
    tenant: str | None
    """Whose request it is: those of equal priority are computed fairly among tenants."""
    model: str | None
    """Name of the model; needed only where the server serves more than one."""
    traceparent: str | None
    """W3C trace context of the caller: the servers' logs show its trace id, and pass it on."""
    tracestate: str | None
    """What goes with `traceparent`, as it is."""
    timeout_s: float | None
    """Seconds from now to the end of the answer; none by default."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, kw_only=True)
class PositionLogprobs:
    """The chosen token of one position, and the most likely ones."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How many tokens a request had."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class RequestStats:
    """How a request went through the pools.

    `handoff_s` runs from the end of prefill's compute to the moment decode held the whole KV
    cache; `kv_transport` is what carried it, as "ucx/tcp". Of the prompt's tokens, `cached_tokens`
    had not to be computed and `decode_cached_tokens` not to be sent. `moves` counts how often the
    answer went on at other instances after it had begun, and `pause_s` is the silence that took in
    all.
    """

    queue_s: float
    prefill_s: float
    handoff_s: float
    kv_bytes: int
    kv_transport: str
    prefill_instance: str
    decode_instance: str
    retries: int
    cached_tokens: int
    decode_cached_tokens: int
    moves: int
    pause_s: float


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The next part of an answer.

    `text` may lag `token_ids`: a character can span tokens, and what may be the start of a stop
    string is held back. `logprobs` has one entry for each token id where they were asked for.
    `finish_reason`, `usage` and `stats` are set in the last chunk, and only there.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: FinishReason | None
    usage: Usage | None
    stats: RequestStats | None
    request_id: str


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[PositionLogprobs, ...]
    stats: RequestStats
    request_id: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """Which model is served and what a request may ask for.

    `max_request_tokens` is the largest prompt and max_new_tokens together that any decode
    instance can ever hold.
    """

    model: str
    architecture: str
    max_model_len: int
    vocab_size: int
    has_chat_template: bool
    max_request_tokens: int
    version: str


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that requests can name; `ready` where instances of both roles are there.

    `max_request_tokens` is as in `Description`.
    """

    name: str
    architecture: str
    max_model_len: int
    max_request_tokens: int
    ready: bool


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What an instance can hold. One that is `colocated` computes its prompts itself."""

    blocks: int
    block_size: int
    max_sequences: int
    max_sequence_tokens: int
    colocated: bool = False


@dataclass(frozen=True, kw_only=True)
class BlockCounts:
    """An instance's KV blocks by state."""

    total: int
    free: int
    reserved: int
    used: int
    quarantined: int
    cached: int


@dataclass(frozen=True, kw_only=True)
class KvPair:
    """A prefill instance's data connection to one rank of a decode instance.

    Round trip and bandwidth are those of the try when it was made; 0 where there was none. `note`
    says what is wrong with the connection.
    """

    peer: str
    rank: int
    transport: str
    rtt_s: float
    bytes_per_s: float
    note: str


@dataclass(frozen=True, kw_only=True)
class InstanceStatus:
    """One instance as the router sees it; `role` is prefill or decode, `model` the model's name.

    `known_prefix_blocks` are those of its prefix cache that the router routes by. While it is
    `connecting`, the router gives it nothing. `overcommit_risk` is the probability that its
    sequences need more blocks than the router may reserve, if none ended before the others.
    """

    name: str
    epoch: int
    role: str
    address: str
    model: str
    layout: str
    capacity: Capacity
    blocks: BlockCounts
    running: int
    waiting: int
    draining: bool
    connecting: bool
    heartbeat_age_s: float
    ledger_reserved: int
    known_prefix_blocks: int
    overcommit_risk: float
    pairs: tuple[KvPair, ...]


@dataclass(frozen=True, kw_only=True)
class RequestCounts:
    """Requests of a router or a model: those it has now, and totals since its start.

    `overcommitted` counts reservations at decode of less than a request may come to, and `outgrown`
    those of them that turned out to be too small.
    """

    queued: int
    running: int
    finished: int
    refused: int
    aborted: int
    failed: int
    retried: int
    overcommitted: int
    outgrown: int


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """A model as its instances registered it; `ready` where instances of both roles are there.

    `requests` are those that meant this model.
    """

    name: str
    fingerprint: str
    architecture: str
    dtype: str
    max_model_len: int
    vocab_size: int
    ready: bool
    requests: RequestCounts


@dataclass(frozen=True, kw_only=True)
class MissingInstance:
    """An instance that the router was given by address and that is not registered."""

    role: str
    address: str


@dataclass(frozen=True, kw_only=True)
class Status:
    """A router and its pools; `model` is None unless there is exactly one.

    `requests` are those of all models, and those that came to none.
    """

    router_id: str
    version: str
    uptime_s: float
    model: ModelStatus | None
    models: tuple[ModelStatus, ...]
    instances: tuple[InstanceStatus, ...]
    missing: tuple[MissingInstance, ...]
    requests: RequestCounts
