"""Wire messages to and from the dataclasses of engine and transfer, for the pools' edges.

Owns the mapping, and the checks that a mapping needs. The router has its own, since it may import
neither engine nor transfer.
"""

from collections.abc import Iterable, Sequence

from twinpool.v1 import common_pb2, kv_pb2, worker_pb2

from engine.blocks import BlockCounts
from engine.errors import SamplingError
from engine.sampling import Sampled, SamplingParams
from engine.stopping import StopCriteria
from kvtransfer import CacheLayout, Kept, KVLayout, KVShape, PeerStats, Shard, Span
from kvtransfer.layout import CpOrder
from service.errors import InvalidRequest
from service.step_fit import StepSpeed

_CP_ORDERS: dict[CpOrder, kv_pb2.CpOrder.ValueType] = {
    "contiguous": kv_pb2.CP_ORDER_CONTIGUOUS,
    "zigzag": kv_pb2.CP_ORDER_ZIGZAG,
    "cyclic": kv_pb2.CP_ORDER_CYCLIC,
}
_FINISH = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
}


def sampling_from_wire(message: common_pb2.SamplingParams) -> SamplingParams:
    """How the next token is chosen; raises InvalidRequest where a value is out of range."""
    fields = {field.name: value for field, value in message.ListFields()}
    try:
        return SamplingParams(**fields)
    except SamplingError as error:
        raise _invalid(error) from error


def stop_from_wire(message: common_pb2.StopParams, eos_token_ids: Iterable[int]) -> StopCriteria:
    """When a sequence ends, for a model with these end tokens. Stop strings are the router's.

    Raises InvalidRequest where a value is out of range.
    """
    try:
        return StopCriteria(
            max_new_tokens=message.max_new_tokens,
            min_new_tokens=message.min_new_tokens,
            stop_token_ids=frozenset(message.stop_token_ids),
            eos_token_ids=frozenset(eos_token_ids),
            ignore_eos=message.ignore_eos,
        )
    except SamplingError as error:
        raise _invalid(error) from error


def _invalid(error: SamplingError) -> InvalidRequest:
    return InvalidRequest(error.field, found="out of range", hint=str(error))


def finish_to_wire(finish: str | None) -> common_pb2.FinishReason.ValueType:
    """Why a sequence ended; unspecified while it goes on."""
    return _FINISH[finish]


def logprobs_to_wire(sampled: Sampled) -> common_pb2.PositionLogprobs | None:
    """The position's log-probabilities, where they were asked for."""
    if sampled.logprobs is None:
        return None
    report = sampled.logprobs
    return common_pb2.PositionLogprobs(
        chosen=common_pb2.TokenLogprob(token_id=sampled.token_id, logprob=report.chosen),
        top=[common_pb2.TokenLogprob(token_id=i, logprob=value) for i, value in report.top],
    )


def counts_to_wire(counts: BlockCounts) -> worker_pb2.BlockCounts:
    """Blocks by state."""
    return worker_pb2.BlockCounts(
        total=counts.total,
        free=counts.free,
        reserved=counts.reserved,
        used=counts.used,
        quarantined=counts.quarantined,
        cached=counts.cached,
    )


def speed_to_wire(speed: StepSpeed | None) -> worker_pb2.StepSpeed | None:
    """Seconds of steps, None where they are not known."""
    if speed is None:
        return None
    return worker_pb2.StepSpeed(
        base_s=speed.base_s, sequence_s=speed.sequence_s, token_s=speed.token_s
    )


def layout_to_wire(
    layout: CacheLayout, addresses: Sequence[tuple[str, int]] = ()
) -> kv_pb2.KvLayout:
    """A layout, with each rank's data address where its ranks listen."""
    first, *others = layout.groups
    message = _group_to_wire(first)
    for shard, (host, port) in zip(message.shards, addresses, strict=False):
        shard.data_host, shard.data_port = host, port
    message.more_groups.extend(_group_to_wire(group) for group in others)
    return message


def _group_to_wire(layout: KVLayout) -> kv_pb2.KvLayout:
    shape = layout.shape
    return kv_pb2.KvLayout(
        shape=kv_pb2.KvShape(
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            dtype=shape.dtype,
            name=shape.name,
            planes=shape.planes,
            window=shape.window or 0,
            state=shape.state,
        ),
        block_size=layout.block_size,
        shards=[
            kv_pb2.KvShard(
                rank=shard.rank,
                layers=span_to_wire(shard.layers),
                heads=span_to_wire(shard.heads),
                cp_rank=shard.cp_rank,
                cp_size=shard.cp_size,
            )
            for shard in layout.shards
        ],
        cp_order=_CP_ORDERS[layout.cp_order],
        cp_grain=layout.cp_grain or 0,
        cp_first=layout.cp_first,
    )


def layout_from_wire(message: kv_pb2.KvLayout) -> CacheLayout:
    """A layout without its addresses.

    Raises:
        InvalidRequest: The message does not describe a layout.
    """
    try:
        return CacheLayout(
            tuple(_group_from_wire(group) for group in (message, *message.more_groups))
        )
    except ValueError as error:
        raise InvalidRequest(
            "layout", found=str(error), hint="run the same version of Twinpool in both pools"
        ) from error


def _group_from_wire(message: kv_pb2.KvLayout) -> KVLayout:
    shape = message.shape
    return KVLayout(
        shape=KVShape(
            name=shape.name,
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            dtype=shape.dtype,
            planes=shape.planes,
            window=shape.window or None,
            state=shape.state,
        ),
        block_size=message.block_size,
        shards=tuple(
            Shard(
                rank=shard.rank,
                layers=span_from_wire(shard.layers),
                heads=span_from_wire(shard.heads),
                cp_rank=shard.cp_rank,
                cp_size=shard.cp_size,
            )
            for shard in message.shards
        ),
        cp_order=_cp_order_from_wire(message.cp_order),
        cp_grain=message.cp_grain or None,
        cp_first=message.cp_first,
    )


def _cp_order_from_wire(value: kv_pb2.CpOrder.ValueType) -> CpOrder:
    for order, known in _CP_ORDERS.items():
        if known == value:
            return order
    raise ValueError(f"a cp_order with the number {value}, which is not known here")


def kept_to_wire(kept: Kept) -> list[kv_pb2.KeptTokens]:
    """What decode has of a sequence's KV, by cache group."""
    return [kv_pb2.KeptTokens(of_layers=group) for group in kept]


def kept_from_wire(message: Iterable[kv_pb2.KeptTokens]) -> Kept:
    """What decode has of a sequence's KV, by cache group."""
    return tuple(tuple(group.of_layers) for group in message)


def pairs_to_wire(peers: Iterable[PeerStats]) -> list[worker_pb2.KvPair]:
    """The connections that KV goes out on."""
    return [
        worker_pb2.KvPair(
            peer=peer.instance,
            rank=peer.rank,
            transport=peer.transport,
            rtt_s=peer.rtt_s or 0.0,
            bytes_per_s=peer.probe_bytes_per_s or 0.0,
            note=peer.note,
        )
        for peer in peers
    ]


def addresses_from_wire(message: kv_pb2.KvLayout) -> list[tuple[int, str, int]]:
    """(rank, host, port) of each rank that listens for KV."""
    return [(s.rank, s.data_host, s.data_port) for s in message.shards if s.data_host]


def span_to_wire(span: Span) -> kv_pb2.Range:
    """A half-open range."""
    return kv_pb2.Range(begin=span.begin, end=span.end)


def span_from_wire(message: kv_pb2.Range) -> Span:
    """A half-open range."""
    return Span(message.begin, message.end)
