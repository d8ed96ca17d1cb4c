"""Messages between the ranks of a decode instance, to and from what they stand for."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import repeat

from twinpool.v1 import common_pb2, rank_pb2

from decode.compute import DecodeSequence, Part, Row, Rows
from decode.orders import NOTHING, Loads, Order, Placing
from decode.sequence import SequenceRecord
from engine.sampling import Sampled, SamplingParams, SequenceState, TokenLogprobs
from kvtransfer import ReceiveGrant
from service.wire import (
    kept_from_wire,
    kept_to_wire,
    layout_from_wire,
    layout_to_wire,
    logprobs_to_wire,
    sampling_from_wire,
    span_from_wire,
    span_to_wire,
)


def sequence_to_wire(record: SequenceRecord) -> rank_pb2.RankSequence:
    """A sequence that will be decoded."""
    reservation = record.reservation
    needs_prompt = reservation.sampling.needs_prompt or reservation.is_local
    return rank_pb2.RankSequence(
        request_id=record.request_id,
        blocks=record.blocks,
        prompt_tokens=reservation.own_prompt_tokens,
        sampling=_sampling_to_wire(reservation.sampling),
        min_new_tokens=reservation.stop.min_new_tokens,
        end_token_ids=reservation.stop.end_token_ids,
        prompt_token_ids=reservation.prompt_ids if needs_prompt else (),
        output_token_ids=reservation.output_ids,
        local_prefill=reservation.is_local,
    )


def sequence_from_wire(message: rank_pb2.RankSequence) -> DecodeSequence:
    """A sequence that will be decoded."""
    return DecodeSequence(
        blocks=list(message.blocks),
        sampling=SequenceState(
            sampling_from_wire(message.sampling),
            prompt_len=message.prompt_tokens,
            prompt_ids=message.prompt_token_ids,
            output_ids=message.output_token_ids,
            min_new_tokens=message.min_new_tokens,
            suppressed_ids=message.end_token_ids,
        ),
        prompt=[*message.prompt_token_ids, *message.output_token_ids]
        if message.local_prefill
        else (),
    )


def _sampling_to_wire(params: SamplingParams) -> common_pb2.SamplingParams:
    values = {name: value for name, value in asdict(params).items() if value is not None}
    return common_pb2.SamplingParams(**values)


def step_to_wire(number: int, rows: Rows, order: Order = NOTHING) -> rank_pb2.RankDecodeStep:
    """One step."""
    return rank_pb2.RankDecodeStep(
        number=number,
        of_dp_ranks=[_rows_to_wire(of) for of in rows],
        take_loads=order.take_loads,
        switch_to=order.switch,
    )


def order_from_wire(message: rank_pb2.RankDecodeStep) -> Order:
    """What is done before a step."""
    return Order(take_loads=message.take_loads, switch=message.switch_to)


def loads_to_wire(loads: Loads) -> rank_pb2.RankLoads:
    """How many tokens have chosen each expert."""
    layers = [rank_pb2.RankLayerLoads(layer=each, tokens=loads[each]) for each in loads]
    return rank_pb2.RankLoads(layers=layers)


def loads_from_wire(message: rank_pb2.RankLoads) -> Loads:
    """How many tokens have chosen each expert."""
    return {each.layer: list(each.tokens) for each in message.layers}


def placing_to_wire(placing: Placing) -> rank_pb2.RankPlacing:
    """Where a layer's experts are to be."""
    return rank_pb2.RankPlacing(
        number=placing.number,
        layer=placing.layer,
        of_ep_ranks=[rank_pb2.RankSlots(experts=held) for held in placing.slots],
    )


def placing_from_wire(message: rank_pb2.RankPlacing) -> Placing:
    """Where a layer's experts are to be."""
    return Placing(
        number=message.number,
        layer=message.layer,
        slots=tuple(tuple(held.experts) for held in message.of_ep_ranks),
    )


def _rows_to_wire(rows: Sequence[Row]) -> rank_pb2.RankRows:
    if not rows:
        return rank_pb2.RankRows()
    request_ids, token_ids, starts, lengths = zip(*rows, strict=True)
    return rank_pb2.RankRows(
        request_ids=request_ids,
        token_ids=token_ids,
        starts=starts,
        lengths=lengths if any(lengths) else (),
    )


def rows_from_wire(message: rank_pb2.RankDecodeStep) -> Rows:
    """What each dp rank computes in a step."""
    return [
        list(map(Row, rows.request_ids, rows.token_ids, rows.starts, rows.lengths or repeat(0)))
        for rows in message.of_dp_ranks
    ]


def part_to_wire(number: int, part: Part) -> rank_pb2.RankSampled:
    """What came of a dp rank's part in a step."""
    message = rank_pb2.RankSampled(
        number=number,
        token_ids=[each.token_id for each in part.sampled],
        sample_s=part.sample_s,
    )
    if any(each.logprobs is not None for each in part.sampled):
        empty = common_pb2.PositionLogprobs()
        message.logprobs.extend(logprobs_to_wire(each) or empty for each in part.sampled)
    return message


def part_from_wire(message: rank_pb2.RankSampled) -> Part:
    """What came of a dp rank's part in a step."""
    reports = message.logprobs or [None] * len(message.token_ids)
    return Part(
        sampled=[
            Sampled(token_id=token_id, logprobs=_logprobs_from_wire(report))
            for token_id, report in zip(message.token_ids, reports, strict=True)
        ],
        sample_s=message.sample_s,
    )


def _logprobs_from_wire(message: common_pb2.PositionLogprobs | None) -> TokenLogprobs | None:
    if message is None or not message.HasField("chosen"):
        return None
    return TokenLogprobs(
        chosen=message.chosen.logprob,
        top=tuple((each.token_id, each.logprob) for each in message.top),
    )


def receive_to_wire(grant: ReceiveGrant) -> rank_pb2.RankReceive:
    """A grant, but for its epoch, which is the instance's."""
    (blocks,) = grant.block_ids
    return rank_pb2.RankReceive(
        transfer_id=grant.transfer_id,
        nonce=grant.nonce,
        tokens=span_to_wire(grant.tokens),
        total_tokens=grant.total_tokens,
        blocks=blocks,
        source_layout=layout_to_wire(grant.source_layout),
        source_instance=grant.source_instance,
        ttl_ms=max(1, int(grant.ttl_s * 1000)),
        kept=kept_to_wire(grant.kept),
    )


def receive_from_wire(message: rank_pb2.RankReceive, epoch: int) -> ReceiveGrant:
    """A grant."""
    return ReceiveGrant(
        transfer_id=message.transfer_id,
        epoch=epoch,
        nonce=message.nonce,
        tokens=span_from_wire(message.tokens),
        total_tokens=message.total_tokens,
        block_ids=(tuple(message.blocks),),
        source_layout=layout_from_wire(message.source_layout),
        source_instance=message.source_instance,
        ttl_s=message.ttl_ms / 1000,
        kept=kept_from_wire(message.kept),
    )
