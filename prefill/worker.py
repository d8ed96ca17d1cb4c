"""The prefill engine's thread: takes requests, runs steps, hands tokens and KV on.

Owns the block pool and every request's state between submission and the end of its transfer;
nothing else touches them. Knows nothing of gRPC: requests come in through `submit` and `abort` from
any thread, outcomes go out through one callback. Whether one rank computes or several is no matter
here.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from engine.sampling import SequenceState
from kvtransfer import Closed, Completed, Failed, Span, TransferEvent
from prefill.compute import Compute, Piece
from prefill.handoff import Transfers
from prefill.records import (
    FirstToken,
    Load,
    Outcome,
    Request,
    RequestFailed,
    StepReport,
    Transferred,
)
from prefill.scheduler import Prompt, Scheduler, Slice, Step
from service.hung_steps import await_last_step
from service.logs import about_request
from service.prefix_keys import prefix_salt

log = logging.getLogger(__name__)


# How much of the throughput's estimate each further step is.
_THROUGHPUT_WEIGHT = 0.2


@dataclass(kw_only=True)
class _Job:
    request: Request
    arrived_s: float
    deadline_s: float
    blocks: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    started_s: float = 0.0
    computed_s: float | None = None
    # What came of a transfer that was over before the prompt was: all of it was kept at decode.
    early: Outcome | None = None
    # False once nobody waits for an outcome: only the transfer's end is still to come.
    wanted: bool = True


@dataclass(frozen=True, kw_only=True)
class _Computed:
    """A step that all stages are done with."""

    work: list[tuple[_Job, Slice]]
    schedule_s: float
    began_s: float
    computed_s: float
    logits_SV: torch.Tensor


class Worker:
    """Runs prompts through the model, one step at a time, until it is stopped.

    Args:
        block_tokens: Tokens that a block of the pool holds.
        emit: Called with (request id, outcome) from the worker's thread; must return at once.
        on_step: Called with each step that was run, from the worker's thread.
        on_fatal: Called once when the engine itself breaks; the instance must then go down.
    """

    def __init__(
        self,
        *,
        compute: Compute,
        block_tokens: int,
        pool: BlockPool,
        cache: PrefixCache | None,
        scheduler: Scheduler,
        transfers: Transfers,
        emit: Callable[[int, Outcome], None],
        on_step: Callable[[StepReport], None] = lambda _: None,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._compute = compute
        self._block_tokens = block_tokens
        self._pool = pool
        self._cache = cache
        self._scheduler = scheduler
        self._transfers = transfers
        self._emit = emit
        self._on_step = on_step
        self._on_fatal = on_fatal
        self._jobs: dict[int, _Job] = {}
        self._tokens_per_s = math.inf
        self._under_way = 0
        self._ended_steps = 0
        self._last_computed_s = -math.inf
        self._inbox: deque[Request | int | TransferEvent | _Computed] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._load = Load(blocks=pool.counts(), running=0, waiting=0)
        self._thread = threading.Thread(target=self._main, name="prefill-engine", daemon=True)

    # ---- any thread

    def start(self) -> None:
        """Start taking work."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._post(request)

    def abort(self, request_id: int) -> None:
        """End a request; no outcome follows. Unknown ids are ignored."""
        self._post(request_id)

    def transfer_event(self, event: TransferEvent) -> None:
        """What the send agent has to say."""
        self._post(event)

    def load(self) -> Load:
        """The state after the latest step."""
        return self._load

    def blocks_for(self, tokens: int) -> int:
        """Cache blocks that a prompt of so many tokens takes."""
        return -(-tokens // self._block_tokens)

    def stop(self) -> None:
        """Stop after the step in progress and wait for the thread to end; if that hangs, break."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await_last_step(self._thread, self._on_fatal)

    @property
    def step_under_way(self) -> int | None:
        """The number of the oldest step that has not ended, None where there is none."""
        return self._ended_steps if self._under_way else None

    def _post(self, item: Request | int | TransferEvent | _Computed) -> None:
        with self._wake:
            self._inbox.append(item)
            self._wake.notify()

    # ---- the worker's thread

    def _main(self) -> None:
        try:
            while not self._stopping:
                self._take_inbox()
                self._expire()
                ran = self._under_way < self._compute.depth and self._step()
                self._report()
                if not ran:
                    self._wait()
        except BaseException as error:
            log.exception("the prefill engine broke")
            self._on_fatal(error)

    def _wait(self) -> None:
        # Deadlines must pass without new work arriving, so sleep only while there are none.
        with self._wake:
            if not self._inbox and not self._stopping:
                self._wake.wait(timeout=0.1 if self._jobs else None)

    def _report(self) -> None:
        computed = len(self._jobs) - self._scheduler.waiting
        self._load = Load(
            blocks=self._pool.counts(), running=computed, waiting=self._scheduler.waiting
        )

    def _take_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Request):
                self._accept(item)
            elif isinstance(item, int):
                self._drop(item)
            elif isinstance(item, _Computed):
                self._finish(item)
            else:
                self._transfer_event(item)

    def _accept(self, request: Request) -> None:
        now = time.monotonic()
        self._jobs[request.request_id] = _Job(
            request=request, arrived_s=now, deadline_s=now + request.ttl_s
        )
        self._scheduler.add(
            Prompt(
                request_id=request.request_id,
                tokens=len(request.prompt),
                blocks=self.blocks_for(len(request.prompt)),
                priority=request.priority,
                tenant=request.tenant,
                deadline_s=now + request.ttl_s,
            )
        )

    def _expire(self) -> None:
        now = time.monotonic()
        late = [job for job in self._jobs.values() if job.wanted and job.deadline_s <= now]
        for job in late:
            self._fail(
                job.request.request_id, "DeadlineExceeded", "the deadline passed at prefill", False
            )

    def _step(self) -> bool:
        """Begin a step, if there is anything to compute."""
        began_s = time.monotonic()
        step = self._scheduler.schedule(
            self._pool.counts().available,
            now=began_s,
            tokens_per_s=self._tokens_per_s,
            enter=self._enter,
        )
        if step.slices:
            self._run(step, time.monotonic() - began_s)
        return bool(step.slices)

    def _run(self, step: Step, schedule_s: float) -> None:
        work = [(self._jobs[piece.request_id], piece) for piece in step.slices]
        pieces = [
            Piece(
                request_id=piece.request_id,
                start=piece.start,
                token_ids=job.request.prompt[piece.start : piece.end],
                blocks=job.blocks,
                transfer=job.request.transfer,
                cp_first=job.request.cp_first,
            )
            for job, piece in work
        ]
        began_s = time.monotonic()

        def done(logits_SV: torch.Tensor) -> None:
            self._post(
                _Computed(
                    work=work,
                    schedule_s=schedule_s,
                    began_s=began_s,
                    computed_s=time.monotonic(),
                    logits_SV=logits_SV,
                )
            )

        self._under_way += 1
        self._compute.run(pieces, done)

    def _finish(self, step: _Computed) -> None:
        self._under_way -= 1
        self._ended_steps += 1
        finishing_s = time.monotonic()
        tokens = sum(piece.length for _, piece in step.work)
        self._measure(tokens, step)
        # Requests that were dropped meanwhile have no blocks any more. What the step still wrote
        # there harms nobody: on every rank steps of others come after it.
        wanted = [(row, *each) for row, each in enumerate(step.work) if each[0].wanted]
        self._remember([(job, piece) for _, job, piece in wanted])
        rows, done = [], []
        for row, job, piece in wanted:
            if piece.end == len(job.request.prompt):
                job.computed_s = step.computed_s
                rows.append(row)
                done.append(job)
        if done:
            self._first_tokens(done, step.logits_SV[rows])
        self._on_step(
            StepReport(
                tokens=tokens,
                max_tokens=self._scheduler.max_batched_tokens,
                prompts=len(step.work),
                schedule_s=step.schedule_s,
                compute_s=step.computed_s - step.began_s,
                finish_s=time.monotonic() - finishing_s,
            )
        )

    def _measure(self, tokens: int, step: _Computed) -> None:
        elapsed_s = step.computed_s - max(step.began_s, self._last_computed_s)
        self._last_computed_s = step.computed_s
        # A small step says little of what a large one reaches: its fixed costs are most of it.
        if 2 * tokens < self._scheduler.max_batched_tokens or elapsed_s <= 0:
            return
        measured = tokens / elapsed_s
        if math.isinf(self._tokens_per_s):
            self._tokens_per_s = measured
        self._tokens_per_s += _THROUGHPUT_WEIGHT * (measured - self._tokens_per_s)

    def _enter(self, request_id: int) -> int:
        """Give a prompt its blocks; return how many of its tokens need not be computed."""
        job = self._jobs[request_id]
        request = job.request
        job.started_s = time.monotonic()
        self._take_blocks(job)
        self._pool.mark_used(job.blocks)
        if request.transfer:
            # The transfer reads these blocks until its end is reported, whatever becomes of the
            # request: they may not go to another prompt before.
            self._pool.pin(job.blocks)
            self._transfers.open(request_id, len(request.prompt), job.blocks, request.cp_first)
            if job.cached_tokens:
                self._transfers.cached(request_id, Span(0, job.cached_tokens))
        return job.cached_tokens

    def _take_blocks(self, job: _Job) -> None:
        prompt = job.request.prompt
        needed = self.blocks_for(len(prompt))
        if self._cache is None:
            job.blocks = self._pool.reserve(needed)
        else:
            acquired = self._cache.acquire(prompt, _salt(job.request), needed)
            job.blocks, job.cached_tokens = acquired.blocks, acquired.tokens

    def _remember(self, work: Sequence[tuple[_Job, Slice]]) -> None:
        """What has been computed is final, and good for other prompts that begin alike."""
        if self._cache is not None:
            for job, piece in work:
                request = job.request
                self._cache.insert(request.prompt[: piece.end], _salt(request), job.blocks)

    def _first_tokens(self, jobs: list[_Job], logits_SV: torch.Tensor) -> None:
        states = [_sampling_state(job.request) for job in jobs]
        for job, sampled in zip(jobs, self._compute.sample(logits_SV, states), strict=True):
            request = job.request
            finish = request.stop.check(sampled.token_id, request.output_tokens + 1)
            assert job.computed_s is not None
            self._emit(
                job.request.request_id,
                FirstToken(
                    sampled=sampled,
                    finish=finish,
                    prompt_tokens=len(job.request.prompt),
                    cached_tokens=job.cached_tokens,
                    queue_s=job.started_s - job.arrived_s,
                    prefill_s=job.computed_s - job.started_s,
                ),
            )
            if job.early is not None and finish is None:
                self._emit(job.request.request_id, job.early)
            if finish is not None or not job.request.transfer or job.early is not None:
                self._drop(job.request.request_id)

    # ---- ends

    def _drop(self, request_id: int) -> None:
        """Nobody wants the request any more: free it now, or when its transfer has ended."""
        job = self._jobs.get(request_id)
        if job is None or not job.wanted:
            return
        job.wanted = False
        self._scheduler.remove(request_id)
        if job.blocks:
            self._pool.release(job.blocks)
        if not self._transfers.close(request_id):
            self._free(request_id)

    def _fail(self, request_id: int, reason: str, message: str, retryable: bool) -> None:
        trace_id = self._jobs[request_id].request.trace_id
        log.info("ended early: %s", message, extra=about_request(request_id, trace_id))
        self._emit(request_id, RequestFailed(reason=reason, message=message, retryable=retryable))
        self._drop(request_id)

    def _free(self, request_id: int) -> None:
        job = self._jobs.pop(request_id)
        if job.blocks and job.request.transfer:
            self._pool.unpin(job.blocks)

    def _transfer_event(self, event: TransferEvent) -> None:
        if not isinstance(event, Completed | Failed | Closed):
            return
        request_id = self._transfers.ended(event.transfer_id)
        if request_id is None:
            return
        job = self._jobs[request_id]
        if isinstance(event, Failed):
            log.warning(
                "KV transfer failed: %s",
                event.error,
                extra=about_request(request_id, job.request.trace_id),
            )
        if job.wanted and job.computed_s is None and isinstance(event, Completed):
            job.early = self._outcome(job, event)
            return
        if job.wanted:
            job.wanted = False
            self._scheduler.remove(request_id)
            self._pool.release(job.blocks)
            self._emit(request_id, self._outcome(job, event))
        self._free(request_id)

    def _outcome(self, job: _Job, event: Completed | Failed | Closed) -> Outcome:
        if isinstance(event, Completed):
            after_s = 0.0 if job.computed_s is None else time.monotonic() - job.computed_s
            return Transferred(
                bytes=event.stats.bytes,
                messages=event.stats.messages,
                transport=event.stats.transport,
                handoff_s=after_s,
            )
        if isinstance(event, Failed):
            reason = type(event.error).__name__
            return RequestFailed(reason=reason, message=str(event.error), retryable=event.retryable)
        return RequestFailed(reason="TransferClosed", message="transfer closed", retryable=True)


def _sampling_state(request: Request) -> SequenceState:
    own = len(request.prompt) - request.output_tokens
    return SequenceState(
        request.sampling,
        prompt_len=own,
        prompt_ids=request.prompt[:own],
        output_ids=request.prompt[own:],
        min_new_tokens=request.stop.min_new_tokens,
        suppressed_ids=request.stop.end_token_ids,
    )


def _salt(request: Request) -> bytes:
    return prefix_salt(request.cp_first, request.cache_salt)
