"""What a step made, as routers are told of it. Owns no stream and decides nothing."""

from collections.abc import Sequence

from twinpool.v1 import worker_pb2

from decode.worker import First, Token
from service.wire import finish_to_wire, logprobs_to_wire


def tokens_to_wire(tokens: Sequence[Token]) -> worker_pb2.DecodeRunResponse:
    """Tokens of one step for one router."""
    return worker_pb2.DecodeRunResponse(
        outputs=[_output(token) for token in tokens if token.first is None],
        first_tokens=[
            _first_token(token, token.first) for token in tokens if token.first is not None
        ],
    )


def _first_token(token: Token, first: First) -> worker_pb2.LocalFirstToken:
    return worker_pb2.LocalFirstToken(
        request_id=token.request_id,
        first_token=worker_pb2.FirstToken(
            token_id=token.sampled.token_id,
            logprobs=logprobs_to_wire(token.sampled),
            finish_reason=finish_to_wire(token.finish),
            queue_s=first.queue_s,
            prefill_s=first.prefill_s,
            cached_tokens=first.cached_tokens,
        ),
    )


def _output(token: Token) -> worker_pb2.SequenceOutput:
    logprobs = logprobs_to_wire(token.sampled)
    return worker_pb2.SequenceOutput(
        request_id=token.request_id,
        token_ids=[token.sampled.token_id],
        logprobs=[logprobs] if logprobs is not None else (),
        finish_reason=finish_to_wire(token.finish),
    )
