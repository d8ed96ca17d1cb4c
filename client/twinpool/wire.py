"""Turns calls into wire messages and wire messages into results; both clients use it.

Checks Python types only: what a request may ask for is the server's to say.
"""

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from twinpool.errors import InvalidRequest, ServerError
from twinpool.types import (
    BlockCounts,
    Capacity,
    Chunk,
    Completion,
    Description,
    FinishReason,
    GenerateOptions,
    InstanceStatus,
    KvPair,
    Message,
    MissingInstance,
    ModelStatus,
    PositionLogprobs,
    Prompt,
    RequestCounts,
    RequestStats,
    ServedModel,
    Status,
    TokenLogprob,
    Usage,
)
from twinpool.v1 import common_pb2, inference_pb2, worker_pb2

_SAMPLING = common_pb2.SamplingParams.DESCRIPTOR.fields_by_name
_STOP = common_pb2.StopParams.DESCRIPTOR.fields_by_name
_REQUEST = {"model", "priority", "cache_salt", "tenant"}
# Not in the request, but beside it.
_TRACE = ("traceparent", "tracestate")
_BESIDE = (*_TRACE, "timeout_s")
OPTIONS = {*_SAMPLING, *_STOP, *_REQUEST, *_BESIDE}

_FINISH_REASONS: dict[int, FinishReason | None] = {
    common_pb2.FINISH_REASON_UNSPECIFIED: None,
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}
_ROLES: dict[int, str] = {
    common_pb2.ROLE_PREFILL: "prefill",
    common_pb2.ROLE_DECODE: "decode",
}

_Flat = TypeVar("_Flat")


# ---- calls to messages


def generate_request(prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """Return the request without its time-out and trace.

    Raises TypeError for a wrong Python type, InvalidRequest for a number the wire cannot hold.
    """
    request = inference_pb2.GenerateRequest(prompt=wire_prompt(prompt))
    for name, value in options.items():
        if name in _BESIDE or value is None:
            continue
        if name in _SAMPLING:
            _set(request.sampling, name, value, at=f"sampling.{name}")
        elif name in _STOP:
            values = [value] if isinstance(value, str) else value
            _set(request.stop, name, values, at=f"stop.{name}")
        elif name in _REQUEST:
            _set(request, name, value, at=name)
        else:
            raise TypeError(f"there is no option {name!r}; there are {', '.join(sorted(OPTIONS))}")
    return request


def trace_metadata(options: GenerateOptions) -> tuple[tuple[str, str], ...]:
    """Return the caller's trace as metadata of its calls.

    Raises TypeError for anything but text, InvalidRequest for text that no header can hold.
    """
    given = [(name, options.get(name)) for name in _TRACE]
    found = []
    for name, value in given:
        if value is None:
            continue
        if not isinstance(value, str):
            raise TypeError(f"{name} cannot take a value of type {type(value).__name__}")
        if not all(" " <= char <= "~" for char in value):
            raise InvalidRequest(
                f"{name} has characters that no header holds",
                violations=((name, "give printable ASCII"),),
            )
        found.append((name, value))
    return tuple(found)


def _set(message: Any, name: str, value: object, *, at: str) -> None:
    """Set a field; `at` is its path in the request, for messages."""
    try:
        if isinstance(value, Iterable) and not isinstance(value, str):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, AttributeError) as exc:
        raise TypeError(f"{at} cannot take a value of type {type(value).__name__}: {exc}") from exc
    except ValueError as exc:
        raise InvalidRequest(f"{at}: {exc}", violations=((at, str(exc)),)) from exc


def wire_prompt(prompt: Prompt) -> inference_pb2.Prompt:
    """Return a prompt's wire form; raises as `generate_request`."""
    wired = inference_pb2.Prompt()
    if isinstance(prompt, str):
        _set(wired, "text", prompt, at="prompt.text")
        return wired
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping):
        raise TypeError(
            f"prompt has type {type(prompt).__name__}; give text, a list of messages or token ids"
        )
    items = list(prompt)
    if items and isinstance(items[0], Message | Mapping):
        for index, item in enumerate(items):
            _add_message(wired.messages, item, at=f"prompt.messages[{index}]")
    else:
        wired.token_ids.SetInParent()  # an empty list is one of token ids
        _set(wired.token_ids, "ids", [_token_id(item) for item in items], at="prompt.token_ids")
    return wired


