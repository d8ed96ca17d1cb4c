"""One side of ours: the ranks of a pool in one process, driven by a pair's lines.

`agent` is the path that serves requests: grants, plan, checks, checksums and acknowledgement; the
clock runs from the first `ready` to the receivers' Completed. `raw` is the data path alone, without
any of these: the lanes' own copies and sockets, told what to move; only an agent moves a request,
whose raw way is without checksums. Blocks that stand for no request
are the blocks of a sequence all the same: one layer, one plane, one token a block.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from bench.movers.agents import EPOCH, NONCE, PATIENCE_S, TOKEN, Events, identity
from bench.movers.side import serve
from kvtransfer import (
    CacheLayout,
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
from kvtransfer.layout import Box
from kvtransfer.memory import KVMemory
from kvtransfer.network import NetworkTransport
from kvtransfer.send_lanes import DIRECT_BYTES
from kvtransfer.settings import Lane
from kvtransfer.shared import MappedRegion, ShareHandle, boot_id
from kvtransfer.slots import page_aligned
from kvtransfer.transport import Accepted, Connected, ControlArrived, Done, Happening

_NAP_S = 2e-3


def _box(tokens: Span) -> Box:
    return Box(Span(0, 1), Span(0, 1), tokens, 1)


_SLICE = _box(Span(0, 1))


class Cache:
    """What one side holds: a layout, its ranks' memories, and each round's blocks."""

    def __init__(self, sizes: dict[str, Any], side: str, region: SharedRegion | None) -> None:
        self.request = sizes["request"]
        self.filled = side == "source"
        self.layouts = {name: self._layout(sizes, name) for name in ("source", "target")}
        self.layout = self.layouts[side]
        self.tokens = self.request["tokens"] if self.request else 0
        factor = sizes["pool_slices"]
        blocks = 2 * self._blocks_of(self.tokens) if self.request else factor
        allocate = region.allocate if region else _anonymous
        group = self.layout.groups[0]
        shape = group.shape
        self.memories: list[torch.Tensor] = []
        for shard in group.shards:
            share = -(-blocks // shard.cp_size)
            block = (len(shard.heads), group.block_size, shape.head_size)
            size = (len(shard.layers), shape.planes, share, *block)
            self.memories.append(allocate(size, torch.bfloat16))
        self._flush = np.ones(64 << 20, np.uint8)

    def _layout(self, sizes: dict[str, Any], side: str) -> CacheLayout:
        r = sizes["request"]
        if r is None:
            elements = sizes["slice_bytes"] // 2
            shape = KVShape(layers=1, planes=1, kv_heads=1, head_size=elements, dtype="bfloat16")
            return uniform_cache((shape,), 1)
        shape = KVShape(
            layers=r["layers"], kv_heads=r["kv_heads"], head_size=r["head_size"], dtype=r["dtype"]
        )
        ranks = r[side]
        return uniform_cache(
            (shape,), r["block_size"], tp=ranks["tp"], cp=ranks["cp"], cp_order="zigzag"
        )

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.layout.groups[0].block_size)

    def choose(self, number: int, mine: Sequence[int]) -> list[tuple[int, ...]]:
        """Return each rank's block ids of this round."""
        if not self.request:
            self.tokens = len(mine)
            return [tuple(mine)]
        group = self.layout.groups[0]
        random = np.random.default_rng(number + (0 if self.filled else 1_000_000))
        chosen = []
        for shard, memory in zip(group.shards, self.memories, strict=True):
            held = sum(len(span) for span in group.tokens_of(shard, self.tokens))
            ids = random.permutation(memory.shape[2])[: self._blocks_of(held)]
            chosen.append(tuple(ids.tolist()))
        return chosen

    def fill(self, chosen: Sequence[Sequence[int]]) -> None:
        """Write what belongs into a source's blocks, and nothing into a target's."""
        for rank, ids in enumerate(chosen):
            part = self._truth(rank, len(ids)) if self.filled else 0
            self.memories[rank][:, :, list(ids)] = part
        self._flush += 1

    def check(self, chosen: Sequence[Sequence[int]]) -> None:
        """Raise ValueError where a target's blocks are not what the source's layout says."""
        for rank, ids in enumerate(chosen):
            if not torch.equal(self.memories[rank][:, :, list(ids)], self._truth(rank, len(ids))):
                raise ValueError(f"rank {rank} does not hold the bytes that were sent")

    def _truth(self, rank: int, blocks: int) -> torch.Tensor:
        """A block's values tell its layer, plane, head, place in the sequence and element."""
        group = self.layout.groups[0]
        shard, shape = group.shards[rank], group.shape
        tokens = [t for span in group.tokens_of(shard, self.tokens) for t in span]
        token = torch.tensor(tokens).reshape(blocks, 1, group.block_size, 1)
        head = torch.arange(shard.heads.begin, shard.heads.end).reshape(1, -1, 1, 1)
        element = torch.arange(shape.head_size).reshape(1, 1, 1, -1)
        low = token * 31 + head * 1009 + element % 509
        whole = torch.empty((len(shard.layers), shape.planes, *low.shape), dtype=torch.bfloat16)
        for layer in range(len(shard.layers)):
            for plane in range(shape.planes):
                bits = (low + (shard.layers.begin + layer) * 77 + plane * 7919) % 30011
                whole[layer, plane] = bits.to(torch.int16).view(torch.bfloat16)
        # Bit patterns that are not numbers would not be equal to themselves.
        return whole.view(torch.int16).remainder_(30011).view(torch.bfloat16)


