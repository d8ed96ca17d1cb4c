"""Options of gRPC channels and servers, and how one Twinpool process dials another.

Owns sizes and keepalive; knows no service.
"""

import grpc

from service.security.channel import SecureChannel, connect
from service.security.settings import PLAIN, Security
from service.security.tls import Pems

MIB = 1 << 20
WORKER_MESSAGE_BYTES = 64 * MIB
PUBLIC_MESSAGE_BYTES = 16 * MIB

_KEEPALIVE_MS = 10_000
_KEEPALIVE_TIMEOUT_MS = 5_000

Options = list[tuple[str, int]]


def _sizes(max_message_bytes: int) -> Options:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]


def server_options(max_message_bytes: int) -> Options:
    """Returns a server's options: keepalive on, pings of idle clients allowed, port not shared."""
    return [
        *_sizes(max_message_bytes),
        # With the default of 1 a second process binds the same port and takes half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def channel_options(max_message_bytes: int) -> Options:
    """Returns a channel's options: keepalive on, quick reconnects, no connections shared."""
    return [
        *_sizes(max_message_bytes),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        # The default back-off grows to two minutes: a restarted peer would stay away that long.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Else a new channel to a dead address inherits the back-off of the old one.
        ("grpc.use_local_subchannel_pool", 1),
        # A retry must be the caller's decision: it knows what was streamed already.
        ("grpc.enable_retries", 0),
    ]


def dial(
    address: str,
    *,
    max_message_bytes: int = WORKER_MESSAGE_BYTES,
    security: Security = PLAIN,
) -> grpc.aio.Channel:
    """Returns a channel to another process of the cluster; connects with the first call.

    With `security` it speaks TLS, shows the process's certificate, and sends its token.
    """
    options = channel_options(max_message_bytes)
    if security.tls is None and security.shows is None:
        return grpc.aio.insecure_channel(address, options=options)
    server_name = security.tls.server_name if security.tls is not None else ""

    def make(pems: Pems | None) -> grpc.aio.Channel:
        return connect(address, pems, options, server_name)

    token = security.shows.shown if security.shows is not None else None
    return SecureChannel(make, tls=security.tls, token=token)
