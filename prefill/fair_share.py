"""Owns how many tokens each tenant was given; knows no prompt, no step and no clock.

This is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al.,
OSDI 2024, section 4) with the start-time rule for those who come back: whoever has the lowest level
goes next, and a tenant that was idle is lifted to where the others are, so that it gets no credit
for the time in which it asked for nothing.
"""

# Idle tenants whose debt is remembered, in all; the longest idle is forgiven first.
_MAX_IDLE = 1024


class FairShare:
    """The levels of the tenants of one priority class."""

    def __init__(self) -> None:
        self._prompts: dict[str, int] = {}
        self._levels: dict[str, int] = {}
        # Idle tenants that had more than those who stayed: leaving and coming back does not help.
        self._debts: dict[str, int] = {}
        # Where the least favoured of those who were served stands; it never falls.
        self._floor = 0
        self._started: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether any tenant has a prompt."""
        return bool(self._prompts)

    def join(self, tenant: str) -> None:
        """Note that a tenant has one more prompt."""
        if tenant not in self._prompts:
            self._levels[tenant] = max(self._floor, self._debts.pop(tenant, 0))
        self._prompts[tenant] = self._prompts.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """Note that one of a tenant's prompts is computed or given up."""
        self._prompts[tenant] -= 1
        if self._prompts[tenant]:
            return
        del self._prompts[tenant]
        self._debts[tenant] = self._levels.pop(tenant)
        if len(self._debts) > _MAX_IDLE:
            del self._debts[next(iter(self._debts))]

    def level(self, tenant: str) -> int:
        """Tokens that a tenant was given, counted from where it was lifted to."""
        return self._levels[tenant]

    def charge(self, tenant: str, tokens: int) -> None:
        """Note that a tenant is given so many tokens in this step."""
        self._started.setdefault(tenant, self._levels[tenant])
        self._levels[tenant] += tokens

    def settle(self) -> None:
        """End a step: those who come from now on start where its least favoured one did."""
        # Not the least level of all: one whose prompt does not fit stands still for as long, and
        # whoever came meanwhile would share the credit that is due to it alone.
        if self._started:
            self._floor = max(self._floor, min(self._started.values()))
            self._debts = {t: debt for t, debt in self._debts.items() if debt > self._floor}
        self._started.clear()
