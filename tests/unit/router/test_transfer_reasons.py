"""The router knows the names of all errors by which a transfer is lost."""

from kvtransfer import errors
from router.events import TRANSFER_LOST

# Said by the services, not by the transfer itself.
OTHERS = {"TransferClosed", "UnknownPeer"}


def test_each_transfer_error_is_known_to_the_router() -> None:
    assert {kind.__name__ for kind in errors.TransferError.__subclasses__()} | OTHERS == (
        TRANSFER_LOST
    )
