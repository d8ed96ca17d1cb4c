"""One side of a transfer between GPU memories, driven by a pair's lines: an instance's own parts.

The cache, its copy in the host's memory and an agent, put together as prefill and decode do it. A
block's bytes tell which one of the sequence it is, so that a wrong place is seen.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpus.steps import WORKS
from bench.movers.agents import EPOCH, NONCE, PATIENCE_S, TOKEN, Events, identity
from bench.movers.side import serve
from engine.cache_memory import cache_memory
from engine.kvcache import KVCache
from engine.parallel import Layout
from kvtransfer import (
    Completed,
    KVShape,
    PeerAddress,
    PeerProbed,
    ReceiveAgent,
    ReceiveGrant,
    SendAgent,
    SendTransfer,
    SharedRegion,
    Span,
    TransferSettings,
    uniform_cache,
)
from kvtransfer.network import NetworkTransport

_POOL = 2  # times the sequence's blocks
# Of a block's bytes; below the bit patterns that are no numbers.
_PRIME = 30_011


class GpuSide:
    """A rank of an instance; see bench.movers.side.Side."""

    def open(
        self,
        *,
        side: str,
        device: str,
        carrier: str,
        host_copy: bool,
        request: dict[str, Any],
        **_: Any,
    ) -> dict[str, Any]:
        """Make cache, its copy in the host's memory or none, and agent."""
        self._source, self._device = side == "source", torch.device(device)
        self._tokens = Span(0, request["tokens"])
        sizes = {"kv_heads": request["kv_heads"], "head_size": request["head_size"]}
        config = replace(
            WORKS[0].config,
            num_layers=request["layers"],
            num_kv_heads=sizes["kv_heads"],
            head_size=sizes["head_size"],
        )
        self._blocks = -(-len(self._tokens) // request["block_size"])
        region = SharedRegion()
        on_cpu = self._device.type == "cpu"
        self._cache = KVCache(
            config=config,
            dtype=torch.bfloat16,
            device=self._device,
            num_blocks=_POOL * self._blocks,
            block_size=request["block_size"],
            layout=Layout(),
            allocate=region.allocate if on_cpu else None,
        )
        self._memory = cache_memory(self._cache, region.allocate, host_copy=host_copy)
        shape = KVShape(layers=config.num_layers, dtype="bfloat16", **sizes)
        self._layout = uniform_cache((shape,), request["block_size"])
        self._events = Events()
        self._agent = self._make_agent(carrier, region)
        bound = self._agent.start()
        return {} if self._source else {"bound": bound}

    def _make_agent(self, carrier: str, region: SharedRegion) -> Any:
        common: dict[str, Any] = {
            "transport": NetworkTransport(),
            "memories": (self._memory.tensor,),
            "layout": self._layout,
            "rank": 0,
            "settings": TransferSettings(lane="mapped" if carrier == "shm" else "stream"),
            "on_event": self._events,
            "boxes": self._memory.boxes,
        }
        if self._source:
            return SendAgent(identity=identity("source"), region=region, **common)
        load = self._memory.load
        return ReceiveAgent(
            identity=identity("target"),
            on_landed=lambda _, layers, blocks: load(range(layers.begin, layers.end), blocks),
            **common,
        )

    def meet(self, *, peer: dict[str, Any]) -> dict[str, Any]:
        """Connect the sender."""
        if self._source:
            address = PeerAddress(
                instance="target",
                epoch=EPOCH,
                layout=self._layout,
                ranks=((0, *peer["bound"]),),
                token=TOKEN,
            )
            self._agent.connect(address)
            self._events.wait(PeerProbed, 1)
        return {}

    def prepare(self, *, number: int, **_: Any) -> dict[str, Any]:
        """Choose blocks side by side, as an instance does, and open the grant."""
        self._number = number + 1
        random = np.random.default_rng(number + (0 if self._source else 1_000_000))
        first = int(random.integers(self._cache.num_blocks - self._blocks + 1))
        self._chosen = range(first, first + self._blocks)
        for held_BGTH, truth_BGTH in self._planes():
            held_BGTH.copy_(truth_BGTH if self._source else torch.zeros_like(truth_BGTH))
        self._settle()
        common: dict[str, Any] = {
            "transfer_id": self._number,
            "epoch": EPOCH,
            "nonce": NONCE,
            "tokens": self._tokens,
            "total_tokens": len(self._tokens),
            "block_ids": (self._chosen,),
            "ttl_s": PATIENCE_S,
        }
        layout = self._layout
        if self._source:
            transfer = SendTransfer(**common, target_instance="target", target_layout=layout)
            self._agent.begin(transfer)
        else:
            grant = ReceiveGrant(**common, source_instance="source", source_layout=layout)
            self._agent.open(grant)
        return {}

    def go(self) -> dict[str, Any]:
        """Everything is computed: save it layer by layer, and send each as it is saved."""
        began = time.monotonic()
        for layer in self._memory.layers:
            self._memory.save(range(layer, layer + 1), self._chosen)
            self._memory.then(partial(self._ready, Span(layer, layer + 1)))
        self._events.wait(Completed, 1)
        return {"began": began}

    def _ready(self, layers: Span) -> None:
        self._agent.ready(self._number, layers, self._tokens)

    def finish(self) -> dict[str, Any]:
        """Wait until a pass could begin that reads all of it."""
        self._events.wait(Completed, 1)
        self._memory.before_pass()
        self._settle()
        return {"ended": time.monotonic()}

    def check(self) -> dict[str, Any]:
        """Raise ValueError where the cache does not hold what was sent."""
        for held_BGTH, truth_BGTH in self._planes():
            if not torch.equal(held_BGTH, truth_BGTH):
                raise ValueError("the cache does not hold the bytes that were sent")
        return {}

    def progress(self) -> bool:
        """See Side: the agent has a thread of its own."""
        return False

    def _planes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the blocks of each layer's keys and values, and what belongs there, as bits."""
        held = self._cache.tensor.view(torch.int16)
        shape_BGTH = self._blocks, *held.shape[3:]
        count = int(np.prod(shape_BGTH))
        for layer in range(len(self._memory.layers)):
            for plane in range(held.shape[1]):
                places = torch.arange(count, dtype=torch.int32, device=self._device)
                bits = places.add_(layer * 77 + plane * 7919).remainder_(_PRIME)
                of_blocks = slice(self._chosen.start, self._chosen.stop)
                yield held[layer, plane, of_blocks], bits.to(torch.int16).view(shape_BGTH)

    def _settle(self) -> None:
        self._memory.finish_passes()


if __name__ == "__main__":
    serve(GpuSide())