def _anonymous(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(tuple(shape), dtype=dtype)


class AgentSide:
    """The whole path, or of a request that is moved raw, all but its checksums."""

    def __init__(self, *, checksum: bool = True) -> None:
        self._checksum = checksum

    def open(self, *, side: str, carrier: str, **sizes: Any) -> dict[str, Any]:
        """Make the cache and its agents."""
        self._source = side == "source"
        self._regions = [SharedRegion()] if self._source else []
        self._cache = Cache(sizes, side, self._regions[0] if self._source else None)
        self._events = Events()
        lane: Lane = "mapped" if carrier == "shm" else "stream"
        settings = TransferSettings(lane=lane, checksum=self._checksum)
        common: dict[str, Any] = {"settings": settings, "on_event": self._events}
        self._agents: list[Any] = []
        for rank, memory in enumerate(self._cache.memories):
            kind: Any = SendAgent if self._source else ReceiveAgent
            more = {"region": self._regions[0]} if self._source else {}
            self._agents.append(
                kind(
                    transport=NetworkTransport(),
                    memories=(memory,),
                    layout=self._cache.layout,
                    rank=rank,
                    identity=identity(side),
                    **common,
                    **more,
                )
            )
        bound = [agent.start() for agent in self._agents]
        return {"bound": [] if self._source else bound}

    def meet(self, *, peer: dict[str, Any]) -> dict[str, Any]:
        """Connect every sender to every receiver."""
        if self._source:
            ranks = tuple((rank, host, port) for rank, (host, port) in enumerate(peer["bound"]))
            address = PeerAddress(
                instance="target",
                epoch=EPOCH,
                layout=self._cache.layouts["target"],
                ranks=ranks,
                token=TOKEN,
            )
            for agent in self._agents:
                agent.connect(address)
            self._events.wait(PeerProbed, len(ranks) * len(self._agents))
        return {}

    def prepare(self, *, number: int, mine: list[int], **_: Any) -> dict[str, Any]:
        """Choose and fill the round's blocks; open the grants."""
        self._number = number + 1
        self._chosen = self._cache.choose(number, mine)
        self._cache.fill(self._chosen)
        for agent, ids in zip(self._agents, self._chosen, strict=True):
            common: dict[str, Any] = {
                "transfer_id": self._number,
                "epoch": EPOCH,
                "nonce": NONCE,
                "tokens": Span(0, self._cache.tokens),
                "total_tokens": self._cache.tokens,
                "block_ids": (ids,),
                "ttl_s": PATIENCE_S,
            }
            if self._source:
                layout = self._cache.layouts["target"]
                transfer = SendTransfer(**common, target_instance="target", target_layout=layout)
                agent.begin(transfer)
            else:
                layout = self._cache.layouts["source"]
                agent.open(ReceiveGrant(**common, source_instance="source", source_layout=layout))
        return {}

    def go(self) -> dict[str, Any]:
        """Everything is computed: send it."""
        began = time.monotonic()
        layers = Span(0, self._cache.layout.groups[0].shape.layers)
        for agent in self._agents:
            agent.ready(self._number, layers, Span(0, self._cache.tokens))
        self._events.wait(Completed, len(self._agents))
        return {"began": began}

    def finish(self) -> dict[str, Any]:
        """Wait for the last receiver."""
        return {"ended": self._events.wait(Completed, len(self._agents))}

    def check(self) -> dict[str, Any]:
        """See Side."""
        self._cache.check(self._chosen)
        return {}

    def progress(self) -> bool:
        """See Side: the agents have threads of their own."""
        return False


_SLOT, _PIECE = 512 << 10, 2 << 20


class RawSide:
    """The data path alone, one rank on either side."""

    def open(self, *, side: str, carrier: str, **sizes: Any) -> dict[str, Any]:
        """Make the cache and the transport."""
        self._source, self._mapped = side == "source", carrier == "shm"
        self._region = SharedRegion()
        self._cache = Cache(sizes, side, self._region if self._source else None)
        self._transport = NetworkTransport()
        self._memory = KVMemory(self._cache.memories[0], self._cache.layout.groups[0], 0)
        self._link: Any = None
        self._remote: KVMemory | None = None
        self._scratch = page_aligned(_SLOT)
        self._awaited: list[Span] = []
        self._expected = 0
        self._ended = 0.0
        if not self._source:
            return {"port": self._transport.listen("127.0.0.1", 0)[1]}
        handle = asdict(self._region.handle) | {"boot_id": boot_id().hex()}
        offset = self._region.offset_of(self._cache.memories[0])
        return {"share": handle, "offset": offset, "shape": list(self._cache.memories[0].shape)}

    def meet(self, *, peer: dict[str, Any]) -> dict[str, Any]:
        """Connect."""
        if self._source:
            self._link = self._transport.connect("127.0.0.1", peer["port"])
        elif self._mapped:
            share = peer["share"] | {"boot_id": boot_id()}
            region = MappedRegion(ShareHandle(**share))
            array = region.array(peer["offset"], peer["shape"], np.int16)
            self._remote = KVMemory.from_numpy(array, self._cache.layout.groups[0], 0)
        while not any(isinstance(h, Accepted | Connected) for h in self._poll(0.1)):
            pass
        return {}

    def prepare(self, *, number: int, mine: list[int], **_: Any) -> dict[str, Any]:
        """Choose and fill the round's blocks; a receiver of a stream posts its first receive."""
        self._chosen = self._cache.choose(number, mine)
        self._cache.fill(self._chosen)
        self._table = self._memory.table(self._chosen[0], self._cache.tokens)
        self._awaited = self._pieces()
        self._expected = len(self._awaited)
        if not self._source and not self._mapped:
            self._receive()
        return {}

    def go(self) -> dict[str, Any]:
        """Send."""
        began = time.monotonic()
        if self._mapped:
            ids = np.asarray(self._chosen[0], np.int64)
            self._link.send_control(ids.tobytes())
        else:
            for span in self._awaited:
                self._link.stream.send(self._parts(span), None)
                while self._packs and not any(isinstance(h, Done) for h in self._poll(1.0)):
                    pass
        return {"began": began}

    def finish(self) -> dict[str, Any]:
        """Wait for the end."""
        while self._expected:
            self.progress()
        return {"ended": self._ended}

    def check(self) -> dict[str, Any]:
        """See Side."""
        self._cache.check(self._chosen)
        return {}

    def progress(self) -> bool:
        """See Side: what arrives is dealt with."""
        # Asleep until something happens: a socket that is written to again and again takes little
        # each time.
        for happening in self._poll(_NAP_S):
            if self._source or not self._expected:
                continue
            if isinstance(happening, ControlArrived):
                self._copy(np.frombuffer(happening.message, np.int64))
            elif isinstance(happening, Done):
                self._landed()
        return self._link is not None and bool(self._source or self._expected)

    @property
    def _packs(self) -> bool:
        return self._memory.run_bytes(_SLICE) < DIRECT_BYTES

    def _pieces(self) -> list[Span]:
        each = max(1, (_SLOT if self._packs else _PIECE) // self._memory.run_bytes(_SLICE))
        ends = range(0, self._cache.tokens, each)
        return [Span(begin, min(begin + each, self._cache.tokens)) for begin in ends]

    def _parts(self, tokens: Span) -> Sequence[memoryview]:
        if not self._packs:
            return self._memory.views(self._table, _box(tokens))
        payload = self._scratch[: len(tokens) * self._memory.run_bytes(_SLICE)]
        if self._source:
            self._memory.pack(payload, self._table, _box(tokens))
        return (memoryview(payload.data),)

    def _receive(self) -> None:
        self._link.stream.receive(self._parts(self._awaited[0]), None)

    def _landed(self) -> None:
        tokens = self._awaited.pop(0)
        if self._packs:
            payload = self._scratch[: len(tokens) * self._memory.run_bytes(_SLICE)]
            self._memory.scatter(payload, self._table, _box(tokens))
        self._expected -= 1
        if self._expected:
            self._receive()
        else:
            self._ended = time.monotonic()

    def _copy(self, ids: Any) -> None:
        assert self._remote is not None
        tokens = Span(0, self._cache.tokens)
        theirs = self._remote.table(ids, self._cache.tokens)
        self._memory.copy_from(self._remote, theirs, self._table, _box(tokens))
        self._expected, self._ended = 0, time.monotonic()

    def _poll(self, timeout_s: float) -> list[Happening]:
        happenings = self._transport.poll(timeout_s)
        for happening in happenings:
            if isinstance(happening, Accepted):
                self._link = happening.link
        return happenings


class OursSide:
    """The side that `open` asks for."""

    def __init__(self) -> None:
        self._side: Any = None

    def open(self, *, mode: str, **options: Any) -> dict[str, Any]:
        """Make the side."""
        is_raw = mode == "raw"
        blocks = is_raw and options["request"] is None
        self._side = RawSide() if blocks else AgentSide(checksum=not is_raw)
        return dict(self._side.open(**options))

    def meet(self, **options: Any) -> dict[str, Any]:
        """See Side."""
        return dict(self._side.meet(**options))

    def prepare(self, **options: Any) -> dict[str, Any]:
        """See Side."""
        return dict(self._side.prepare(**options))

    def go(self) -> dict[str, Any]:
        """See Side."""
        return dict(self._side.go())

    def finish(self) -> dict[str, Any]:
        """See Side."""
        return dict(self._side.finish())

    def check(self) -> dict[str, Any]:
        """See Side."""
        return dict(self._side.check())

    def progress(self) -> bool:
        """See Side."""
        return self._side is not None and bool(self._side.progress())


if __name__ == "__main__":
    serve(OursSide())
