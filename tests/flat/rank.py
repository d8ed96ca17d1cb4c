"""One prefill or decode rank in a process of its own, which tells what it holds.

Driven by JSON lines on standard input, each answered by one on standard output. Owns one agent
at a time; knows nothing of what counts as growth. `ranks.py` drives two of these.
"""

import gc
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kvtransfer import (
    PROTOCOL_VERSION,
    Closed,
    Completed,
    Failed,
    Identity,
    KVShape,
    PeerAddress,
    PeerDown,
    PeerUp,
    ReceiveAgent,
    ReceiveGrant,
    SendAgent,
    SendTransfer,
    SharedRegion,
    Span,
    TransferEvent,
    TransferSettings,
    compatibility_hash,
    receive,
    uniform_cache,
)
from kvtransfer.network import NetworkTransport
from kvtransfer.settings import Lane
from kvtransfer.ucx_settings import UcxSettings, apply
from tests.flat.growth import GIVEN_UP, Held
from tests.flat.held import Live, at_rest, by_agent, by_process, probed
from tests.flat.leaks import KINDS, Leak, patch

WAIT_S = 30.0
# What has not come to rest after this shows in what is held.
REST_S = 0.05
TOKENS = 37
BLOCK = 16
BLOCK_IDS = (2, 5, 3)
# Runs of 32 KiB, which leave and land without a copy, and of 1 KiB, which are packed.
SHAPES = (
    KVShape(name="wide", layers=1, kv_heads=8, head_size=128, dtype="float16"),
    KVShape(name="narrow", layers=2, kv_heads=2, head_size=16, dtype="float16"),
)
LAYOUT = uniform_cache(SHAPES, BLOCK)
SETTINGS = TransferSettings(slot_bytes=64 << 10, piece_bytes=64 << 10, probe_bytes=256 << 10)
TOKEN = b"secret"
EPOCH = 7
# The receiver remembers finished transfers, 65,536 at most, to tell late pieces from forged ones.
# Here it remembers so few that a warm-up fills its memory: what comes after must not grow.
REMEMBERED = 32


class Outcomes:
    """What the agent has said, until somebody asks."""

    def __init__(self) -> None:
        self._said: Counter[tuple[str, int]] = Counter()
        self._carrier = ""
        self._more = threading.Condition()

    def __call__(self, event: TransferEvent) -> None:
        with self._more:
            match event:
                case Completed(transfer_id) | Failed(transfer_id) | Closed(transfer_id):
                    self._said[type(event).__name__, transfer_id] += 1
                case PeerUp(_, _, carrier):
                    self._carrier = carrier
                    self._said["PeerUp", 0] += 1
                case PeerDown():
                    self._said["PeerDown", 0] += 1
                case _:
                    return
            self._more.notify()

    def take(self, kind: str, ids: Iterable[int] = (0,)) -> str:
        """Wait for one event of a kind for each id; return the last connection's carrier."""
        wanted = [(kind, transfer_id) for transfer_id in ids]
        with self._more:
            if not self._more.wait_for(lambda: all(self._said[key] for key in wanted), WAIT_S):
                missing = [key for key in wanted if not self._said[key]]
                raise TimeoutError(f"{missing} never came; heard {+self._said}")
            self._said.subtract(wanted)
            self._said = +self._said
            return self._carrier

    @property
    def unasked(self) -> int:
        """How many events nobody has asked for."""
        with self._more:
            return self._said.total()


