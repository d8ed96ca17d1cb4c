"""How a client connects: target, sizes, keepalive. Knows no call."""

import grpc
from twinpool.credentials import Tls

MESSAGE_BYTES = 16 * 2**20

OPTIONS = [
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    # A dead peer is noticed within half a minute, also while a request waits without a word.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A server that was restarted is found again within seconds, not after two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Whether to try again is the caller's decision.
    ("grpc.enable_retries", 0),
]

# For calls that ask a question and do no work.
QUESTION_TIMEOUT_S = 10.0


def transport(
    tls: Tls | None, credentials: grpc.ChannelCredentials | None
) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, int | str]]]:
    """Return a channel's credentials, None for a plain one, and its options.

    Raises ValueError for both at once and for files that cannot be read.
    """
    if tls is not None and credentials is not None:
        raise ValueError("tls and credentials: give one of them")
    if tls is None:
        return credentials, [*OPTIONS]
    return tls.credentials(), [*OPTIONS, *tls.options()]


def checked_addresses(address: object) -> tuple[str, ...]:
    """Return each "host:port" of a text with commas between them, or of a sequence of such.

    Raises TypeError for another type, ValueError where there is none or one comes twice.
    """
    given = [address] if isinstance(address, str) else address
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise TypeError(
            f'address has type {type(address).__name__}; give "host:port", more of them with commas'
            " between, or a sequence"
        )
    found = [part.strip() for one in given for part in one.split(",") if part.strip()]
    if not found or len(set(found)) < len(found):
        raise ValueError(f'address {address!r}: give one "host:port" or more, each once')
    return tuple(found)
