"""Two routers of one cluster: both serve, share what decode has, and outlive each other."""

import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from twinpool import Client
from twinpool.errors import TwinpoolError
from twinpool.v1 import worker_pb2, worker_pb2_grpc

from launch.builtin import MODEL_DIR
from tests.integration.cluster import START_TIMEOUT_S, Cluster, free_port, wait_until
from tests.integration.conftest import Reference, reference
from tests.integration.test_ranks import prompt_of

NAMES = ("router", "second")
FLAGS = ("--dtype", "float32", "--block-size", "8", "--kv-memory-mib", "1")
MAX_NEW = 80


class Pair(Cluster):
    """A cluster with another router, named "second"."""

    def __init__(self, logs: Path, flags: tuple[str, ...] = FLAGS, **options: Any) -> None:
        second = f"127.0.0.1:{free_port()}"
        self._metrics = free_port()
        more = {"decode": ("--metrics-port", str(self._metrics))}
        super().__init__(MODEL_DIR, logs, *flags, more_flags=more, **options)
        self.addresses = dict(zip(NAMES, (self.address, second), strict=True))
        port = second.rpartition(":")[2]
        for name, (role, *rest) in self._commands.items():
            if role != "router":
                self._commands[name] = [role, *rest, "--router", second]
        self._commands = {"second": ["router", "--port", port], **self._commands}

    def wait_ready(self) -> None:
        """Return when both routers know every instance."""
        for name in NAMES:
            wait_until(partial(self.knows, name), f"{name} knows the pools", START_TIMEOUT_S)

    def to(self, name: str) -> Client:
        """A client of one of the routers."""
        return Client(self.addresses[name])

    def status(self, name: str) -> worker_pb2.GetStatusResponse:
        """What a router knows, as it goes over the wire."""
        with grpc.insecure_channel(self.addresses[name]) as channel:
            stub: Any = worker_pb2_grpc.MembershipStub(channel)
            found: worker_pb2.GetStatusResponse = stub.GetStatus(
                worker_pb2.GetStatusRequest(), timeout=5
            )
        return found

    def knows(self, name: str) -> bool:
        """Whether a router has all instances and a credit to use them."""
        try:
            found = self.status(name).instances
        except grpc.RpcError:
            return False
        return {i.name for i in found if not i.connecting} == self.instances and all(
            i.credit_blocks for i in found
        )

    @property
    def instances(self) -> set[str]:
        """The names of all instances."""
        return self._commands.keys() - {*NAMES}

    def credit(self, name: str) -> int:
        """The blocks of decode that a router may promise."""
        return sum(i.credit_blocks for i in self.status(name).instances if i.name == "decode")

    def blocks(self) -> worker_pb2.BlockCounts:
        """Those of decode."""
        status = self.status("second")
        return next(i.blocks for i in status.instances if i.name == "decode")

    def refused(self) -> float:
        """Reservations that decode has refused for lack of room."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics") as page:
            lines = page.read().decode().splitlines()
        found = "twinpool_decode_refused_reservations_total "
        [value] = [line.removeprefix(found) for line in lines if line.startswith(found)]
        return float(value)


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("logs")) as running:
        yield running


class Load:
    """Requests that run at one router until the end of the block."""

    def __init__(self, pair: Pair, name: str, clients: int, prompt_tokens: int = 12) -> None:
        self._pair = pair
        self._name = name
        self._tokens = prompt_tokens
        self._stops = False
        self._pool = ThreadPoolExecutor(clients)
        self.clients = clients
        self.done = 0
        self.failed: list[str] = []

    def __enter__(self) -> "Load":
        self._running = [self._pool.submit(self._one, n) for n in range(self.clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stops = True
        for each in self._running:
            each.result()
        self._pool.shutdown()

    def _one(self, number: int) -> None:
        prompt = prompt_of(self._tokens, number)
        while not self._stops:
            try:
                with self._pair.to(self._name) as client:
                    client.complete(prompt, max_new_tokens=MAX_NEW, ignore_eos=True, timeout_s=30)
                self.done += 1
            except TwinpoolError as error:
                self.failed.append(str(error))
                return


def test_both_routers_answer_and_share_alike_what_decode_has(
    pair: Pair, expected: Reference
) -> None:
    prompt = prompt_of(40, 1)
    for name in NAMES:
        with pair.to(name) as client:
            done = client.complete(prompt, max_new_tokens=8, ignore_eos=True)
        assert list(done.token_ids) == expected.tokens(prompt, 8)
    total = pair.blocks().total
    wait_until(lambda: sum(map(pair.credit, NAMES)) == total, "all blocks are granted")
    assert all(pair.credit(name) >= total // 3 for name in NAMES)


def test_loaded_router_gets_most_and_gives_it_back(pair: Pair) -> None:
    total = pair.blocks().total
    with Load(pair, "router", clients=12) as load:
        wait_until(lambda: pair.credit("router") > total * 0.8, "credit flows to the load")
        wait_until(lambda: load.done >= 6, "requests end")
        # The other one has its share as soon as it wants it.
        with pair.to("second") as client:
            client.complete(prompt_of(12, 3), max_new_tokens=MAX_NEW, ignore_eos=True)
    assert not load.failed
    pair.wait_idle()
    wait_until(lambda: pair.credit("second") >= total // 3, "credit flows back")


def test_two_loaded_routers_never_ask_for_room_that_is_not_there(pair: Pair) -> None:
    refused = pair.refused()
    with Load(pair, "router", clients=8) as one, Load(pair, "second", clients=8) as two:
        wait_until(lambda: min(one.done, two.done) >= 8, "both are served")
    assert not one.failed + two.failed
    assert pair.refused() == refused


def test_request_that_needs_nearly_all_is_served_while_the_other_router_is_loaded(
    pair: Pair,
) -> None:
    tokens = 8 * (pair.blocks().total - 2)
    with Load(pair, "router", clients=8) as load, pair.to("second") as client:
        wait_until(lambda: load.done >= 4, "the load runs")
        prompt = prompt_of(tokens - MAX_NEW, 7)
        done = client.complete(prompt, max_new_tokens=MAX_NEW, ignore_eos=True, timeout_s=30)
        assert len(done.token_ids) == MAX_NEW
    assert not load.failed


def test_credit_of_a_killed_router_is_the_others_and_it_serves_again_after_a_restart(
    pair: Pair,
) -> None:
    total = pair.blocks().total
    with pair.to("router") as client:
        stream = client.generate(prompt_of(12, 2), max_new_tokens=MAX_NEW, ignore_eos=True)
        next(stream)
        pair.kill("router")
        with pytest.raises(TwinpoolError):
            list(stream)
    wait_until(lambda: pair.credit("second") == total, "its credit is the other's")
    with pair.to("second") as client:
        client.complete(prompt_of(12, 1), max_new_tokens=8, ignore_eos=True)
    pair.start("router")
    wait_until(lambda: pair.knows("router"), "it has learned everything")
    with pair.to("router") as client:
        client.complete(prompt_of(12, 1), max_new_tokens=8, ignore_eos=True)
    wait_until(lambda: pair.credit("router") >= total // 3, "it has its share")
