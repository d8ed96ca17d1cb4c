"""Owns every rule about what a request may ask for, whatever edge it came in by.

`check_prompt` runs before tokenizing, `check` after it; both know nothing of wire messages, and
what they return is all that the rest of the router sees.
"""

import math
import re
from dataclasses import dataclass, replace

from router.ledger import Need
from router.request import (
    GenerateInput,
    MessagesPrompt,
    Prompt,
    Resumed,
    ResumeInput,
    Sampling,
    SamplingInput,
    Stop,
    StopInput,
    TextPrompt,
    TokensPrompt,
    ValidRequest,
)
from service.errors import Incompatible, InvalidRequest, Refused

MAX_ROLE_CHARS = 64
MAX_SALT_CHARS = 128
MAX_TENANT_CHARS = 128
REQUEST_ID = re.compile(r"[0-9a-f]{16}")
# Far beyond any use, near enough to keep logits finite in float32.
MAX_REPETITION_PENALTY = 100.0
MIN_REPETITION_PENALTY = 0.01


@dataclass(frozen=True, kw_only=True)
class Caps:
    """Bounds an operator sets on what one request may ask for."""

    max_prompt_tokens: int
    max_prompt_chars: int
    max_messages: int
    max_new_tokens: int
    default_max_new_tokens: int
    max_stop_strings: int
    max_stop_chars: int
    max_stop_token_ids: int
    max_logprobs: int


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What the model and the pools of now can take.

    `largest_prompt` and `largest_request` (tokens) are None while no instance says.
    """

    vocab_size: int
    max_model_len: int
    known_roles: frozenset[str] | None
    largest_prompt: int | None
    largest_request: int | None


def check_prompt(prompt: Prompt | None, limits: ModelLimits, caps: Caps) -> Prompt:
    """Checks what can be checked before tokenizing. Raises InvalidRequest."""
    match prompt:
        case None:
            raise InvalidRequest("prompt", "nothing", "set text, messages or token_ids")
        case TextPrompt(text):
            _check_chars("prompt.text", text, caps)
            if not text:
                raise InvalidRequest("prompt.text", "empty", "at least one character is needed")
        case MessagesPrompt(messages):
            _check_messages(messages, limits, caps)
        case TokensPrompt(token_ids):
            if not token_ids:
                raise InvalidRequest("prompt.token_ids", "empty", "at least one id is needed")
    return prompt


def _check_chars(field: str, text: str, caps: Caps) -> None:
    if len(text) > caps.max_prompt_chars:
        raise InvalidRequest(
            field, f"{len(text)} characters", f"at most {caps.max_prompt_chars} are allowed"
        )


def _check_messages(messages: tuple[tuple[str, str], ...], limits: ModelLimits, caps: Caps) -> None:
    if not messages:
        raise InvalidRequest("prompt.messages", "empty", "at least one message is needed")
    if len(messages) > caps.max_messages:
        raise InvalidRequest(
            "prompt.messages",
            f"{len(messages)} messages",
            f"at most {caps.max_messages} are allowed",
        )
    if limits.known_roles is None:
        raise InvalidRequest(
            "prompt.messages",
            "messages",
            "this model has no chat template; send prompt.text or prompt.token_ids",
        )
    for index, (role, _content) in enumerate(messages):
        if role not in limits.known_roles:
            raise InvalidRequest(
                f"prompt.messages[{index}].role",
                repr(role[:MAX_ROLE_CHARS]),
                f"one of {', '.join(sorted(limits.known_roles))} is allowed",
            )
    if not any(content for _role, content in messages):
        raise InvalidRequest("prompt.messages", "only empty messages", "some content is needed")
    _check_chars("prompt.messages", "".join(content for _role, content in messages), caps)


def _check_vocabulary(field: str, token_ids: tuple[int, ...], limits: ModelLimits) -> None:
    largest = max(token_ids)
    if largest >= limits.vocab_size:
        raise InvalidRequest(
            f"{field}[{token_ids.index(largest)}]",
            largest,
            f"ids from 0 to {limits.vocab_size - 1} are in the vocabulary",
        )


def check(
    request: GenerateInput, token_ids: tuple[int, ...], limits: ModelLimits, caps: Caps
) -> ValidRequest:
    """Checks everything that `check_prompt` does not; `token_ids` is the prompt's, tokenized.

    Raises InvalidRequest, or Refused where the pools of now could never hold the request.
    """
    _check_length(len(token_ids), limits, caps)
    _check_vocabulary("prompt.token_ids", token_ids, limits)
    sampling = check_sampling(request.sampling, caps)
    stop = check_stop(request.stop, len(token_ids), limits, caps)
    for field, text, allowed in (
        ("cache_salt", request.cache_salt, MAX_SALT_CHARS),
        ("tenant", request.tenant, MAX_TENANT_CHARS),
    ):
        if len(text) > allowed:
            raise InvalidRequest(field, f"{len(text)} characters", f"at most {allowed} are allowed")
    valid = ValidRequest(
        prompt_token_ids=token_ids,
        sampling=sampling,
        stop=stop,
        priority=request.priority,
        cache_salt=request.cache_salt,
        tenant=request.tenant,
        ttft_s=request.ttft_s,
        tpot_s=request.tpot_s,
    )
    _check_fits_ever(valid.need, limits)
    return valid


def with_terms(request: GenerateInput, resume: ResumeInput) -> GenerateInput:
    """Returns a request that goes on here with what its first router settled for it."""
    sampling, stop = request.sampling, request.stop
    if sampling.seed is None:
        sampling = replace(sampling, seed=resume.seed)
    if stop.max_new_tokens is None:
        stop = replace(stop, max_new_tokens=resume.max_new_tokens)
    return replace(request, sampling=sampling, stop=stop)


def check_resume(
    given: ResumeInput, request: ValidRequest, limits: ModelLimits, fingerprint: str
) -> Resumed:
    """Checks what a client says of an answer that it has the beginning of.

    `fingerprint` is that of the model that would go on with it. Raises InvalidRequest, or
    Incompatible where what is served here would go on otherwise.
    """
    if not REQUEST_ID.fullmatch(given.request_id):
        raise InvalidRequest("resume.request_id", repr(given.request_id), "it has 16 hex digits")
    tokens, most = given.output_token_ids, request.stop.max_new_tokens
    if not 0 < len(tokens) < most:
        raise InvalidRequest(
            "resume.output_token_ids",
            f"{len(tokens)} ids",
            f"1 to {most - 1} can be gone on from, with max_new_tokens {most}",
        )
    _check_vocabulary("resume.output_token_ids", tokens, limits)
    samples = request.sampling.temperature > 0.0
    if samples and request.sampling.seed is None:
        raise InvalidRequest("resume.terms.seed", "nothing", "a drawn answer needs its seed")
    for what, is_same in (
        ("another model gave its beginning", given.model_fingerprint == fingerprint),
        ("its prompt has other tokens here", given.prompt_digest == request.prompt_digest()),
    ):
        if not is_same:
            raise Incompatible(
                f"the answer cannot go on here: {what}; ask for it anew",
                reason="RESUME_MISMATCH",
            )
    return Resumed(
        request_id=given.request_id, output_token_ids=tokens, text_chars=given.text_chars
    )


def _check_length(prompt_tokens: int, limits: ModelLimits, caps: Caps) -> None:
    if prompt_tokens == 0:
        raise InvalidRequest("prompt", "0 tokens", "at least one token is needed")
    allowed = min(caps.max_prompt_tokens, limits.max_model_len - 1)
    if prompt_tokens > allowed:
        raise InvalidRequest(
            "prompt", f"{prompt_tokens} tokens", f"at most {allowed} tokens are allowed"
        )


def _check_fits_ever(need: Need, limits: ModelLimits) -> None:
    for what, tokens, largest in (
        ("prompt", need.prompt_tokens, limits.largest_prompt),
        ("prompt and max_new_tokens", need.total_tokens, limits.largest_request),
    ):
        if what != "prompt" and not need.decodes:
            continue
        if largest is not None and tokens > largest:
            raise Refused(
                "NEVER_FITS",
                needed=tokens,
                free=largest,
                message=f"{what} need {tokens} tokens of KV cache, and the largest instance "
                f"holds {largest} for one request; ask for fewer tokens",
            )


def check_sampling(given: SamplingInput, caps: Caps) -> Sampling:
    """Fills in the defaults. Raises InvalidRequest naming the field that is out of range."""
    if given.logprobs is not None and given.logprobs > caps.max_logprobs:
        raise InvalidRequest(
            "sampling.logprobs", given.logprobs, f"at most {caps.max_logprobs} are allowed"
        )
    return Sampling(
        temperature=_within("temperature", given.temperature, 0.0, 0.0, 100.0),
        top_k=given.top_k or 0,
        top_p=_within("top_p", given.top_p, 1.0, 0.0, 1.0, open_below=True),
        min_p=_within("min_p", given.min_p, 0.0, 0.0, 1.0),
        repetition_penalty=_within(
            "repetition_penalty",
            given.repetition_penalty,
            1.0,
            MIN_REPETITION_PENALTY,
            MAX_REPETITION_PENALTY,
        ),
        presence_penalty=_within("presence_penalty", given.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=_within("frequency_penalty", given.frequency_penalty, 0.0, -2.0, 2.0),
        seed=given.seed,
        logprobs=given.logprobs,
    )


def _within(
    name: str,
    value: float | None,
    default: float,
    low: float,
    high: float,
    *,
    open_below: bool = False,
) -> float:
    if value is None:
        return default
    inside = low < value <= high if open_below else low <= value <= high
    if not math.isfinite(value) or not inside:
        bracket = "(" if open_below else "["
        raise InvalidRequest(
            f"sampling.{name}", f"{value:g}", f"{bracket}{low:g}, {high:g}] is allowed"
        )
    return value


def check_stop(given: StopInput, prompt_tokens: int, limits: ModelLimits, caps: Caps) -> Stop:
    """Settles max_new_tokens. Raises InvalidRequest naming the field that is out of range."""
    max_new_tokens = _settle_max_new_tokens(given.max_new_tokens, prompt_tokens, limits, caps)
    if given.min_new_tokens > max_new_tokens:
        raise InvalidRequest(
            "stop.min_new_tokens",
            given.min_new_tokens,
            f"at most max_new_tokens, {max_new_tokens} here, is allowed",
        )
    _check_stop_strings(given.stop, caps)
    if len(given.stop_token_ids) > caps.max_stop_token_ids:
        raise InvalidRequest(
            "stop.stop_token_ids",
            f"{len(given.stop_token_ids)} ids",
            f"at most {caps.max_stop_token_ids} are allowed",
        )
    if given.stop_token_ids:
        _check_vocabulary("stop.stop_token_ids", given.stop_token_ids, limits)
    return Stop(
        max_new_tokens=max_new_tokens,
        min_new_tokens=given.min_new_tokens,
        strings=given.stop,
        token_ids=given.stop_token_ids,
        ignore_eos=given.ignore_eos,
    )


def _settle_max_new_tokens(
    given: int | None, prompt_tokens: int, limits: ModelLimits, caps: Caps
) -> int:
    room = limits.max_model_len - prompt_tokens
    if given is None:
        largest = limits.largest_request
        if largest is not None and largest > prompt_tokens:
            room = min(room, largest - prompt_tokens)
        return min(caps.default_max_new_tokens, caps.max_new_tokens, room)
    if given == 0:
        raise InvalidRequest("stop.max_new_tokens", 0, "at least 1 is needed")
    if given > min(caps.max_new_tokens, room):
        raise InvalidRequest(
            "stop.max_new_tokens",
            given,
            f"at most {min(caps.max_new_tokens, room)} is allowed after this prompt "
            f"of {prompt_tokens} tokens",
        )
    return given


def _check_stop_strings(strings: tuple[str, ...], caps: Caps) -> None:
    if len(strings) > caps.max_stop_strings:
        raise InvalidRequest(
            "stop.stop",
            f"{len(strings)} strings",
            f"at most {caps.max_stop_strings} are allowed",
        )
    for index, text in enumerate(strings):
        if not 1 <= len(text) <= caps.max_stop_chars:
            raise InvalidRequest(
                f"stop.stop[{index}]",
                f"{len(text)} characters",
                f"1 to {caps.max_stop_chars} are allowed",
            )
