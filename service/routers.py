"""Keeps an instance registered with every router: a fixed list, or all that a DNS name stands for.

Owns which routers there are, and what they say together; a stream to one is `service.registration`.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from twinpool.v1.worker_pb2 import Heartbeat, InstanceHello, Peer

from service.instance_config import DNS_PREFIX
from service.lifecycle import join_address
from service.prefix_journal import PrefixJournal, PrefixReader
from service.registration import CreditSource, Registration, RegistrationRefused
from service.security.settings import PLAIN, Security

_log = logging.getLogger(__name__)

# Between two look-ups of a name: routers that come and go there are found as fast.
LOOK_UP_S = 3.0
# Until a router that refused the instance, while others took it, is asked again.
_REFUSED_S = 10.0

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """Returns the addresses that a name stands for, as host:port. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({join_address(str(sockaddr[0]), port) for *_, sockaddr in found})


class Routers:
    """The registrations of one instance, one for each router.

    `routers` are host:port, or dns:NAME:PORT for all addresses of a name. `on_peers` is told the
    decode instances that any router knows. The rest is as for `Registration`.
    """

    def __init__(
        self,
        *,
        routers: Sequence[str],
        hello: InstanceHello,
        heartbeat: Callable[[], Heartbeat],
        assets: Callable[[], Mapping[str, bytes]],
        on_peers: Callable[[list[Peer]], None],
        on_drain: Callable[[str], None],
        prefixes: PrefixJournal | None = None,
        credits: CreditSource | None = None,
        security: Security = PLAIN,
        look_up: Resolve = resolve,
        look_up_s: float = LOOK_UP_S,
    ) -> None:
        self._routers = routers
        self._hello = hello
        self._heartbeat = heartbeat
        self._assets = assets
        self._on_peers = on_peers
        self._on_drain = on_drain
        self._prefixes = prefixes
        self._credits = credits
        self._security = security
        self._look_up = look_up
        self._look_up_s = look_up_s
        # What a name stood for when it was looked up last: kept while it cannot be.
        self._found: dict[str, list[str]] = {}
        self._unknown: set[str] = set()
        self._joined: dict[str, _Joined] = {}
        self._refused: dict[str, float] = {}

    @property
    def addresses(self) -> list[str]:
        """The routers of now, as host:port."""
        return sorted(self._joined)

    @property
    def registered(self) -> int:
        """How many routers have accepted this instance and are connected."""
        return sum(joined.registration.registered for joined in self._joined.values())

    def beat(self) -> None:
        """Has all of them told now what a heartbeat says."""
        for joined in self._joined.values():
            joined.registration.beat()

    async def run(self) -> None:
        """Stays registered with all of them for ever.

        Raises `RegistrationRefused` where every router there is refuses the instance as such.
        """
        has_names = any(router.startswith(DNS_PREFIX) for router in self._routers)
        try:
            while True:
                self._follow(await self._look_up_all())
                timeout_s = self._look_up_s if has_names or self._refused else None
                running = {joined.task for joined in self._joined.values()}
                if running:
                    await asyncio.wait(
                        running, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
                    )
                else:
                    await asyncio.sleep(self._look_up_s)
                self._take_refusals()
        finally:
            for joined in self._joined.values():
                joined.task.cancel()
            tasks = [joined.task for joined in self._joined.values()]
            await asyncio.gather(*tasks, return_exceptions=True)

    # ---- which routers there are

    async def _look_up_all(self) -> list[str]:
        addresses: list[str] = []
        for router in self._routers:
            if router.startswith(DNS_PREFIX):
                await self._look_up_name(router)
                addresses += self._found.get(router, [])
            else:
                addresses.append(router)
        return list(dict.fromkeys(addresses))

    async def _look_up_name(self, router: str) -> None:
        name, _, port = router.removeprefix(DNS_PREFIX).rpartition(":")
        try:
            self._found[router] = await self._look_up(name, int(port))
            self._unknown.discard(router)
        except OSError as exc:
            if router not in self._unknown:
                _log.warning("no router is found as %s (%s), looking again", name, exc.strerror)
            self._unknown.add(router)

    def _follow(self, addresses: Sequence[str]) -> None:
        now = asyncio.get_running_loop().time()
        self._refused = {a: t for a, t in self._refused.items() if t > now and a in addresses}
        for address in self._joined.keys() - set(addresses):
            # One that stops has no name any more, and goes on with the requests that it has.
            if not self._joined[address].registration.registered:
                _log.info("router %s is none any more", address)
                self._joined.pop(address).leave()
        for address in addresses:
            if address not in self._joined and address not in self._refused:
                self._joined[address] = self._join(address)

    def _join(self, address: str) -> "_Joined":
        reader = self._prefixes.reader() if self._prefixes is not None else None
        registration = Registration(
            router_address=address,
            hello=self._hello,
            heartbeat=self._heartbeat,
            assets=self._assets,
            on_peers=lambda peers: self._take_peers(address, peers),
            on_drain=self._on_drain,
            prefixes=reader,
            credits=self._credits,
            security=self._security,
        )
        return _Joined(registration, reader, asyncio.create_task(registration.run()))

    def _take_refusals(self) -> None:
        for address, joined in [*self._joined.items()]:
            if not joined.task.done():
                continue
            self._joined.pop(address).leave()
            try:
                joined.task.result()
            except RegistrationRefused as exc:
                if not self._joined:
                    raise
                _log.error("%s; other routers are left", exc)
                self._refused[address] = asyncio.get_running_loop().time() + _REFUSED_S

    def _take_peers(self, address: str, peers: list[Peer]) -> None:
        if address in self._joined:
            self._joined[address].peers = peers
            self._on_peers(self._all_peers())

    def _all_peers(self) -> list[Peer]:
        """The decode instances that connected routers know, each in its latest life."""
        # What a lost router last knew may be gone; it counts where there is nobody else to ask.
        known = [j for j in self._joined.values() if j.peers is not None]
        connected = [joined for joined in known if joined.registration.registered]
        latest: dict[str, Peer] = {}
        for joined in connected or known:
            for peer in joined.peers or ():
                if peer.name not in latest or latest[peer.name].epoch < peer.epoch:
                    latest[peer.name] = peer
        return [*latest.values()]


@dataclass
class _Joined:
    """One router of now, and the decode instances that it knows; None: it has named none yet."""

    registration: Registration
    reader: PrefixReader | None
    task: "asyncio.Task[None]"
    peers: list[Peer] | None = None

    def leave(self) -> None:
        """Let the stream end, and hear nothing more of it."""
        self.registration.close()
        if self.reader is not None:
            self.reader.close()
        # Whatever it ends with is of no use any more.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())
