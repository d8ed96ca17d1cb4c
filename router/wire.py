"""Owns the mapping between wire messages and the router's own types; the router's edges use it.

Nothing is judged here: what a client may ask for is `validate`, who may register is `membership`.
"""

from collections.abc import Iterable, Sequence
from math import inf

from twinpool.v1 import common_pb2, inference_pb2, worker_pb2

from router.request import (
    AnswerPart,
    Finish,
    GenerateInput,
    MessagesPrompt,
    PositionLogprobs,
    Prompt,
    ResumeInput,
    Sampling,
    SamplingInput,
    Stats,
    Stop,
    StopInput,
    TextPrompt,
    TokenLogprob,
    Tokens,
    TokensPrompt,
    ValidRequest,
)
from service.step_fit import StepSpeed

_FINISH_FROM_WIRE = {
    common_pb2.FINISH_REASON_UNSPECIFIED: None,
    common_pb2.FINISH_REASON_STOP: Finish.STOP,
    common_pb2.FINISH_REASON_LENGTH: Finish.LENGTH,
}
_FINISH_TO_WIRE = {ours: theirs for theirs, ours in _FINISH_FROM_WIRE.items()}


# ---- from clients


def prompt_from_wire(message: inference_pb2.Prompt) -> Prompt | None:
    match message.WhichOneof("kind"):
        case "text":
            return TextPrompt(message.text)
        case "messages":
            return MessagesPrompt(tuple((m.role, m.content) for m in message.messages.messages))
        case "token_ids":
            return TokensPrompt(tuple(message.token_ids.ids))
        case _:
            return None


def input_from_wire(message: inference_pb2.GenerateRequest) -> GenerateInput:
    stop = message.stop
    return GenerateInput(
        prompt=prompt_from_wire(message.prompt),
        sampling=SamplingInput(**{f.name: value for f, value in message.sampling.ListFields()}),
        stop=StopInput(
            max_new_tokens=stop.max_new_tokens if stop.HasField("max_new_tokens") else None,
            min_new_tokens=stop.min_new_tokens,
            stop=tuple(stop.stop),
            stop_token_ids=tuple(stop.stop_token_ids),
            ignore_eos=stop.ignore_eos,
        ),
        priority=message.priority,
        cache_salt=message.cache_salt,
        tenant=message.tenant,
        resume=_resume_from_wire(message.resume) if message.HasField("resume") else None,
        ttft_s=message.slo.ttft_ms / 1000 or inf,
        tpot_s=message.slo.tpot_ms / 1000 or inf,
    )


def _resume_from_wire(message: inference_pb2.Resumption) -> ResumeInput:
    terms = message.terms
    return ResumeInput(
        request_id=message.request_id,
        output_token_ids=tuple(message.output_token_ids),
        text_chars=message.text_chars,
        seed=terms.seed if terms.HasField("seed") else None,
        max_new_tokens=terms.max_new_tokens,
        model_fingerprint=terms.model_fingerprint,
        prompt_digest=terms.prompt_digest,
        proof=terms.proof,
    )


def terms_to_wire(
    request: ValidRequest, model_fingerprint: str, proof: bytes
) -> inference_pb2.Terms:
    """Returns what another router needs to go on with this request's answer."""
    return inference_pb2.Terms(
        seed=request.sampling.seed,
        max_new_tokens=request.stop.max_new_tokens,
        model_fingerprint=model_fingerprint,
        prompt_digest=request.prompt_digest(),
        proof=proof,
    )


def response_to_wire(
    request_id: str, part: AnswerPart, prompt_tokens: int, stats: Stats
) -> inference_pb2.GenerateResponse:
    """One message of an answer; usage and stats go into the last one."""
    message = inference_pb2.GenerateResponse(
        request_id=request_id,
        text=part.text,
        token_ids=part.token_ids,
        logprobs=[_position_to_wire(position) for position in part.logprobs],
    )
    if part.finish is not None:
        message.finish_reason = _FINISH_TO_WIRE[part.finish]
        message.usage.prompt_tokens = prompt_tokens
        message.usage.completion_tokens = part.completion_tokens
        message.stats.CopyFrom(
            inference_pb2.RequestStats(
                queue_s=stats.queue_s,
                prefill_s=stats.prefill_s,
                handoff_s=stats.handoff_s,
                kv_bytes=stats.kv_bytes,
                kv_transport=stats.kv_transport,
                prefill_instance=stats.prefill_instance,
                decode_instance=stats.decode_instance,
                retries=stats.retries,
                cached_tokens=stats.cached_tokens,
                decode_cached_tokens=stats.decode_cached_tokens,
                moves=stats.moves,
                pause_s=stats.pause_s,
            )
        )
    return message


# ---- to and from the pools


def speed_to_wire(speed: StepSpeed | None) -> worker_pb2.StepSpeed | None:
    if speed is None:
        return None
    return worker_pb2.StepSpeed(
        base_s=speed.base_s, sequence_s=speed.sequence_s, token_s=speed.token_s
    )


def sampling_to_wire(sampling: Sampling) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
    )


def stop_to_wire(stop: Stop) -> common_pb2.StopParams:
    """Stop strings stay behind: the router owns all text."""
    return common_pb2.StopParams(
        max_new_tokens=stop.max_new_tokens,
        min_new_tokens=stop.min_new_tokens,
        stop_token_ids=stop.token_ids,
        ignore_eos=stop.ignore_eos,
    )


def first_token_from_wire(message: worker_pb2.FirstToken) -> Tokens:
    with_logprobs = message.HasField("logprobs")
    return Tokens(
        token_ids=(message.token_id,),
        logprobs=(_position_from_wire(message.logprobs),) if with_logprobs else (),
        finish=_FINISH_FROM_WIRE[message.finish_reason],
    )


def output_from_wire(message: worker_pb2.SequenceOutput) -> Tokens:
    return Tokens(
        token_ids=tuple(message.token_ids),
        logprobs=_positions_from_wire(message.logprobs),
        finish=_FINISH_FROM_WIRE[message.finish_reason],
    )


def _positions_from_wire(
    messages: Sequence[common_pb2.PositionLogprobs],
) -> tuple[PositionLogprobs, ...]:
    # Few requests ask for them, and this is done for every token.
    return tuple(map(_position_from_wire, messages)) if messages else ()


def _position_from_wire(message: common_pb2.PositionLogprobs) -> PositionLogprobs:
    chosen, *top = _logprobs_from_wire((message.chosen, *message.top))
    return PositionLogprobs(chosen=chosen, top=tuple(top))


def _logprobs_from_wire(messages: Iterable[common_pb2.TokenLogprob]) -> list[TokenLogprob]:
    return [TokenLogprob(m.token_id, m.logprob) for m in messages]


def _position_to_wire(position: PositionLogprobs) -> common_pb2.PositionLogprobs:
    chosen, *top = _logprobs_to_wire((position.chosen, *position.top))
    return common_pb2.PositionLogprobs(chosen=chosen, top=top)


def _logprobs_to_wire(logprobs: Sequence[TokenLogprob]) -> list[common_pb2.TokenLogprob]:
    return [common_pb2.TokenLogprob(token_id=p.token_id, logprob=p.logprob) for p in logprobs]
