"""One prefill or decode rank in a process of its own, driven by JSON lines.

Commands come on standard input, events and answers go to standard output. Both sides make the
same cache from a seed, so a receiver can check every byte that it got.
"""

import json
import os
import sys
import threading
from dataclasses import asdict
from typing import Any

import torch

from kvtransfer import (
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
    uniform_cache,
)
from kvtransfer.network import NetworkTransport
from kvtransfer.ucx_settings import UcxSettings

BLOCK_SIZE = 16
FIRST = {"send": 2, "receive": 5}
CANARY = -7.0


def nonce(transfer_id: int) -> bytes:
    return transfer_id.to_bytes(16, "little")


class Rank:
    """One agent, its memory and its commands."""

    def __init__(self, role: str, config: dict[str, Any]) -> None:
        self.role = role
        self.total = int(config["tokens"])
        shape = KVShape(layers=config["layers"], kv_heads=2, head_size=64, dtype="float16")
        self.layout = uniform_cache((shape,), BLOCK_SIZE)
        blocks = -(-self.total // BLOCK_SIZE)
        self.block_ids = tuple(range(FIRST[role], FIRST[role] + blocks))
        size = (shape.layers, 2, blocks + 8, shape.kv_heads, BLOCK_SIZE, shape.head_size)
        self.region = SharedRegion()
        self.memory = self.region.allocate(size, torch.float16).fill_(CANARY)
        generator = torch.Generator().manual_seed(11)
        self.cache = torch.randn((*size[:2], blocks, *size[3:]), generator=generator).half()
        if role == "send":
            self.memory[:, :, list(self.block_ids)] = self.cache
        identity = Identity(
            instance=config["instance"] if role == "send" else "decode",
            epoch=config["epoch"],
            compatibility=compatibility_hash(1, "test", [shape]),
            token=b"secret",
        )
        settings = TransferSettings(
            heartbeat_s=config["heartbeat_s"],
            credit_stall_s=5.0,
            slots_per_connection=config["slots"],
            lane=config["lane"],
        )
        kind: Any = SendAgent if role == "send" else ReceiveAgent
        self.threads, self.descriptors = threading.active_count(), descriptors()
        self.agent: Any = kind(
            transport=NetworkTransport(UcxSettings(tls=config["tls"])),
            memories=(self.memory,),
            layout=self.layout,
            rank=0,
            identity=identity,
            settings=settings,
            on_event=self.report,
            **({"region": self.region} if role == "send" else {}),
        )

    def report(self, event: TransferEvent) -> None:
        said: dict[str, Any] = {"event": type(event).__name__}
        if isinstance(event, Completed):
            said |= {"id": event.transfer_id, **asdict(event.stats)}
        elif isinstance(event, Failed):
            said |= {
                "id": event.transfer_id,
                "error": type(event.error).__name__,
                "text": str(event.error),
            }
        elif isinstance(event, PeerUp | PeerDown):
            said |= {"instance": event.instance}
        elif isinstance(event, PeerProbed):
            said |= {"rtt_s": event.rtt_s, "bytes_per_s": event.bytes_per_s, "note": event.note}
        else:
            said |= {"id": event.transfer_id}
        say(said)

    def start(self, _: dict[str, Any]) -> None:
        say({"answer": "start", "bound": self.agent.start()})

    def connect(self, command: dict[str, Any]) -> None:
        self.agent.connect(
            PeerAddress(
                instance="decode",
                epoch=command["epoch"],
                layout=self.layout,
                ranks=((0, *command["bound"]),),
                token=b"secret",
            )
        )

    def open(self, command: dict[str, Any]) -> None:
        common = {
            "transfer_id": command["id"],
            "epoch": command["epoch"],
            "nonce": nonce(command["id"]),
            "tokens": Span(0, self.total),
            "total_tokens": self.total,
            "block_ids": (self.block_ids,),
            "ttl_s": 60.0,
        }
        if self.role == "receive":
            self.memory.fill_(CANARY)
            self.agent.open(
                ReceiveGrant(**common, source_layout=self.layout, source_instance=command["source"])
            )
        else:
            self.agent.begin(
                SendTransfer(**common, target_layout=self.layout, target_instance="decode")
            )
        say({"answer": "open"})

    def ready(self, command: dict[str, Any]) -> None:
        for layer in range(*command["layers"]):
            self.agent.ready(command["id"], Span(layer, layer + 1), Span(0, self.total))

    def check(self, _: dict[str, Any]) -> None:
        """Say whether the sequence is right (its last block zeroed) and nothing else touched."""
        want = self.cache.clone()
        if self.total % BLOCK_SIZE:
            want[:, :, -1, :, self.total % BLOCK_SIZE :] = 0
        others = [b for b in range(self.memory.shape[2]) if b not in self.block_ids]
        say(
            {
                "answer": "check",
                "right": torch.equal(self.memory[:, :, list(self.block_ids)], want),
                "others": bool((self.memory[:, :, others] == CANARY).all()),
            }
        )

    def stats(self, _: dict[str, Any]) -> None:
        say({"answer": "stats", **asdict(self.agent.stats())})

    def close(self, _: dict[str, Any]) -> None:
        self.agent.close()
        say(
            {
                "answer": "close",
                "threads": threading.active_count() - self.threads,
                "descriptors": sorted(descriptors() - self.descriptors),
            }
        )


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


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    rank = Rank(sys.argv[1], json.loads(sys.argv[2]))
    for line in sys.stdin:
        command = json.loads(line)
        getattr(rank, command["do"])(command)


if __name__ == "__main__":
    main()