class Rank:
    """The commands; each returns its answer."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._live: Live | None = None
        self._given_up = 0
        self._leak = Leak()
        receive._REMEMBERED_TRANSFERS = REMEMBERED
        # What is imported stays: every look at what lives need not go over it.
        gc.collect()
        gc.freeze()

    @property
    def live(self) -> Live:
        assert self._live is not None, "no agent was started"
        return self._live

    def start(self, lane: Lane, tls: str | None) -> Any:
        """Start an agent on a lane."""
        os.environ.pop("UCX_TLS", None)
        if tls is not None:
            os.environ["UCX_TLS"] = tls
        if lane == "ucx":
            self._count_links_given_up()
        region = SharedRegion() if self._role == "send" else None
        memories = [_memory(shape, region) for shape in SHAPES]
        transport, outcomes = NetworkTransport(), Outcomes()
        common: dict[str, Any] = {
            "transport": transport,
            "memories": memories,
            "layout": LAYOUT,
            "rank": 0,
            "identity": _identity(self._role),
            "settings": replace(SETTINGS, lane=lane),
            "on_event": outcomes,
        }
        agent: Any
        agent = SendAgent(**common, region=region) if region else ReceiveAgent(**common)
        self._live = Live(agent, transport, region, outcomes)
        return agent.start()

    def plant(self, leak: str) -> None:
        """From now on leak."""
        KINDS[leak](self._leak)

    def stop(self) -> None:
        """Close the agent, and mend the leak."""
        self.live.agent.close()
        if self.live.region is not None:
            self.live.region.close()
        self._live = None
        self._leak.mend()

    def connect(self, bound: list[Any]) -> None:
        self.live.agent.connect(
            PeerAddress(
                instance="receive",
                epoch=EPOCH,
                layout=LAYOUT,
                ranks=((0, bound[0], bound[1]),),
                token=TOKEN,
            )
        )

    def forget(self) -> None:
        self.live.agent.forget("receive")

    def begin(self, ids: list[int]) -> None:
        """Open the grants, or begin to send; nothing is ready yet."""
        for transfer_id in ids:
            common: dict[str, Any] = {
                "transfer_id": transfer_id,
                "epoch": EPOCH,
                "nonce": transfer_id.to_bytes(16, "little"),
                "tokens": Span(0, TOKENS),
                "total_tokens": TOKENS,
                "block_ids": (BLOCK_IDS,) * len(SHAPES),
                "ttl_s": WAIT_S,
            }
            if self._role == "send":
                transfer = SendTransfer(**common, target_layout=LAYOUT, target_instance="receive")
                self.live.agent.begin(transfer)
            else:
                grant = ReceiveGrant(**common, source_layout=LAYOUT, source_instance="send")
                self.live.agent.open(grant)

    def ready(self, ids: list[int], groups: list[int]) -> None:
        for transfer_id in ids:
            for group in groups:
                layers = Span(0, SHAPES[group].layers)
                self.live.agent.ready(transfer_id, layers, Span(0, TOKENS), group)

    def end(self, ids: list[int]) -> None:
        """Abort or revoke, and wait until nothing touches the blocks."""
        end = self.live.agent.abort if self._role == "send" else self.live.agent.revoke
        for transfer_id in ids:
            end(transfer_id)
        self.live.outcomes.take("Closed", ids)

    def expect(self, kind: str, ids: list[int]) -> str:
        """Wait for one event of a kind for each id; return what carries the last connection."""
        carrier: str = self.live.outcomes.take(kind, ids)
        return carrier

    def measure(self) -> Held:
        """Return what this process holds once its agent has nothing under way."""
        if not self._comes(probed, WAIT_S):
            raise TimeoutError("a new connection is probed for ever")
        self._comes(at_rest, REST_S)
        found: Held = self._in_thread(by_agent)
        found["events nobody asked for"] = self.live.outcomes.unasked
        found[GIVEN_UP] = self._given_up
        return found | by_process()

    def _comes(self, condition: Callable[["Live"], bool], wait_s: float) -> bool:
        """Wait until a condition holds in the agent's thread; whether it came to that."""
        until = time.monotonic() + wait_s
        while not (come := self._in_thread(condition)) and time.monotonic() < until:
            time.sleep(0.002)
        return bool(come)

    def _in_thread(self, look: Callable[["Live"], Any]) -> Any:
        """Look at what only the agent's thread may touch."""
        seen: Future[Any] = Future()

        def tell() -> None:
            try:
                seen.set_result(look(self.live))
            except Exception as exc:
                seen.set_exception(exc)

        self.live.agent._loop.call(tell)
        return seen.result(WAIT_S)

    def _count_links_given_up(self) -> None:
        apply(UcxSettings())  # UCX reads the environment when it is loaded, which is here
        from kvtransfer.ucx_worker import Worker

        close = Worker.close

        def counting(worker: Worker) -> list[Any]:
            ended = close(worker)
            self._given_up += bool(ended)
            return ended

        if close.__name__ != counting.__name__:
            patch(Worker, "close", counting)


def _identity(role: str) -> Identity:
    return Identity(
        instance=role,
        epoch=EPOCH,
        compatibility=compatibility_hash(PROTOCOL_VERSION, "flat", SHAPES),
        token=TOKEN,
    )


def _memory(shape: KVShape, region: SharedRegion | None) -> torch.Tensor:
    size = (shape.layers, shape.planes, 8, shape.kv_heads, BLOCK, shape.head_size)
    if region is None:
        return torch.zeros(size, dtype=torch.float16)
    return region.allocate(size, torch.float16).normal_()


def main() -> None:
    rank = Rank(sys.argv[1])
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        do: Callable[[], Any] = partial(getattr(rank, command.pop("do")), **command)
        try:
            answer = {"answer": do()}
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
