"""Messages between the ranks of an instance, to and from what they stand for."""

from collections.abc import Sequence

from twinpool.v1 import rank_pb2

from kvtransfer import Closed, Completed, Failed, TransferStats
from kvtransfer.errors import from_code
from prefill.compute import Piece


def step_to_wire(pieces: Sequence[Piece]) -> rank_pb2.RankStep:
    """One forward pass."""
    return rank_pb2.RankStep(
        pieces=[
            rank_pb2.RankPiece(
                request_id=piece.request_id,
                start=piece.start,
                token_ids=piece.token_ids,
                blocks=piece.blocks,
                transfer=piece.transfer,
            )
            for piece in pieces
        ]
    )


def step_from_wire(message: rank_pb2.RankStep) -> list[Piece]:
    """One forward pass."""
    return [
        Piece(
            request_id=piece.request_id,
            start=piece.start,
            token_ids=list(piece.token_ids),
            blocks=list(piece.blocks),
            transfer=piece.transfer,
        )
        for piece in message.pieces
    ]


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
        case Failed(error=error, retryable=retryable):
            message.failed.CopyFrom(
                rank_pb2.RankFailed(code=error.code, message=str(error), retryable=retryable)
            )
        case Closed():
            message.closed.CopyFrom(rank_pb2.RankClosed())
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
            return Failed(message.transfer_id, error, failed.retryable)
    return Closed(message.transfer_id)
