"""Plans carried out between memories, box by box, each in one of the ways that agents do it."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from isal.isal_zlib import crc32

from engine.boxes import Boxes
from kvtransfer.addresses import BlockTable
from kvtransfer.coverage import Coverage
from kvtransfer.device_memory import DeviceMemory
from kvtransfer.layout import Box, CacheLayout, KVLayout, Span
from kvtransfer.memory import KVMemory, element_type
from kvtransfer.plan import Plan, Region
from tests.unit.kvtransfer.layouts import RankMemory

# From a GPU's memory, that is the CPU's in its place: through a payload, or at once.
GPU_WAYS = ("gpu payload", "gpu copy")
WAYS = ("payload", "stream", "copy", *GPU_WAYS)
BOXES = Boxes(torch.device("cpu"))


@dataclass
class Side:
    """One group on all ranks of an instance."""

    layout: KVLayout
    ranks: dict[int, RankMemory]

    @classmethod
    def make(
        cls, layout: KVLayout, total: int, rng: random.Random, *, strided: bool = False
    ) -> "Side":
        """Make every rank's memory, full of canaries."""
        return cls(
            layout,
            {
                shard.rank: RankMemory.make(layout, shard.rank, total, rng, strided=strided)
                for shard in layout.shards
            },
        )

    def fill(self, cache: torch.Tensor) -> "Side":
        """Write the sequence's true values."""
        for memory in self.ranks.values():
            memory.fill(cache)
        return self

    def check(self, cache: torch.Tensor, tokens: Span, kept: Sequence[int] = ()) -> None:
        """See RankMemory.check."""
        for memory in self.ranks.values():
            memory.check(cache, tokens, kept)

    def open(self, rank: int, *, read_only: bool = False) -> tuple[KVMemory, BlockTable]:
        """Wrap a rank's memory as it is, or as another process maps it."""
        own = self.ranks[rank]
        memory = KVMemory(own.kv, self.layout, rank)
        if read_only:
            bits = memory._kv.view(element_type(self.layout.shape.dtype))
            memory = KVMemory.from_numpy(bits, self.layout, rank)
        return memory, memory.table(own.block_ids, own.total_tokens)

    def open_on_gpu(self, rank: int) -> tuple[DeviceMemory, BlockTable]:
        """Wrap a rank's memory as if a GPU had it."""
        own = self.ranks[rank]
        memory = DeviceMemory(own.kv, self.layout, rank, BOXES)
        return memory, memory.table(own.block_ids, own.total_tokens)


@dataclass(frozen=True)
class Message:
    """A part of a region, as an agent cuts it."""

    region: Region
    layers: Span
    tokens: Span


def messages(regions: Sequence[Region], unit: int, rng: random.Random) -> list[Message]:
    """Cut regions at random layers and units, in random order."""
    cut = [
        Message(region, layers, tokens)
        for region in regions
        for layers in _cut(region.layers, 1, rng)
        for tokens in _cut(region.tokens, unit, rng)
    ]
    rng.shuffle(cut)
    return cut


def _cut(span: Span, grain: int, rng: random.Random) -> Iterator[Span]:
    begin = span.begin
    while begin < span.end:
        end = min(span.end, begin + grain * rng.choice([1, 2, 3, 100]))
        yield Span(begin, end)
        begin = end


def carry(message: Message, unit: int, source: Side, target: Side, way: str) -> int:
    """Bring one message's elements from source to target memory; return its bytes."""
    region = message.region
    if way in GPU_WAYS:
        return carry_on_gpu(message, unit, source, target, way)
    memory, table = source.open(region.source_rank, read_only=way == "copy")
    into, to_table = target.open(region.target_rank)
    box = Box(message.layers, region.heads, message.tokens, unit)
    size = memory.payload_bytes(box)
    if way == "copy":
        payload = np.zeros(size, np.uint8)
        memory.pack(payload, table, box)
        assert into.copy_from(memory, table, to_table, box, crc=0) == crc32(payload)
    elif way == "stream" and len(message.tokens) % unit == 0:
        out, views = memory.views(table, box), into.views(to_table, box)
        assert {sum(map(len, out)), sum(map(len, views))} == {size}
        stream(out, views, random.Random(size))
        into.clear_rest(to_table, box)
    else:
        payload = np.full(size, 0xAB, dtype=np.uint8)
        memory.pack(payload, table, box)
        into.scatter(payload, to_table, box)
    return size


def carry_on_gpu(message: Message, unit: int, source: Side, target: Side, way: str) -> int:
    """As `carry`, between memories of GPUs."""
    region = message.region
    memory, table = source.open_on_gpu(region.source_rank)
    into, to_table = target.open_on_gpu(region.target_rank)
    box = Box(message.layers, region.heads, message.tokens, unit)
    payload = np.full(memory.payload_bytes(box), 0xAB, np.uint8)
    memory.pack(payload, table, box)
    if way == "gpu payload":
        into.scatter(payload, to_table, box)
    else:
        assert into.copy_from(memory, table, to_table, box, crc=7) == crc32(payload, 7)
    return len(payload)


def stream(out: Sequence[memoryview], into: Sequence[memoryview], rng: random.Random) -> None:
    """Write the bytes of `out` to `into`, however many at a time: as sockets do."""
    data = memoryview(b"".join(out))
    for view in into:
        at = 0
        while at < len(view):
            count = min(len(view) - at, rng.randint(1, 50))
            view[at : at + count] = data[:count]
            data, at = data[count:], at + count
    assert not data


def move(plan: Plan, source: Side, target: Side, rng: random.Random, way: str) -> None:
    """Do the whole plan, each element exactly once."""
    for rank in target.ranks:
        regions = plan.for_target(rank)
        coverage = Coverage(regions, plan.unit)
        for message in messages(regions, plan.unit, rng):
            assert coverage.take(message.layers, message.region.heads, message.tokens) is None
            carry(message, plan.unit, source, target, way)
        assert coverage.missing_units == 0


def sides(
    cache: CacheLayout, total: int, rng: random.Random, *, strided: bool = False
) -> list[Side]:
    """Make the memories of all groups and ranks."""
    return [Side.make(group, total, rng, strided=strided) for group in cache.groups]
