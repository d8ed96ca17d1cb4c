"""The steps that the ranks of an instance are told of, to and from what they stand for."""

from collections.abc import Sequence

from twinpool.v1 import rank_pb2

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
                cp_first=piece.cp_first,
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
            cp_first=piece.cp_first,
        )
        for piece in message.pieces
    ]
