"""Owns how long decode is asked for room that the ledger says it has, and what a refusal means."""

import asyncio
from collections.abc import Awaitable, Callable

from router.events import Grant
from router.membership import Instance
from service.errors import Refused, ServiceError, Unavailable, WorkFailed

# What a decode instance that promised more than it has says of a request whose room earlier ones
# need. Nothing is wrong with it; the request goes on when there is room.
PREEMPTED = "PREEMPTED"
# How long decode may lack room that the ledger says it has, as after an abort.
RESERVE_PATIENCE_S = 10.0
_FIRST_BACKOFF_S = 0.02
_LAST_BACKOFF_S = 0.5


async def reserve(
    ask: Callable[[], Awaitable[Grant]], closing: asyncio.Event, clock: Callable[[], float]
) -> Grant | None:
    """Returns decode's grant, None where `closing` was set first; raises ServiceError.

    Not to be cancelled while a call is under way: an abort that overtakes a reservation would leave
    it behind for ever.
    """
    backoff_s = _FIRST_BACKOFF_S
    patience_ends = clock() + RESERVE_PATIENCE_S
    while not closing.is_set():
        try:
            return await ask()
        except ServiceError as exc:
            if not _is_passing(exc) or clock() >= patience_ends:
                raise
        try:
            async with asyncio.timeout(backoff_s):
                await closing.wait()
        except TimeoutError:
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
    return None


def _is_passing(error: ServiceError) -> bool:
    """Whether decode only lacks for a moment what the ledger says it has."""
    return (isinstance(error, Refused) and error.retryable) or error.reason == "NO_RUN_STREAM"


def refusal(instance: Instance, error: ServiceError) -> ServiceError:
    """Returns what it means for a try that its reservation was refused for good."""
    if isinstance(error, Refused) and error.retryable:
        if instance.capacity.expected_output_tokens:
            # Others have outgrown what was booked for them: as if it had been handed back.
            return WorkFailed(error.message, reason=PREEMPTED, retryable=True)
        return Unavailable(f"decode had no room after all: {error.message}", reason=error.reason)
    return error
