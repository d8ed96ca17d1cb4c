"""The ranks of an instance: how they start, find each other, and which part each has.

Owns the processes that the first rank starts, and the process groups of all. The ranks meet at a
store of torch.distributed: the one that torchrun has made where it started them, else one of the
first rank's own. Nothing but bytes goes through it.
"""

import asyncio
import logging
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from math import prod

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous
from twinpool.v1 import rank_pb2_grpc

from engine.collectives import GroupCollectives, GroupExperts
from engine.config import load_config
from engine.errors import EngineError
from engine.parallel import Layout
from engine.ring.comm import GroupComm, Wire
from service.errors import StartError
from service.instance import Incarnation, Part, die
from service.lifecycle import Server
from service.parent import PARENT_PID_VARIABLE
from service.ranks.config import RanksConfig
from service.ranks.leader import Followers
from service.security.settings import PLAIN, Security

log = logging.getLogger(__name__)

# How long ranks wait for one that loads its model. One that has died is noticed at once.
_MEETING = timedelta(minutes=30)
# A rank that takes part in a step and is not heard of for so long has a broken network.
_STEP_TIMEOUT_S = 60.0
_STEP_TIMEOUT = timedelta(seconds=_STEP_TIMEOUT_S)
_END_S = 5.0
_ADDRESS, _SECRET = "leader", "secret"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands among the ranks, and where they meet."""

    rank: int
    store: Store
    children: tuple["subprocess.Popen[bytes]", ...] = ()


def given_rank() -> int | None:
    """The rank that torchrun gave this process; None where it was not started so."""
    rank = os.environ.get("RANK")
    return int(rank) if rank is not None else None


def given_place() -> Place:
    """The place that the environment names, as torchrun sets it."""
    store, rank, _ = next(rendezvous("env://", timeout=_MEETING))
    return Place(rank=rank, store=PrefixStore("twinpool", store))


def first_place(settings: RanksConfig) -> Place:
    """Start the other ranks on this host; they end with this process, however it ends."""
    listener = socket.create_server(("127.0.0.1", 0))  # the store's own would be on every address
    store = TCPStore(
        "127.0.0.1",
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=_MEETING,
        master_listen_fd=listener.detach(),
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    children = []
    for rank in range(1, settings.ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(settings.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            PARENT_PID_VARIABLE: str(os.getpid()),
        }
        command = [sys.executable, "-m", f"{settings.role}.member"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
        assert child.stdin is not None
        child.stdin.write(settings.model_dump_json(exclude_unset=True).encode())
        child.stdin.close()
        children.append(child)
    return Place(rank=0, store=PrefixStore("twinpool", store), children=tuple(children))


def take_part(settings: RanksConfig, rank: int, store: Store) -> Part:
    """Join the ranks' process groups; all ranks call it, and return when all have."""
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=settings.ranks, timeout=_MEETING
    )
    layout = layout_of(settings, rank)
    groups = {axis: _group(settings, rank, (axis,)) for axis in settings.axes}
    of_experts = _group(settings, rank, ("dp", "tp")) if layout.ep > 1 or layout.dp > 1 else None
    # The last stage is told of a step when the first one is, and waits for all between them.
    through_s = _STEP_TIMEOUT_S * layout.pp
    return Part(
        layout=layout,
        ranks=GroupCollectives(groups["tp"]) if layout.tp > 1 else None,
        experts=GroupExperts(of_experts) if of_experts is not None else None,
        ring=Wire(GroupComm(groups["cp"], _STEP_TIMEOUT_S)) if layout.cp > 1 else None,
        stages=Wire(GroupComm(groups["pp"], through_s)) if layout.pp > 1 else None,
        rank=rank,
        meet=dist.barrier,
        greatest=_greatest,
    )


def _places(settings: RanksConfig) -> NDArray[np.int64]:
    """Which rank is where, by the axes in their order."""
    return np.arange(settings.ranks).reshape(tuple(settings.axes.values()))


def _group(settings: RanksConfig, rank: int, axes: tuple[str, ...]) -> dist.ProcessGroup:
    """Make the groups of ranks that differ in some axes only; return this rank's.

    Every rank makes every group, in one order.
    """
    last = [list(settings.axes).index(axis) for axis in axes]
    places = np.moveaxis(_places(settings), last, range(-len(last), 0))
    lines = places.reshape(-1, prod(settings.axes[axis] for axis in axes)).tolist()
    groups = [(line, dist.new_group(line, timeout=_STEP_TIMEOUT)) for line in lines]
    own: dist.ProcessGroup = next(group for line, group in groups if rank in line)
    return own


