"""What holds of every step, whatever comes: budget, memory, order, fairness, and an end."""

from itertools import cycle

from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prefill.scheduler import Prompt, Scheduler, Slice, Step

BUDGET = 64
BLOCK = 4
EIGHTH = 8
SEQUENCES = 6
POOL = 60


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK)


class Walk(RuleBasedStateMachine):
    """A scheduler beside a naive record of what it was told and what it decided."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(
            max_batched_tokens=BUDGET,
            max_sequences=SEQUENCES,
            block_size=BLOCK,
            max_bypasses=3,
            patience_steps=5,
        )
        self.prompts: dict[int, Prompt] = {}
        self.computed: dict[int, int] = {}
        # What will be found in the cache.
        self.found: dict[int, int] = {}
        self.held: dict[int, int] = {}
        self.now = 0.0
        self.next_id = 0

    @rule(
        tokens=st.integers(1, 4 * POOL),
        cached=st.floats(0, 0.9),
        priority=st.integers(0, 2),
        tenant=st.sampled_from("ab"),
        time_left_s=st.sampled_from([0.5, 3.0, 30.0, float("inf")]),
    )
    def add(
        self, tokens: int, cached: float, priority: int, tenant: str, time_left_s: float
    ) -> None:
        prompt = Prompt(
            request_id=self.next_id,
            tokens=tokens,
            blocks=blocks_of(tokens),
            priority=priority,
            tenant=tenant,
            deadline_s=self.now + time_left_s,
        )
        self.next_id += 1
        self.scheduler.add(prompt)
        self.prompts[prompt.request_id] = prompt
        self.computed[prompt.request_id] = 0
        self.found[prompt.request_id] = int(tokens * cached) // BLOCK * BLOCK

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.prompts:
            request_id = data.draw(st.sampled_from(sorted(self.prompts)))
            self.scheduler.remove(request_id)
            del self.prompts[request_id]
            self.held.pop(request_id, None)

    @rule()
    def end_transfers(self) -> None:
        """Only what is wholly computed leaves the cache by itself."""
        self.held = {i: n for i, n in self.held.items() if i in self.prompts}

    @rule(elapsed_s=st.floats(0, 1), tokens_per_s=st.sampled_from([20.0, 1000.0, float("inf")]))
    def advance(self, elapsed_s: float, tokens_per_s: float) -> None:
        self.now += elapsed_s
        running = [self.prompts[i] for i in self.held if i in self.prompts]
        urgency = {p.request_id: self.slack(p, tokens_per_s) for p in running}
        free = POOL - sum(self.held.values())
        step = self.scheduler.schedule(free, self.now, tokens_per_s, self.enter)
        self.take_entering(step)
        self.take_slices(step.slices)
        wanting = [p for p in running if self.wants(p, step)]
        self.check_priorities(step, wanting)
        self.check_urgency(step, wanting, urgency, EIGHTH / tokens_per_s)
        assert step.slices or not running
        for piece in step.slices:
            if self.computed[piece.request_id] == self.prompts[piece.request_id].tokens:
                del self.prompts[piece.request_id]
        # Nothing is done only where something must leave the cache first.
        assert step.slices or not self.prompts or self.held

    def enter(self, request_id: int) -> int:
        self.computed[request_id] = self.found[request_id]
        return self.found[request_id]

    def slack(self, prompt: Prompt, tokens_per_s: float) -> float:
        left = prompt.tokens - self.computed[prompt.request_id]
        return prompt.deadline_s - self.now - left / tokens_per_s

    def take_entering(self, step: Step) -> None:
        assert set(step.entering) <= {piece.request_id for piece in step.slices}
        for request_id in step.entering:
            assert request_id not in self.held
            self.held[request_id] = self.prompts[request_id].blocks
        assert sum(self.held.values()) <= POOL

    def take_slices(self, slices: tuple[Slice, ...]) -> None:
        assert sum(piece.length for piece in slices) <= BUDGET
        assert len({piece.request_id for piece in slices}) == len(slices) <= SEQUENCES
        for piece in slices:
            assert piece.request_id in self.held
            assert piece.start == self.computed[piece.request_id]
            assert piece.length > 0
            end = self.prompts[piece.request_id].tokens
            assert piece.end == end or (piece.end < end and piece.end % BLOCK == 0)
            self.computed[piece.request_id] = piece.end

    def wants(self, prompt: Prompt, step: Step) -> bool:
        """Whether a running prompt could have been given another block in the step's order."""
        has_place = len(step.slices) < SEQUENCES or any(
            piece.request_id == prompt.request_id for piece in step.slices
        )
        return has_place and self.computed[prompt.request_id] < prompt.tokens

    def check_priorities(self, step: Step, wanting: list[Prompt]) -> None:
        """Lower ones get the eighth of the longest entitled, and what makes no block."""
        highest = max((p.priority for p in wanting), default=0)
        lower = [s.length for s in step.slices if self.prompts[s.request_id].priority < highest]
        assert sum(lower) < EIGHTH + BLOCK

    def check_urgency(
        self, step: Step, wanting: list[Prompt], urgency: dict[int, float], eighth_s: float
    ) -> None:
        """A tenant's less urgent ones get two eighths, and what makes no block.

        Who was given an eighth for being entitled is that much less urgent for the rest.
        """
        for prompt in wanting:
            slack = urgency[prompt.request_id]
            less_urgent = sum(
                piece.length
                for piece in step.slices
                if (other := self.prompts[piece.request_id]).priority == prompt.priority
                and other.tenant == prompt.tenant
                and urgency.get(other.request_id, -1.0) - eighth_s > slack >= 0
            )
            assert less_urgent < 2 * EIGHTH + BLOCK

    @invariant()
    def counts_add_up(self) -> None:
        running = sum(request_id in self.held for request_id in self.prompts)
        assert self.scheduler.running == running
        assert self.scheduler.waiting == len(self.prompts) - running

    def teardown(self) -> None:
        while self.prompts:
            self.end_transfers()
            self.advance(0.0, 1000.0)


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

