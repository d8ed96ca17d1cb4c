"""Joins the credits of routers with their registrations, and with what sequences really hold.

Owns who is which router, and when what a lost one held is counted as given back; how much each
gets is `decode.credits`. On the event loop's thread alone.
"""

import asyncio
from collections.abc import Callable

from twinpool.v1.worker_pb2 import Credit, CreditUse

from decode.admission import Admission
from decode.credits import Credits, Grant, Use

# Between two looks at what the requests of lost routers still hold.
_LOOK_S = 0.02


class CreditDesk:
    """Gives each registration a `Line`, over which its router's credit goes and its use comes.

    Implements `service.registration.CreditSource`.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._credits = Credits(admission.totals)
        self._nothing = [0] * len(admission.totals)
        self._lines: dict[int, Line] = {}
        self._orphans: set[int] = set()
        self._looking = False
        self._joined = 0

    def begin(self, router_id: str, wake: Callable[[], None]) -> "Line":
        """Take a router in; `wake` is called whenever there is a credit to send."""
        self._joined += 1
        line = Line(self, self._joined, router_id, wake)
        self._lines[line.number] = line
        self._credits.join(line.number)
        self._grant()
        return line

    def end(self, line: "Line") -> None:
        """A router is gone: its credit comes back, less what its requests hold as they end."""
        del self._lines[line.number]
        self._orphans |= self._admission.of_router_process(line.router_id)
        self._credits.leave(line.number, self._held_by_orphans())
        self._grant()
        self._look_later()

    def heard(self, line: "Line", use: CreditUse) -> None:
        """Take in what a router says of its credit."""
        self._credits.heard(line.number, use.serial, _use_from_wire(use))
        self._grant()

    def grant_of(self, line: "Line") -> Grant:
        """What a router may reserve."""
        return self._credits.grant_of(line.number)

    def check_integrity(self) -> None:
        """Raise where routers may reserve more than there is."""
        self._credits.check_integrity()

    def _grant(self) -> None:
        for number in self._credits.grant():
            self._lines[number].wake()

    def _held_by_orphans(self) -> list[int]:
        held = self._admission.held_by(self._orphans)
        self._orphans = set(held)
        return [sum(column) for column in zip(self._nothing, *held.values(), strict=True)]

    def _look_later(self) -> None:
        if self._orphans and not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._looking = False
        self._credits.set_orphaned(self._held_by_orphans())
        self._grant()
        self._look_later()


class Line:
    """One router's credit, for as long as one registration lives."""

    def __init__(
        self, desk: CreditDesk, number: int, router_id: str, wake: Callable[[], None]
    ) -> None:
        self.number = number
        self.router_id = router_id
        self.wake = wake
        self._desk = desk

    def credit(self) -> Credit:
        """What the router is to be told now."""
        grant = self._desk.grant_of(self)
        *blocks, sequences = grant.amounts
        return Credit(
            serial=grant.serial,
            blocks=blocks,
            sequences=sequences,
            shared=grant.shared,
            scarce=grant.scarce,
        )

    def take(self, use: CreditUse) -> None:
        """Take in the router's answer.

        Raises:
            ValueError: It does not fit what it was told.
        """
        self._desk.heard(self, use)

    def close(self) -> None:
        """The registration is over."""
        self._desk.end(self)


def _use_from_wire(use: CreditUse) -> Use:
    return Use(
        held=[*use.held, use.sequences_held],
        wanted=[*use.wanted, use.sequences_wanted],
        largest=[*use.largest, 0],
    )
