"""One prefill or decode rank in a process of its own, driven by JSON lines over a socket.

Owns one agent, its memory and its commands. All ranks make the same cache, so a receiver can check
every byte that it got, and a sender every byte that it kept.
"""

import json
import os
import socket
import threading
import time
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch

from kvtransfer import (
    CacheLayout,
    Completed,
    Failed,
    Identity,
    KVShape,
    PeerAddress,
    PeerDown,
    PeerProbed,
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
    uniform,
)
from kvtransfer.network import NetworkTransport
from kvtransfer.ucx_settings import UcxSettings

BLOCK_SIZE, HEADS, HEAD_SIZE = 16, 2, 64
# What one token takes in one layer: keys and values of two bytes an element.
TOKEN_BYTES = 2 * HEADS * HEAD_SIZE * 2
# Blocks that belong to no sequence, half of them before and half behind those that do.
SPARE = 8
CANARY = -7


@lru_cache(maxsize=4)
def known(layers: int, blocks: int) -> torch.Tensor:
    """The sequence that every rank knows: [layers, 2, blocks, heads, block size, head size]."""
    shape = (layers, 2, blocks, HEADS, BLOCK_SIZE, HEAD_SIZE)
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.int32)
    # No word is the canary, nor zero.
    return (numbers * 40503 >> 9 & 0x3FFF | 0x4000).to(torch.int16).view(shape)


