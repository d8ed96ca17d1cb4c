"""How a client connects: target, sizes, keepalive and the token. Knows no call."""

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


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Return the metadata that every call carries."""
    return (("authorization", f"Bearer {token}"),) if token is not None else ()


def checked_address(address: object) -> str:
    """Return "host:port"; raises TypeError for anything but text."""
    if not isinstance(address, str):
        raise TypeError(f'address has type {type(address).__name__}; give "host:port"')
    return address