@asynccontextmanager
async def led(
    settings: RanksConfig, who: Incarnation, security: Security = PLAIN
) -> AsyncIterator[tuple[Followers | None, Part]]:
    """Be the first rank: start the others where nobody else has, and join them.

    At the end the others are let go. Where one is lost before, this process ends. Without others
    there is nothing to do, and no `Followers`.
    """
    if settings.ranks == 1:
        yield None, Part()
        return
    check_layout(settings)
    given = given_rank() is not None
    place = await asyncio.to_thread(given_place) if given else first_place(settings)
    secret = secrets.token_bytes(16)
    followers = Followers(
        count=settings.ranks - 1,
        secret=secret,
        who=who,
        on_lost=_go_down,
    )
    server = Server("ranks", host=settings.data_host, security=security)
    server.add(rank_pb2_grpc.add_RanksServicer_to_server, followers, "twinpool.v1.Ranks")
    await server.start()
    place.store.set(_SECRET, secret.hex())
    place.store.set(_ADDRESS, server.address)
    watching = [
        asyncio.create_task(_watch(place.children, followers)),
        asyncio.create_task(followers.watch()),
    ]
    try:
        yield followers, await asyncio.to_thread(take_part, settings, 0, place.store)
    finally:
        followers.close()
        for task in watching:
            task.cancel()
        await server.stop()
        await asyncio.to_thread(_end, place.children)


def check_layout(settings: RanksConfig) -> None:
    """Raise StartError for a layout that cannot be, before any rank is started."""
    started = int(os.environ.get("WORLD_SIZE", settings.ranks))
    if given_rank() is not None and started != settings.ranks:
        degrees = " x ".join(f"--{axis} {degree}" for axis, degree in settings.axes.items())
        raise StartError(
            f"{degrees} make {settings.ranks} ranks, but torchrun has started {started}:"
            f" give both the same number"
        )
    try:
        layout_of(settings, 0).check(load_config(settings.model.expanduser()))
    except EngineError as error:
        raise StartError(str(error)) from error


def coordinates(settings: RanksConfig, rank: int) -> dict[str, int]:
    """Where a rank stands on each axis."""
    found = np.argwhere(_places(settings) == rank)[0].tolist()
    return dict(zip(settings.axes, found, strict=True))


def layout_of(settings: RanksConfig, rank: int) -> Layout:
    """What part of the model a rank has."""
    places = {f"{axis}_rank": at for axis, at in coordinates(settings, rank).items()}
    return Layout(**settings.axes, **places, **settings.layout_options)  # type: ignore[arg-type]


def rank_name(settings: RanksConfig, rank: int) -> str:
    """A rank and its place in the layout, for logs: "3 pp1 tp1" of pp 2 x tp 2."""
    places = coordinates(settings, rank).items()
    return " ".join([str(rank), *(f"{axis}{at}" for axis, at in places if settings.axes[axis] > 1)])


def log_name(settings: RanksConfig, who: Incarnation, rank: int) -> str:
    """An instance's name in a rank's log: with the rank where there are several."""
    return who.name if settings.ranks == 1 else f"{who.name}[{rank_name(settings, rank)}]"


def _greatest(x: Tensor) -> Tensor:
    """See engine.ring.calibrate.Greatest."""
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def meet_first(place: Place) -> tuple[str, bytes]:
    """The first rank's address and the ranks' secret; waits until it has told them."""
    address = place.store.get(_ADDRESS).decode()
    return address, bytes.fromhex(place.store.get(_SECRET).decode())


def _go_down(what: str) -> None:
    log.error("%s: the instance cannot go on without it", what)
    die(RankLost(what))


class RankLost(Exception):
    """A rank of this instance has ended or does not answer."""


async def _watch(children: tuple["subprocess.Popen[bytes]", ...], followers: Followers) -> None:
    """Notice ranks that end before they have called; later their streams tell sooner."""
    while True:
        for rank, child in enumerate(children, start=1):
            if child.poll() is not None:
                followers.lost(f"the process of rank {rank} has ended with {child.returncode}")
        await asyncio.sleep(0.2)


def _end(children: tuple["subprocess.Popen[bytes]", ...]) -> None:
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(_END_S)
        if child.poll() is None:
            child.kill()
            child.wait()
