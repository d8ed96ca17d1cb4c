"""One rank of the ring as a process: runs the passes it is told to, and says how far off they are.

Started by `ranks`. A command and its answer are a line of JSON each.
"""

import json
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from engine.ring import AttentionShape, CommError, GatherKV, GroupComm, PassKV, PassQ, Wire
from engine.ring.ring import RingAttention
from tests.unit.engine.ring.passes import MadePass

TIMEOUT_S = 20.0
VARIANTS: dict[str, Callable[[Wire], RingAttention]] = {
    "pass-kv": PassKV,
    "pass-q": PassQ,
    "gather-kv": GatherKV,
}


class Rank:
    """Holds a wire for every number of ranks that it is one of."""

    def __init__(self, rank: int, ranks: int, store: str) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        self._wires: dict[int, Wire] = {}
        for size in range(1, ranks + 1):
            group = dist.new_group(list(range(size)))
            if rank < size:
                self._wires[size] = Wire(GroupComm(group, TIMEOUT_S))

    def run(self, command: dict[str, Any]) -> dict[str, Any]:
        """Run one pass with a variant; see `MadePass` for its arguments."""
        shape = AttentionShape(**command["shape"])
        made = MadePass(
            shape,
            command["lengths"],
            command["ranks"],
            seed=command["seed"],
            scatter=command["scatter"],
            dtype=getattr(torch, command["dtype"]),
        )
        wire = self._wires[command["ranks"]]
        q, kv = made.queries(wire.rank), made.keys(wire.rank)
        before = wire.traffic.bytes_sent
        ring = VARIANTS[command["variant"]](wire)
        out = ring.attend(q, kv, made.plan)
        error = (out.double() - made.expected(wire.rank)).abs()
        return {
            "error": float(error.max()) if error.numel() else 0.0,
            "finite": bool(out.isfinite().all()),
            "bytes_sent": wire.traffic.bytes_sent - before,
        }

    def leave(self, command: dict[str, Any]) -> dict[str, Any]:
        """End without a word to anybody."""
        os._exit(command["code"])

    def miss(self, command: dict[str, Any]) -> dict[str, Any]:
        """Wait for a message that nobody sends; say what became of it."""
        group = dist.group.WORLD
        assert group is not None
        comm = GroupComm(group, command["timeout_s"])
        try:
            comm.receive(torch.empty(4), command["source"], tag=7).wait()
        except CommError as error:
            return {"lost": str(error)}
        return {"lost": None}


@torch.inference_mode()
def serve(rank: int, ranks: int, store: str, sock: socket.socket) -> None:
    """Answer commands until the other end closes."""
    me = Rank(rank, ranks, store)
    with sock, sock.makefile("rw") as lines:
        for line in lines:
            command = json.loads(line)
            answer = getattr(me, command.pop("do"))(command)
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
