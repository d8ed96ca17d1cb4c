"""Owns what is noted of one call, from its arrival to its end, for the metrics and the access log.

Decides nothing, and keeps nothing of what was asked or answered but numbers and names.
"""

import time
from collections.abc import Callable

from router.access_log import AccessEntry, AccessLog
from router.inflight import Job
from router.metrics.requests import Hops, Outcomes, RequestMetrics
from router.request import AnswerPart, Finish, Stats
from service.security.access import current_caller
from service.trace import current_trace

# How vLLM's counter of ended requests calls what is not the end of an answer.
_FINISHED_REASONS = {"aborted": "abort", "failed": "error"}


class Account:
    """One call; `stats` are filled in by whoever does its work, `end` is called once.

    One that ends before its model is known counts among the `unplaced`.
    """

    def __init__(
        self,
        method: str,
        *,
        unplaced: Outcomes,
        log: AccessLog | None,
        clock: Callable[[], float],
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        caller, trace = current_caller(), current_trace()
        self.stats = Stats()
        self.outcome = "failed"
        self.reason = ""
        self.began_at = clock()
        self.entry = AccessEntry(
            method=method,
            token=caller.name if caller is not None else "",
            tenant=caller.tenant if caller is not None else "",
            trace_id=trace.trace_id if trace is not None else "",
        )
        self._unplaced = unplaced
        self._metrics: RequestMetrics | None = None
        self._log = log
        self._clock = clock
        self._wall_s = wall_s
        self._first_at: float | None = None
        self._last_at = 0.0
        self._finish: Finish | None = None

    def enter(self, model: str, metrics: RequestMetrics) -> None:
        """From here on the request counts among those of a model."""
        self.entry.model = model
        self._metrics = metrics
        metrics.began()

    def admit(self, job: Job) -> None:
        """Takes note of a request that was checked."""
        entry, request = self.entry, job.request
        entry.request_id = job.shown_id
        entry.tenant = request.tenant
        entry.priority = request.priority
        entry.prompt_tokens = len(request.prompt_token_ids)
        if job.resumed is not None:
            entry.resumed_tokens = len(job.resumed.output_token_ids)
            entry.output_tokens = entry.resumed_tokens

    def give(self, part: AnswerPart) -> None:
        """Takes note of a part of the answer that is about to go to the client."""
        assert self._metrics is not None, "only a model's request is answered"
        now = self._clock()
        new = len(part.token_ids)
        if self._first_at is None:
            self._first_at = now
            new -= 1  # no gap before the first one
            if not self.entry.resumed_tokens:
                self._metrics.first_token(now - self.began_at)
        if new > 0 and self._last_at:
            self._metrics.gaps((now - self._last_at) / new, new)
        self._last_at = now
        self.entry.output_tokens = part.completion_tokens
        self._finish = part.finish

    def end(self) -> None:
        """Counts a request that has ended as `outcome` says, and writes its line."""
        now = self._clock()
        if self._metrics is None:
            self._unplaced.ended(self.outcome)
        else:
            self._count_end(self._metrics, now)
        self.write(now)

    def _count_end(self, metrics: RequestMetrics, now: float) -> None:
        if self._finish is not None:
            self._count_finished(metrics, now)
        finished_reason = _FINISHED_REASONS.get(self.outcome)
        if self.outcome == "finished" and self._finish is not None:
            finished_reason = self._finish.value
        metrics.ended(self.outcome, finished_reason)

    def write(self, now: float) -> None:
        """Writes the line of a call that ends at `now`."""
        if self._log is None:
            return
        entry, stats = self.entry, self.stats
        entry.time = self._wall_s()
        entry.outcome, entry.reason = self.outcome, self.reason
        if self.outcome == "failed" and not self.reason:
            entry.reason = "INTERNAL"
        entry.cached_tokens = stats.cached_tokens
        entry.prefill_instance = stats.prefill_instance
        entry.decode_instance = stats.decode_instance
        entry.queue_s = stats.admit_s
        entry.reserve_s = stats.reserve_s
        entry.prefill_queue_s = stats.prefill_queue_s
        entry.prefill_s = stats.prefill_s
        entry.handoff_s = stats.handoff_s
        entry.retries, entry.moves = stats.retries, stats.moves
        entry.total_s = now - self.began_at
        if self._first_at is not None:
            entry.ttft_s = self._first_at - self.began_at
            entry.decode_s = self._last_at - self._first_at
            entry.inter_token_s = self._mean_gap_s()
        self._log.put(entry)

    def _mean_gap_s(self) -> float:
        gaps = self.entry.output_tokens - self.entry.resumed_tokens - 1
        return (self._last_at - (self._first_at or 0.0)) / gaps if gaps > 0 else 0.0

    def _count_finished(self, metrics: RequestMetrics, now: float) -> None:
        entry, stats = self.entry, self.stats
        metrics.tokens(entry.prompt_tokens, entry.output_tokens)
        if entry.resumed_tokens:
            return  # what came before is another router's to time
        metrics.finished(
            e2e_s=now - self.began_at,
            tpot_s=self._mean_gap_s() if entry.output_tokens > 1 else None,
            handoff_s=stats.handoff_s if entry.output_tokens > 1 else None,
        )
        if stats.moves or stats.retries:
            return  # the times are of more than one try
        handed_over = entry.output_tokens > 1
        first_step_s = max(0.0, stats.second_token_s - stats.handoff_s)
        metrics.hops(
            Hops(
                queue=stats.admit_s,
                reserve=stats.reserve_s if handed_over else None,
                prefill_queue=stats.prefill_queue_s,
                prefill=stats.prefill_s,
                handoff=stats.handoff_s if handed_over else None,
                decode_first_step=first_step_s if handed_over else None,
            )
        )
