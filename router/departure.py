"""Owns the leave of one try's sequence from its decode instance: paused, then sent or let go on.

Knows nothing of where it goes.
"""

from collections.abc import Callable, Sequence

from router.decode_link import DecodeLink
from router.events import DecodeEvent, DecodeFailed, Grant, Paused
from router.ledger import InstanceKey
from router.membership import Instance
from service.errors import ServiceError, WorkFailed


class Departure:
    """Begins by asking the instance for a pause; the try notes in `paused` when it has come.

    Args:
        inbox: Where the try takes the sequence's events.
        pending: Takes those out of there that the try has not looked at.
    """

    def __init__(
        self,
        request_id: int,
        link: DecodeLink,
        *,
        inbox: Callable[[DecodeEvent], None],
        pending: Callable[[], Sequence[DecodeEvent]],
    ) -> None:
        self.paused: Paused | None = None
        self._request_id = request_id
        self._link = link
        self._inbox = inbox
        self._pending = pending
        self._failure: DecodeFailed | None = None
        link.pause(request_id)

    @property
    def instance(self) -> Instance:
        return self._link.instance

    @property
    def has_failed(self) -> bool:
        """Whether the sequence is lost where it was."""
        return self._failure is not None

    def divert(self, inbox: Callable[[DecodeEvent], None]) -> None:
        """From here on the sequence's events go to `inbox`. Raises Unavailable where it is lost."""

        def hear(event: DecodeEvent) -> None:
            if isinstance(event, DecodeFailed):
                self._failure = event
            inbox(event)

        for event in self._pending():
            hear(event)
        try:
            self._link.attach(self._request_id, hear)
        except ServiceError as exc:
            self._failure = DecodeFailed(exc)
            raise

    def send(self, grant: Grant) -> None:
        """Has the sequence's KV sent where the grant says."""
        self._link.send(self._request_id, grant)

    def go_back(self) -> None:
        """Lets the sequence go on where it was; where it is lost the try hears of that."""
        if self._failure is None:
            try:
                self._link.attach(self._request_id, self._inbox)
                self._link.resume(self._request_id)
            except ServiceError as exc:
                self._failure = DecodeFailed(exc)
        if self._failure is not None:
            self._inbox(self._failure)


def sent_away(key: InstanceKey) -> WorkFailed:
    """Returns what it means that a sequence has ended for having been sent where none goes on."""
    return WorkFailed(
        f"decode instance {key.name!r} has sent the sequence away", reason="SENT", retryable=True
    )