sizes = st.lists(st.integers(1, 300), min_size=1, max_size=8)


@given(backlogs=st.tuples(sizes, sizes, sizes), head_start=st.integers(0, 20))
@example(backlogs=([300], [1], [1]), head_start=20)
@example(backlogs=([8], [300], [300]), head_start=0)
@settings(max_examples=60, deadline=None)
def test_backlogged_tenants_are_served_alike(
    backlogs: tuple[list[int], list[int], list[int]], head_start: int
) -> None:
    scheduler = Scheduler(max_batched_tokens=BUDGET, max_sequences=1000, block_size=BLOCK)
    lengths = [cycle(backlog) for backlog in backlogs]
    owner: list[int] = []
    pending = [0, 0, 0]
    served = [0, 0, 0]

    def top_up(tenant: int) -> None:
        while pending[tenant] < 2 * BUDGET:
            tokens = next(lengths[tenant])
            # The first tenant's prompts are the urgent ones, which must not help it.
            deadline_s = 1.0 if tenant == 0 else 9.0
            scheduler.add(
                Prompt(
                    request_id=len(owner),
                    tokens=tokens,
                    blocks=0,
                    tenant=str(tenant),
                    deadline_s=deadline_s,
                )
            )
            owner.append(tenant)
            pending[tenant] += tokens

    for step in range(head_start + 40):
        for tenant in range(3):
            if tenant == 0 or step >= head_start:
                top_up(tenant)
        for piece in scheduler.schedule(0).slices:
            pending[owner[piece.request_id]] -= piece.length
            if step >= head_start:
                served[owner[piece.request_id]] += piece.length
        # What a step gives at once, what a tenant may be ahead, and what is set aside in between.
        assert max(served) - min(served) <= 2 * BUDGET + 2 * EIGHTH


PATIENCE = 5
BYPASSES = 4
TRANSFER_STEPS = 3
SHORT = 40

arrivals = st.lists(
    st.lists(st.tuples(st.integers(1, SHORT), st.integers(0, 2)), max_size=3),
    min_size=1,
    max_size=6,
)


@given(pattern=arrivals, tokens=st.integers(1, 4 * POOL), late=st.booleans())
@example(pattern=[[(SHORT, 1)] * 3], tokens=4 * POOL, late=False)
@example(pattern=[[(SHORT, 0)] * 3], tokens=4 * POOL, late=True)
@example(pattern=[[(1, 1)] * 3], tokens=4 * POOL, late=False)
@settings(max_examples=40, deadline=None)
def test_prompt_is_computed_within_a_bound_of_steps_whatever_else_comes(
    pattern: list[list[tuple[int, int]]], tokens: int, late: bool
) -> None:
    scheduler = Scheduler(
        max_batched_tokens=BUDGET,
        block_size=BLOCK,
        max_bypasses=BYPASSES,
        patience_steps=PATIENCE,
    )
    victim = Prompt(
        request_id=0, tokens=tokens, blocks=POOL, deadline_s=-1.0 if late else float("inf")
    )
    blocks = {0: POOL}
    held: dict[int, int] = {}
    last_step: dict[int, int] = {}
    left = {0: tokens}
    scheduler.add(victim)
    batches = cycle(pattern)
    # Those who entered first finish; others pass; what they hold is handed over; its own turn.
    ahead = PATIENCE * 3 + BYPASSES
    bound = PATIENCE + ahead * (SHORT // EIGHTH + 1) + TRANSFER_STEPS + tokens // EIGHTH + 2
    for step in range(bound):
        for length, priority in next(batches):
            request_id = len(left)
            left[request_id], blocks[request_id] = length, blocks_of(length)
            scheduler.add(
                Prompt(
                    request_id=request_id,
                    tokens=length,
                    blocks=blocks_of(length),
                    priority=priority,
                    tenant="others",
                    deadline_s=step + 1.0,
                )
            )
        held = {i: n for i, n in held.items() if last_step.get(i, step) > step - TRANSFER_STEPS}
        decided = scheduler.schedule(POOL - sum(held.values()), float(step))
        held.update((request_id, blocks[request_id]) for request_id in decided.entering)
        for piece in decided.slices:
            left[piece.request_id] -= piece.length
            if left[piece.request_id] == 0:
                last_step[piece.request_id] = step
        if left[0] == 0:
            return
    raise AssertionError(f"{left[0]} of {tokens} tokens are left after {bound} steps")
