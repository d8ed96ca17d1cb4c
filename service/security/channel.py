"""A channel to another process that goes on through changes of certificates and tokens.

Owns which connection a call goes over and the token that it shows; knows no service.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from service.security.tls import Pems, Tls, channel_credentials

Make = Callable[[Pems | None], grpc.aio.Channel]


class SecureChannel(grpc.aio.Channel):
    """Adds the token to each call, and takes a new connection once the TLS files have changed.

    Calls that run over an older connection go on there; all are closed together. `make` makes a
    connection with the files' content, None without TLS; `token` returns what to show.
    """

    def __init__(self, make: Make, *, tls: Tls | None, token: Callable[[], str] | None) -> None:
        self._make = make
        self._tls = tls
        self._token = token
        self._version = -1
        self._channels: list[grpc.aio.Channel] = []
        self._current()

    def metadata(self, given: Any) -> Any:
        """Returns a call's metadata with the token."""
        if self._token is None:
            return given
        return (*(given or ()), ("authorization", f"Bearer {self._token()}"))

    def _current(self) -> grpc.aio.Channel:
        pems, version = self._tls.current() if self._tls is not None else (None, 0)
        if version != self._version:
            self._version = version
            self._channels.append(self._make(pems))
        return self._channels[-1]

    def _calls(self, kind: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Returns what starts calls of one method, on the channel that is the latest by then."""
        made: dict[grpc.aio.Channel, Any] = {}

        def call(*args: Any, metadata: Any = None, **more: Any) -> Any:
            channel = self._current()
            if channel not in made:
                made.clear()
                made[channel] = getattr(channel, kind)(*arguments, **options)
            return made[channel](*args, metadata=self.metadata(metadata), **more)

        return call

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return self._calls("unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return self._calls("unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        return self._calls("stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return self._calls("stream_stream", arguments, options)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._current().channel_ready()

    async def close(self, grace: float | None = None) -> None:
        await asyncio.gather(*(channel.close(grace) for channel in self._channels))

    async def __aenter__(self) -> "SecureChannel":
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        await self.close(None)


def connect(
    address: str, pems: Pems | None, options: list[tuple[str, int]], server_name: str
) -> grpc.aio.Channel:
    """Returns a channel over TLS, or a plain one; `server_name` stands for the address's name."""
    if pems is None:
        return grpc.aio.insecure_channel(address, options=options)
    names = [("grpc.ssl_target_name_override", server_name)] if server_name else []
    return grpc.aio.secure_channel(address, channel_credentials(pems), options=[*options, *names])
