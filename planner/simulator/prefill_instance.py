"""A prefill instance on the virtual clock: prefill's own scheduler, and times from `Costs`.

Owns its blocks and which prompts are in them. Where the KV goes is `planner.simulator.cluster`'s.
"""

import math
from collections.abc import Callable
from functools import partial

from planner.costs import Chunk
from planner.simulator.clock import Clock
from planner.simulator.setup import Prefills
from prefill.scheduler import Prompt, Scheduler, Step
from service.step_fit import StepFit, StepSpeed

# As prefill's worker has it: how much of the throughput's estimate each further step is.
_THROUGHPUT_WEIGHT = 0.2


class PrefillInstance:
    """Computes prompts, as many in a step as the scheduler says.

    Args:
        on_computed: Called with the request whose prompt is done, and when it was begun with.
        slowdown: Asked as a step begins: how many times as long it takes.
        on_busy: Called with whether there is a step under way, each time that changes.
        fit: Told of each step, where anybody wants to know how fast the instance is.
    """

    def __init__(
        self,
        clock: Clock,
        pool: Prefills,
        *,
        block_size: int,
        timeout_s: float,
        on_computed: Callable[[int, float], None],
        slowdown: Callable[[], float] = lambda: 1.0,
        on_busy: Callable[[bool], None] = lambda _: None,
        fit: StepFit | None = None,
    ) -> None:
        self._fit = fit
        self._clock = clock
        self._costs = pool.costs
        self._block_size = block_size
        self._timeout_s = timeout_s
        self._on_computed = on_computed
        self._slowdown, self._on_busy = slowdown, on_busy
        self._scheduler = Scheduler(
            max_batched_tokens=pool.max_batched_tokens, block_size=block_size
        )
        self._free_blocks = pool.kv_tokens // block_size
        self._tokens_per_s = math.inf
        self._is_busy = False
        self._left: dict[int, int] = {}
        self._blocks: dict[int, int] = {}
        self._began: dict[int, float] = {}

    def add(self, request_id: int, tokens: int) -> None:
        """Compute a prompt when its turn comes."""
        prompt = Prompt(
            request_id=request_id,
            tokens=tokens,
            blocks=-(-tokens // self._block_size),
            deadline_s=self._clock.now + self._timeout_s,
        )
        self._left[request_id] = tokens
        self._scheduler.add(prompt)
        self._turn()

    def free(self, request_id: int) -> None:
        """Forget a request; its KV is not needed here any more."""
        self._scheduler.remove(request_id)
        self._left.pop(request_id, None)
        self._began.pop(request_id, None)
        self._free_blocks += self._blocks.pop(request_id, 0)
        self._turn()

    @property
    def speed(self) -> StepSpeed | None:
        """How fast it is, as far as anybody wants to know."""
        return self._fit.speed if self._fit is not None else None

    def stop(self) -> None:
        """Compute nothing more."""
        self._left.clear()

    def _turn(self) -> None:
        if self._is_busy or not self._left:
            return
        step = self._scheduler.schedule(
            self._free_blocks, self._clock.now, self._tokens_per_s, self._enter
        )
        if not step.slices:
            return
        self._is_busy = True
        chunks = [Chunk(piece.length, piece.start) for piece in step.slices]
        tokens = sum(chunk.tokens for chunk in chunks)
        times = self._slowdown()
        first_s = times * self._costs.prefill_s(chunks)
        busy_s = times * self._costs.prefill_busy_s(chunks)
        self._on_busy(True)
        self._clock.after(busy_s, partial(self._may_go_on, len(chunks), tokens, busy_s))
        self._clock.after(first_s, partial(self._computed, step))

    def _enter(self, request_id: int) -> int:
        blocks = self._blocks[request_id] = -(-self._left[request_id] // self._block_size)
        self._free_blocks -= blocks
        self._began[request_id] = self._clock.now
        return 0

    def _may_go_on(self, prompts: int, tokens: int, seconds: float) -> None:
        self._is_busy = False
        self._on_busy(False)
        if self._fit is not None:
            self._fit.observe(prompts, tokens, seconds)
        # A small step says little of what a large one reaches.
        if 2 * tokens >= self._scheduler.max_batched_tokens:
            measured = tokens / seconds
            if math.isinf(self._tokens_per_s):
                self._tokens_per_s = measured
            self._tokens_per_s += _THROUGHPUT_WEIGHT * (measured - self._tokens_per_s)
        self._turn()

    def _computed(self, step: Step) -> None:
        for piece in step.slices:
            if piece.request_id not in self._left:
                continue  # it was given up meanwhile
            self._left[piece.request_id] -= piece.length
            if not self._left[piece.request_id]:
                del self._left[piece.request_id]
                self._on_computed(piece.request_id, self._began.pop(piece.request_id))
