"""The seam between a request and its tries: one that begins with a prefill, and one that is carried
over with its KV.
"""

from collections.abc import Callable
from typing import Protocol

from router.departure import Departure
from router.ledger import InstanceKey
from router.request import Tokens


class Try(Protocol):
    """One try at the pools: `start`, `next_tokens` until its end, `close` once at any point.

    `suspect` names the instance that failed, where one did. Where there is a `past`, tokens that
    are neither the first nor the last ones may go there while `next_tokens` waits, which then does
    not return them: nobody has to wake up for them. It says whether it takes them.
    """

    suspect: InstanceKey | None
    past: Callable[[Tokens], bool] | None

    @property
    def decode_key(self) -> InstanceKey | None:
        """Where it decodes, if it does."""
        ...

    @property
    def has_output(self) -> bool:
        """Whether decode has given tokens."""
        ...

    def start(self) -> None:
        """Begins; raises Unavailable where an instance has gone."""
        ...

    async def next_tokens(self) -> Tokens | None:
        """Returns what came next, None where the sequence has paused; raises ServiceError."""
        ...

    def depart(self) -> Departure:
        """Asks for the sequence to pause."""
        ...

    def stay(self) -> None:
        """Lets it go on where it is after all."""
        ...

    def close(self) -> None:
        """Gives everything back."""
        ...
