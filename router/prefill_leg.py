"""Owns one prefill instance's part in a try of a request: from the start of its stream to the
confirmed end. A try has one at a time; where that is lost, another may take over.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from router.events import Event, Grant, PrefillEnded, PrefillEvent, Transferred
from router.inbox import Inbox
from router.ledger import InstanceKey
from router.membership import Instance
from router.prefill_link import PrefillLink
from router.request import ValidRequest
from router.tasks import Tasks

# An instance that has done its part ends the stream within this time, or is told to.
_END_GRACE_S = 1.0
_ABORT_TRIES = 3
# The end of the transfer is told on another stream than the tokens it made possible.
_STATS_GRACE_S = 0.2

_log = logging.getLogger(__name__)


class PrefillLeg:
    """A stream to one prefill instance; what happens there goes to `inbox`, with this leg.

    `leg_id` is the request's id at the instance, and that of its entry in the ledger; `cp_first` is
    the instance's cp rank that has the prompt's first tokens.
    """

    def __init__(
        self,
        leg_id: int,
        link: PrefillLink,
        request: ValidRequest,
        *,
        cp_first: int,
        transfer: bool,
        remaining_s: float,
        inbox: Callable[["PrefillLeg", PrefillEvent], None],
    ) -> None:
        self.leg_id = leg_id
        self.cp_first = cp_first
        self._link = link
        self._call = link.run(
            leg_id,
            request,
            cp_first=cp_first,
            transfer=transfer,
            remaining_s=remaining_s,
            inbox=lambda event: inbox(self, event),
        )

    @property
    def instance(self) -> Instance:
        return self._link.instance

    @property
    def key(self) -> InstanceKey:
        return self._link.instance.key

    @property
    def has_ended(self) -> bool:
        return self._call.task.done()

    def send_grant(self, grant: Grant) -> None:
        """Sends decode's leave on, as soon as the stream takes it."""
        self._call.send_grant(grant)

    def close(self, tasks: Tasks, *, is_finished: bool) -> None:
        """Ends the leg in background work; one that has done its part may end by itself."""
        tasks.spawn(self._end(is_finished))

    async def _end(self, is_finished: bool) -> None:
        if is_finished:
            await asyncio.wait({self._call.task}, timeout=_END_GRACE_S)
        if not self._call.task.done():
            self._call.cancel()
            await confirm_abort(self._link.abort, self.leg_id, "prefill")


async def confirm_abort(
    abort: Callable[[int], Awaitable[bool]], request_id: int, role: str
) -> None:
    """Asks an instance to end a request until it says that it has, within reason."""
    for _ in range(_ABORT_TRIES):
        if await abort(request_id):
            return
    _log.warning(
        "a %s instance did not confirm an abort", role, extra={"request_id": f"{request_id:016x}"}
    )


async def hear_transferred(
    inbox: Inbox[tuple[PrefillLeg | None, Event]], leg: PrefillLeg
) -> Transferred | None:
    """Gives the end of a leg's transfer a moment to be told; None where it is not."""
    try:
        async with asyncio.timeout(_STATS_GRACE_S):
            while not leg.has_ended:
                source, event = await inbox.get()
                if source is leg and isinstance(event, Transferred):
                    return event
                if source is leg and isinstance(event, PrefillEnded):
                    return None
    except TimeoutError:
        pass
    return None
