"""The one tree of errors of the KV transfer, and their codes on the wire.

Owns names, codes and what each error tells a caller to do. Knows nothing of gRPC.
"""


class TransferError(Exception):
    """A transfer, or the connection it needs, failed; `retryable` says if a new grant may help."""

    code = 1
    retryable = True


class PeerLost(TransferError):
    """The other side died, went silent, or its connection broke."""

    code = 2


class GrantExpired(TransferError):
    """The grant's time to live ran out before every piece had arrived."""

    code = 3


class GrantRefused(TransferError):
    """The receiver does not know the grant, or the data does not match what was granted."""

    code = 4


class StaleEpoch(TransferError):
    """The data or the connection belongs to an earlier life of an instance."""

    code = 5


class ChecksumMismatch(TransferError):
    """A message arrived, but its bytes are not the bytes that were sent."""

    code = 6


class ManifestMismatch(TransferError):
    """What the sender says it sent is not what arrived."""

    code = 7


class TransferAborted(TransferError):
    """One side gave the transfer up on purpose."""

    code = 8


class CreditStalled(TransferError):
    """The receiver gave no slot back for too long."""

    code = 9


class LayoutMismatch(TransferError):
    """Two pools cannot exchange KV: model, shape, element type or protocol differ."""

    code = 10
    retryable = False


class ConnectionRefused(TransferError):
    """The other side answered the hello with a refusal."""

    code = 11
    retryable = False


class ProtocolViolation(TransferError):
    """A message that no correct peer would send."""

    code = 12


class AckTimeout(TransferError):
    """Everything was sent, but the receiver never confirmed the manifest."""

    code = 13


class StaleRead(TransferError):
    """The sender let its blocks go before the receiver had read them."""

    code = 14


_BY_CODE: dict[int, type[TransferError]] = {
    cls.code: cls
    for cls in (
        PeerLost,
        GrantExpired,
        GrantRefused,
        StaleEpoch,
        ChecksumMismatch,
        ManifestMismatch,
        TransferAborted,
        CreditStalled,
        LayoutMismatch,
        ConnectionRefused,
        ProtocolViolation,
        AckTimeout,
        StaleRead,
    )
}


def from_code(code: int, message: str) -> TransferError:
    """Return the error that a code read from the wire stands for; unknown codes are generic."""
    return _BY_CODE.get(code, TransferError)(message)
