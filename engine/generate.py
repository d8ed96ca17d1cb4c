"""Generates answers in one process: the reference that the distributed system must equal.

Owns a small scheduler: chunked prefill and continuous batching over one runner. No streams,
no deadlines, no transfers.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from engine.blocks import BlockPool
from engine.errors import OutOfBlocks
from engine.runner import Chunk, ModelRunner
from engine.sampling import SamplingParams, SequenceState, TokenLogprobs, sample
from engine.stopping import FinishReason, StopCriteria


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt and what is wanted of its answer."""

    prompt_ids: Sequence[int]
    stop: StopCriteria
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """An answer. `prefill_s` is from the prompt's first chunk to its first token.

    `logprobs` has an entry for each token, or none where the request asked for none.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs]
    prefill_s: float


@dataclass(kw_only=True)
class _Sequence:
    request: GenerationRequest
    state: SequenceState
    blocks: list[int]
    computed: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    started: float = 0.0
    prefill_s: float = 0.0
    finish_reason: FinishReason | None = None

    @property
    def in_prefill(self) -> bool:
        return self.computed < len(self.request.prompt_ids)

    def next_chunk(self, limit: int) -> Chunk:
        prompt = self.request.prompt_ids
        tokens = (
            prompt[self.computed : self.computed + limit]
            if self.in_prefill
            else self.token_ids[-1:]
        )
        return Chunk(
            token_ids=tokens,
            start=self.computed,
            block_table=self.blocks,
            is_prompt=self.in_prefill,
        )


def generate(
    runner: ModelRunner,
    requests: Sequence[GenerationRequest],
    *,
    max_batched_tokens: int = 512,
    max_sequences: int = 64,
) -> list[GenerationResult]:
    """Answer all requests, in their order; at most `max_batched_tokens` tokens in a pass.

    Uses the runner's whole cache. Raises OutOfBlocks where one request alone does not fit.
    """
    if max_batched_tokens < max_sequences:
        raise ValueError(
            f"max_batched_tokens is {max_batched_tokens}; it must be at least max_sequences, "
            f"which is {max_sequences}, so that every running sequence gets on in each pass"
        )
    pool = BlockPool(runner.cache.num_blocks)
    waiting = deque(enumerate(requests))
    running: dict[int, _Sequence] = {}
    results: dict[int, GenerationResult] = {}
    while waiting or running:
        while waiting and len(running) < max_sequences:
            index, request = waiting[0]
            try:
                running[index] = _admit(request, pool, runner.cache.block_size)
            except OutOfBlocks:
                if not running:
                    raise
                break
            waiting.popleft()
        _step(runner, list(running.values()), max_batched_tokens)
        for index, sequence in list(running.items()):
            if sequence.finish_reason is not None:
                pool.release(running.pop(index).blocks)
                results[index] = _result(sequence, sequence.finish_reason)
    pool.check_integrity()
    return [results[index] for index in range(len(requests))]


def _admit(request: GenerationRequest, pool: BlockPool, block_size: int) -> _Sequence:
    tokens = len(request.prompt_ids) + request.stop.max_new_tokens
    return _Sequence(
        request=request,
        state=SequenceState(
            request.sampling,
            prompt_len=len(request.prompt_ids),
            prompt_ids=request.prompt_ids,
            min_new_tokens=request.stop.min_new_tokens,
            suppressed_ids=request.stop.end_token_ids,
        ),
        blocks=pool.reserve(-(-tokens // block_size)),
    )


def _step(runner: ModelRunner, running: Sequence[_Sequence], max_batched_tokens: int) -> None:
    """Run one pass: a token for each decoding sequence, and prompts into what is left."""
    budget = max_batched_tokens
    scheduled: list[tuple[_Sequence, Chunk]] = []
    for sequence in sorted(running, key=lambda sequence: sequence.in_prefill):
        if budget:
            chunk = sequence.next_chunk(budget)
            budget -= len(chunk.token_ids)
            scheduled.append((sequence, chunk))
            if not chunk.start:
                sequence.started = perf_counter()
    logits_SV = runner.forward([chunk for _, chunk in scheduled])
    rows = []
    for row, (sequence, chunk) in enumerate(scheduled):
        sequence.computed = chunk.end
        if not sequence.in_prefill:
            rows.append(row)
    if not rows:
        return
    ready = [scheduled[row][0] for row in rows]
    sampled = sample(logits_SV[rows], [sequence.state for sequence in ready])
    for sequence, token in zip(ready, sampled, strict=True):
        if not sequence.token_ids:
            sequence.prefill_s = perf_counter() - sequence.started
        sequence.token_ids.append(token.token_id)
        sequence.state.append(token.token_id)
        if token.logprobs is not None:
            sequence.logprobs.append(token.logprobs)
        sequence.finish_reason = sequence.request.stop.check(
            token.token_id, len(sequence.token_ids)
        )


def _result(sequence: _Sequence, finish_reason: FinishReason) -> GenerationResult:
    return GenerationResult(
        token_ids=sequence.token_ids,
        finish_reason=finish_reason,
        logprobs=sequence.logprobs,
        prefill_s=sequence.prefill_s,
    )
