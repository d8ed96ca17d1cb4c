"""What goes into the prefill engine's thread and what comes out of it. Owns no behaviour."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.blocks import BlockCounts
from engine.sampling import Sampled, SamplingParams
from engine.stopping import StopCriteria


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to compute.

    Attributes:
        ttl_s: Remaining time of the request when it is submitted.
        cache_salt: Only requests with the same one share cached blocks.
        tenant: Who shares the instance fairly with others of the same priority.
        transfer: Whether its KV goes to a decode instance.
        cp_first: The cp rank that has its first tokens.
        output_tokens: How many of the prompt's last tokens were generated before, elsewhere.
        trace_id: For the log.
    """

    request_id: int
    prompt: Sequence[int]
    sampling: SamplingParams
    stop: StopCriteria
    ttl_s: float
    priority: int = 0
    cache_salt: bytes = b""
    tenant: str = ""
    transfer: bool = True
    cp_first: int = 0
    output_tokens: int = 0
    trace_id: str = ""


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """The prompt is computed and its first token sampled."""

    sampled: Sampled
    finish: str | None
    prompt_tokens: int
    cached_tokens: int
    queue_s: float
    prefill_s: float


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """Decode holds the whole of the prompt's KV and has checked it."""

    bytes: int
    messages: int
    transport: str
    handoff_s: float


@dataclass(frozen=True, kw_only=True)
class RequestFailed:
    """The request ended early."""

    reason: str
    message: str
    retryable: bool


Outcome = FirstToken | Transferred | RequestFailed


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step: how many tokens of how many prompts, of how many it may have had, and its time.

    Attributes:
        schedule_s: Deciding on it, and giving blocks to prompts that enter.
        compute_s: The forward pass on all ranks; with several stages those of steps overlap.
        finish_s: Remembering prefixes, sampling and telling.
    """

    tokens: int
    max_tokens: int
    prompts: int
    schedule_s: float
    compute_s: float
    finish_s: float


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the instance reports of itself."""

    blocks: BlockCounts
    running: int
    waiting: int
