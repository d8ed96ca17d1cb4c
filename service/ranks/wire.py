"""Messages between the ranks of an instance, to and from what they stand for."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType

from twinpool.v1 import rank_pb2

from engine.ring.comm import Traffic
from engine.tally import Count
from kvtransfer import AgentStats, Closed, Completed, Failed, TransferStats
from kvtransfer.errors import from_code
from service.wire import kept_from_wire, kept_to_wire, pairs_to_wire


def end_to_wire(end: Completed | Failed | Closed) -> rank_pb2.RankTransferEnd:
    """How a rank's part in a transfer has ended."""
    message = rank_pb2.RankTransferEnd(transfer_id=end.transfer_id)
    match end:
        case Completed(stats=stats):
            message.completed.CopyFrom(
                rank_pb2.RankCompleted(
                    bytes=stats.bytes,
                    messages=stats.messages,
                    seconds=stats.seconds,
                    transport=stats.transport,
                    hidden_bytes=stats.hidden_bytes,
                )
            )
        case Failed(error=error, retryable=retryable, kept=kept):
            message.failed.CopyFrom(
                rank_pb2.RankFailed(
                    code=error.code,
                    message=str(error),
                    retryable=retryable,
                    kept=kept_to_wire(kept),
                )
            )
        case Closed(kept=kept):
            message.closed.CopyFrom(rank_pb2.RankClosed(kept=kept_to_wire(kept)))
    return message


def end_from_wire(message: rank_pb2.RankTransferEnd) -> Completed | Failed | Closed:
    """How a rank's part in a transfer has ended."""
    match message.WhichOneof("kind"):
        case "completed":
            done = message.completed
            stats = TransferStats(
                bytes=done.bytes,
                messages=done.messages,
                seconds=done.seconds,
                transport=done.transport,
                hidden_bytes=done.hidden_bytes,
            )
            return Completed(message.transfer_id, stats)
        case "failed":
            failed = message.failed
            error = from_code(failed.code, failed.message)
            return Failed(message.transfer_id, error, failed.retryable, kept_from_wire(failed.kept))
    return Closed(message.transfer_id, kept_from_wire(message.closed.kept))


# Of a rank's counters these are not summed over ranks; the slots are, state by state.
_SLOTS = "slots."
_APART = ("slots", "peers", "slowest_detection_s")


def heartbeat_to_wire(
    stats: AgentStats,
    links: Mapping[str, Traffic],
    *,
    step_seconds: Mapping[str, float] = MappingProxyType({}),
    collectives: Mapping[str, Count] = MappingProxyType({}),
) -> rank_pb2.RankHeartbeat:
    """That a rank is alive, and what it has counted."""
    names = (field.name for field in fields(stats) if field.name not in _APART)
    return rank_pb2.RankHeartbeat(
        pairs=pairs_to_wire(stats.peers),
        transfer={name: getattr(stats, name) for name in names}
        | {f"{_SLOTS}{state}": count for state, count in stats.slots.items()},
        links={
            name: rank_pb2.RankTraffic(bytes=traffic.bytes_sent, wait_s=traffic.wait_s)
            for name, traffic in links.items()
        },
        step_seconds=step_seconds,
        collectives={
            kind: rank_pb2.RankCollectives(calls=count.calls, bytes=count.bytes)
            for kind, count in collectives.items()
        },
    )


def collectives_from_wire(beat: rank_pb2.RankHeartbeat) -> dict[str, Count]:
    """A rank's collectives, by kind."""
    return {kind: Count(each.calls, each.bytes) for kind, each in beat.collectives.items()}


def links_from_wire(beat: rank_pb2.RankHeartbeat) -> dict[str, Traffic]:
    """What a rank has exchanged with others, by the sort of link."""
    return {name: Traffic(link.bytes, link.wait_s) for name, link in beat.links.items()}


def sum_of_ranks(own: AgentStats, others: Iterable[Mapping[str, float]]) -> AgentStats:
    """An instance's counters from its ranks'; connections and the slowest detection are `own`'s."""
    total: Counter[str] = Counter()
    for counters in others:
        total.update(counters)
    slots = {state: count + int(total[f"{_SLOTS}{state}"]) for state, count in own.slots.items()}
    names = (field.name for field in fields(own) if field.name not in _APART)
    sums = {name: getattr(own, name) + type(getattr(own, name))(total[name]) for name in names}
    return replace(own, **sums, slots=slots)
