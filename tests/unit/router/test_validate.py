"""What a request may ask for, and what it is told when it asks for more."""

import dataclasses
import math
from typing import Any

import pytest

from router.config import RouterConfig
from router.request import (
    GenerateInput,
    MessagesPrompt,
    Prompt,
    SamplingInput,
    StopInput,
    TextPrompt,
    TokensPrompt,
    ValidRequest,
)
from router.validate import ModelLimits, check, check_prompt, check_sampling
from service.errors import InvalidRequest, Refused

CAPS = dataclasses.replace(
    RouterConfig().caps, max_prompt_chars=1000, max_prompt_tokens=500, max_new_tokens=300
)
LIMITS = ModelLimits(
    vocab_size=100,
    max_model_len=400,
    known_roles=frozenset({"user", "system"}),
    largest_prompt=350,
    largest_request=380,
)


def checked(
    prompt_tokens: int = 10, *, limits: ModelLimits = LIMITS, **fields: Any
) -> ValidRequest:
    sampling = {f.name for f in dataclasses.fields(SamplingInput)}
    request = GenerateInput(
        prompt=None,
        sampling=SamplingInput(**{k: v for k, v in fields.items() if k in sampling}),
        stop=StopInput(**{k: v for k, v in fields.items() if k not in sampling}),
    )
    return check(request, (1,) * prompt_tokens, limits, CAPS)


def test_defaults_are_greedy_and_clipped() -> None:
    request = checked(10)
    assert request.sampling.temperature == 0.0
    assert request.sampling.top_p == request.sampling.repetition_penalty == 1.0
    assert request.sampling.logprobs is None
    assert request.stop.max_new_tokens == 300
    assert checked(200).stop.max_new_tokens == 180
    assert checked(200, limits=dataclasses.replace(LIMITS, largest_request=None)).need == (
        dataclasses.replace(checked(200).need, max_new_tokens=200)
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 100.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.5),
        ("presence_penalty", -math.inf),
        ("frequency_penalty", -2.5),
        ("logprobs", 21),
    ],
)
def test_sampling_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match="allowed") as caught:
        check_sampling(SamplingInput(**{field: value}), CAPS)  # type: ignore[arg-type]
    assert caught.value.field == f"sampling.{field}"
    assert caught.value.found == f"{value:g}"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_new_tokens": 0}, "stop.max_new_tokens"),
        ({"max_new_tokens": 301}, "stop.max_new_tokens"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "stop.min_new_tokens"),
        ({"stop": ("a",) * 17}, "stop.stop"),
        ({"stop": ("a", "")}, "stop.stop[1]"),
        ({"stop": ("a" * 257,)}, "stop.stop[0]"),
        ({"stop_token_ids": (3, 100)}, "stop.stop_token_ids[1]"),
        ({"stop_token_ids": (3,) * 65}, "stop.stop_token_ids"),
    ],
)
def test_stop_values_out_of_range_are_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked(**fields)
    assert caught.value.field == field


def test_bounds_themselves_are_allowed() -> None:
    request = checked(
        100,
        temperature=100.0,
        top_p=1.0,
        min_p=1.0,
        presence_penalty=-2.0,
        logprobs=20,
        max_new_tokens=280,
        min_new_tokens=280,
        stop=("a" * 256,),
        stop_token_ids=(99,),
        seed=2**64 - 1,
    )
    assert request.need.total_tokens == 380


@pytest.mark.parametrize("tokens", [0, 400, 501])
def test_prompt_that_the_model_cannot_take_is_invalid(tokens: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked(tokens)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(("tokens", "new"), [(360, 1), (300, 90)])
def test_request_that_no_instance_can_hold_is_refused_for_good(tokens: int, new: int) -> None:
    with pytest.raises(Refused, match="ask for fewer tokens") as caught:
        checked(tokens, max_new_tokens=new)
    assert caught.value.retry_after_s is None


def test_one_token_needs_no_room_at_decode() -> None:
    small = dataclasses.replace(LIMITS, largest_request=20)
    assert checked(300, limits=small, max_new_tokens=1).stop.max_new_tokens == 1


def test_prompt_ids_outside_the_vocabulary_are_named() -> None:
    with pytest.raises(InvalidRequest, match="0 to 99") as caught:
        check(GenerateInput(prompt=None), (1, 200, 3), LIMITS, CAPS)
    assert caught.value.field == "prompt.token_ids[1]"
    assert caught.value.found == "200"


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (None, "prompt"),
        (TextPrompt(""), "prompt.text"),
        (TextPrompt("a" * 1001), "prompt.text"),
        (TokensPrompt(()), "prompt.token_ids"),
        (MessagesPrompt(()), "prompt.messages"),
        (MessagesPrompt((("user", ""),)), "prompt.messages"),
        (MessagesPrompt((("user", "a"),) * 1025), "prompt.messages"),
        (MessagesPrompt((("user", "a"), ("wizard", "b"))), "prompt.messages[1].role"),
        (MessagesPrompt((("user", "a" * 600),) * 2), "prompt.messages"),
    ],
)
def test_prompts_that_make_no_sense_are_named(prompt: Prompt | None, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_prompt(prompt, LIMITS, CAPS)
    assert caught.value.field == field


def test_messages_need_a_chat_template() -> None:
    limits = dataclasses.replace(LIMITS, known_roles=None)
    with pytest.raises(InvalidRequest, match="no chat template"):
        check_prompt(MessagesPrompt((("user", "hi"),)), limits, CAPS)


@pytest.mark.parametrize("field", ["cache_salt", "tenant"])
def test_endless_name_is_refused(field: str) -> None:
    def checked(length: int) -> ValidRequest:
        named: dict[str, Any] = {field: "x" * length}
        return check(GenerateInput(prompt=None, **named), (1,), LIMITS, CAPS)

    assert getattr(checked(128), field) == "x" * 128
    with pytest.raises(InvalidRequest, match=f"{field}.*129 characters"):
        checked(129)