class Rank:
    """One agent, its memory and its commands."""

    def __init__(self, role: str, config: dict[str, Any], sock: socket.socket) -> None:
        self.role, self._socket, self._lock = role, sock, threading.Lock()
        self.total, layers = int(config["tokens"]), int(config["layers"])
        shape = KVShape(layers=layers, kv_heads=HEADS, head_size=HEAD_SIZE, dtype="float16")
        self.layout = CacheLayout((uniform(shape, BLOCK_SIZE),))
        self.need = -(-self.total // BLOCK_SIZE)
        self.cache = known(layers, self.need)
        blocks = SPARE + self.need * config["sequences"]
        size = (layers, 2, blocks, HEADS, BLOCK_SIZE, HEAD_SIZE)
        self.region = SharedRegion()
        memory = self.region.allocate(size, torch.float16)
        self.words = memory.view(torch.int16).fill_(CANARY)
        if role == "send":
            self.words[:, :, list(self.block_ids(0))] = self.cache
        self.threads, self.descriptors = threading.active_count(), descriptors()
        common: dict[str, Any] = {
            "transport": NetworkTransport(UcxSettings(tls=config["tls"])),
            "memories": (memory,),
            "layout": self.layout,
            "rank": 0,
            "identity": Identity(
                instance=config["instance"],
                epoch=config["epoch"],
                compatibility=compatibility_hash(1, "test", [shape]),
                token=b"secret",
            ),
            "settings": TransferSettings(lane=config["lane"], **config["settings"]),
            "on_event": self.report,
        }
        self.agent: Any = (
            SendAgent(**common, region=self.region) if role == "send" else ReceiveAgent(**common)
        )

    def say(self, answer: dict[str, Any]) -> None:
        """Send one line; from any thread."""
        with self._lock:
            self._socket.sendall(json.dumps(answer).encode() + b"\n")

    def obey(self) -> None:
        """Do what is asked until the socket ends."""
        for line in self._socket.makefile():
            command = json.loads(line)
            getattr(self, command["do"])(command)

    def block_ids(self, sequence: int) -> range:
        """The blocks of one of the sequences that the memory has room for."""
        first = SPARE // 2 + sequence * self.need
        return range(first, first + self.need)

    def report(self, event: TransferEvent) -> None:
        """Tell of an event, and when it was."""
        said: dict[str, Any] = {"event": type(event).__name__, "at": time.monotonic()}
        match event:
            case Completed(transfer_id, stats):
                said |= {"id": transfer_id, **asdict(stats)}
            case Failed(transfer_id, error, _, kept):
                said |= {"id": transfer_id, "error": type(error).__name__, "text": str(error)}
                said |= {"kept": kept}
            case PeerUp(instance) | PeerProbed(instance):
                said |= {"instance": instance}
            case PeerDown(instance):
                # What this and all connections before it moved.
                said |= {"instance": instance, "bytes": self.agent.stats().bytes}
            case _:
                said |= {"id": event.transfer_id}
        self.say(said)

    def start(self, _: dict[str, Any]) -> None:
        """Start the agent; a receiver says where it listens."""
        self.say({"answer": "start", "bound": self.agent.start()})

    def connect(self, command: dict[str, Any]) -> None:
        """Connect a sender to a receiver."""
        address = PeerAddress(
            instance=command["instance"],
            epoch=command["epoch"],
            layout=self.layout,
            ranks=((0, *command["bound"]),),
            token=b"secret",
        )
        self.agent.connect(address)

    def open(self, command: dict[str, Any]) -> None:
        """Open a grant for a sequence's blocks, or begin to send; `instance` is the other side."""
        ids, other = self.block_ids(command["sequence"]), command["instance"]
        common = {
            "transfer_id": command["id"],
            "epoch": command["epoch"],
            "nonce": command["id"].to_bytes(16, "little"),
            "tokens": Span(0, self.total),
            "total_tokens": self.total,
            "block_ids": (ids,),
            "ttl_s": 60.0,
        }
        if self.role == "receive":
            self.words[:, :, ids.start : ids.stop] = CANARY
            grant = ReceiveGrant(**common, source_layout=self.layout, source_instance=other)
            self.agent.open(grant)
        else:
            sent = SendTransfer(**common, target_layout=self.layout, target_instance=other)
            self.agent.begin(sent)
        self.say({"answer": "open"})

    def ready(self, command: dict[str, Any]) -> None:
        """Say that layers are computed, one after another."""
        for layer in range(*command["layers"]):
            self.agent.ready(command["id"], Span(layer, layer + 1), Span(0, self.total))

    def check(self, command: dict[str, Any]) -> None:
        """Say what a sequence's blocks hold, and whether any block of no sequence was touched.

        `right`: all of it, with zeros behind its last token where it was received. `kept`: the
        tokens of each layer that were said to be kept. `clean`: no byte is neither right nor as it
        was when the grant was opened.
        """
        ids, rest = self.block_ids(command["sequence"]), self.total % BLOCK_SIZE
        found, want = self.words[:, :, ids.start : ids.stop], self.cache
        if rest and self.role == "receive":
            want = want.clone()
            want[:, :, -1, :, rest:] = 0
        same = found == want
        kept = command["kept"][0] if command["kept"] else ()
        others = (*range(SPARE // 2), *range(self.words.shape[2] - SPARE // 2, self.words.shape[2]))
        said = {
            "right": bool(same.all()),
            "kept": all(_begins(same[layer], tokens) for layer, tokens in enumerate(kept)),
            "clean": bool(same.all()) or _clean(found, want),
            "others": bool((self.words[:, :, list(others)] == CANARY).all()),
        }
        self.say({"answer": "check", **said})

    def stats(self, _: dict[str, Any]) -> None:
        """Say what the agent counted and holds."""
        self.say({"answer": "stats", "leases": self.region.leases, **asdict(self.agent.stats())})

    def close(self, _: dict[str, Any]) -> None:
        """Close the agent and say what it has left behind."""
        self.agent.close()
        left = sorted(descriptors() - self.descriptors)
        threads = threading.active_count() - self.threads
        self.say({"answer": "close", "threads": threads, "descriptors": left})


def _begins(same_PBHTD: torch.Tensor, tokens: int) -> bool:
    """Whether one layer is right up to some token."""
    whole, rest = divmod(tokens, BLOCK_SIZE)
    return bool(same_PBHTD[:, :whole].all()) and (
        not rest or bool(same_PBHTD[:, whole, :, :rest].all())
    )


def _clean(found: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether each byte is the wanted one or the canary's: a stream may end within an element."""
    found_bytes = found.contiguous().view(torch.uint8)
    canary = torch.full_like(found, CANARY).view(torch.uint8)
    right = found_bytes == want.contiguous().view(torch.uint8)
    return bool((right | (found_bytes == canary)).all())


def descriptors() -> set[str]:
    """What this process has open, by kind; UCX keeps files of its own, which are no sockets."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        found.add(f"{name}:{target}")
    return found