def _add_message(messages: inference_pb2.Messages, item: object, *, at: str) -> None:
    if isinstance(item, Mapping) and set(item) == {"role", "content"}:
        item = Message(item["role"], item["content"])
    if not isinstance(item, Message):
        raise TypeError(f"{at} is no Message and no dict of exactly role and content")
    message = messages.messages.add()
    _set(message, "role", item.role, at=f"{at}.role")
    _set(message, "content", item.content, at=f"{at}.content")


def _token_id(item: object) -> int:
    try:
        return operator.index(cast(Any, item))
    except TypeError as exc:
        raise TypeError(f"a token id is an int, not of type {type(item).__name__}") from exc


# ---- messages to results


def chunk(message: inference_pb2.GenerateResponse) -> Chunk:
    """Return one message of an answer."""
    finish_reason = _FINISH_REASONS.get(message.finish_reason, "other")
    return Chunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_position(position) for position in message.logprobs),
        finish_reason=finish_reason,
        usage=_flat(Usage, message.usage) if finish_reason else None,
        stats=_flat(RequestStats, message.stats) if finish_reason else None,
        request_id=message.request_id,
    )


def completion(chunks: Sequence[Chunk]) -> Completion:
    """Join the chunks of an answer that has ended."""
    last = chunks[-1] if chunks else None
    if last is None or last.finish_reason is None or last.usage is None or last.stats is None:
        raise _broken_off(last.request_id if last else None)
    return Completion(
        text="".join(part.text for part in chunks),
        token_ids=tuple(token_id for part in chunks for token_id in part.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        logprobs=tuple(position for part in chunks for position in part.logprobs),
        stats=last.stats,
        request_id=last.request_id,
    )


def check_finished(finished: bool, request_id: str | None) -> None:
    """Raise ServerError where a stream ended well without its last message."""
    if not finished:
        raise _broken_off(request_id)


def _broken_off(request_id: str | None) -> ServerError:
    return ServerError(
        "the answer broke off: it ended without a finish reason",
        reason="INCOMPLETE",
        request_id=request_id,
    )


def description(message: inference_pb2.DescribeResponse) -> Description:
    """Return the answer of Describe."""
    return _flat(Description, message)


def models(message: inference_pb2.ListModelsResponse) -> tuple[ServedModel, ...]:
    """Return the answer of ListModels."""
    return tuple(_flat(ServedModel, model) for model in message.models)


def status(message: worker_pb2.GetStatusResponse) -> Status:
    """Return the answer of GetStatus."""
    models = tuple(_model(model) for model in message.models)
    return Status(
        router_id=message.router_id,
        version=message.version,
        uptime_s=message.uptime_s,
        model=models[0] if len(models) == 1 else None,
        models=models,
        instances=tuple(_instance(instance) for instance in message.instances),
        missing=tuple(
            MissingInstance(role=_role(one.role), address=one.address) for one in message.missing
        ),
        requests=_flat(RequestCounts, message.requests),
    )


def _model(message: worker_pb2.ModelStatus) -> ModelStatus:
    return _flat(
        ModelStatus,
        message.model,
        ready=message.ready,
        requests=_flat(RequestCounts, message.requests),
    )


def _instance(message: worker_pb2.InstanceStatus) -> InstanceStatus:
    return _flat(
        InstanceStatus,
        message,
        role=_role(message.role),
        capacity=_flat(Capacity, message.capacity),
        blocks=_flat(BlockCounts, message.blocks),
        pairs=tuple(_flat(KvPair, pair) for pair in message.pairs),
    )


def _role(role: int) -> str:
    return _ROLES.get(role, "other")


def _position(message: common_pb2.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(
        chosen=_flat(TokenLogprob, message.chosen),
        top=tuple(_flat(TokenLogprob, top) for top in message.top),
    )


def _flat(result: type[_Flat], message: Any, **converted: object) -> _Flat:
    """Return a dataclass from the message's fields of the same names."""
    names = [field.name for field in dataclasses.fields(cast(Any, result))]
    values = {name: getattr(message, name) for name in names if name not in converted}
    return result(**values, **converted)
