"""What goes over the wire for each call, and what comes back from each message."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import twinpool
from twinpool import GenerateOptions, InvalidRequest, Message, Prompt
from twinpool.v1.common_pb2 import PositionLogprobs, TokenLogprob
from twinpool.v1.inference_pb2 import GenerateRequest, GenerateResponse
from twinpool.wire import OPTIONS, chunk, generate_request, trace_metadata, wire_prompt


def test_text_messages_and_ids_each_have_their_place() -> None:
    assert wire_prompt("Hi").text == "Hi"
    messages: list[Message | dict[str, str]] = [
        {"role": "system", "content": "Be brief."},
        Message("user", "Hi"),
    ]
    wired = wire_prompt(messages)
    assert [(m.role, m.content) for m in wired.messages.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]
    assert wire_prompt([1, 2]).token_ids.ids == [1, 2]
    assert wire_prompt(range(3)).token_ids.ids == [0, 1, 2]
    assert wire_prompt([]).WhichOneof("kind") == "token_ids"


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        b"Hi",
        {"role": "user", "content": "Hi"},
        [1, "a"],
        [1.0],
        [None],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "Hi", "name": "Bo"}],
        [Message("user", "Hi"), 1],
        [Message("user", None)],  # type: ignore[arg-type]
    ],
)
def test_prompt_of_a_wrong_type_is_a_type_error(prompt: Any) -> None:
    with pytest.raises(TypeError):
        wire_prompt(prompt)


def test_every_option_reaches_its_field() -> None:
    options: GenerateOptions = {
        "max_new_tokens": 5,
        "min_new_tokens": 1,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.25,
        "min_p": 0.125,
        "repetition_penalty": 2.0,
        "presence_penalty": -1.5,
        "frequency_penalty": 0.75,
        "seed": 2**64 - 1,
        "logprobs": 3,
        "stop": ["a", "b"],
        "stop_token_ids": (7, 8),
        "ignore_eos": True,
        "priority": -2,
        "cache_salt": "someone",
        "tenant": "a team",
        "model": "tiny",
        "timeout_s": 1.0,
    }
    request = generate_request("Hi", options)
    sent = {
        name: getattr(message, name)
        for message in (request.sampling, request.stop)
        for name in message.DESCRIPTOR.fields_by_name
    }
    sent |= {"cache_salt": request.cache_salt, "tenant": request.tenant}
    sent |= {"priority": request.priority, "model": request.model, "timeout_s": 1.0}
    sent |= {"stop": list(sent["stop"]), "stop_token_ids": tuple(sent["stop_token_ids"])}
    assert sent == options
    beside = {"traceparent", "tracestate"}
    assert set(options) | beside == OPTIONS == set(get_type_hints(GenerateOptions))


def test_what_is_left_out_is_left_to_the_server() -> None:
    request = generate_request("Hi", {"temperature": None, "stop": None, "max_new_tokens": None})
    assert request == GenerateRequest(prompt=wire_prompt("Hi"))
    zero = generate_request("Hi", {"temperature": 0.0, "logprobs": 0})
    assert zero.sampling.HasField("temperature")
    assert zero.sampling.HasField("logprobs")


def test_one_stop_string_may_stand_alone() -> None:
    assert generate_request("Hi", {"stop": "END"}).stop.stop == ["END"]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "hot"},
        {"temperature": [1.0]},
        {"top_k": 1.5},
        {"stop": 5},
        {"stop": [1]},
        {"stop_token_ids": ["a"]},
        {"model": 3},
    ],
)
def test_option_of_a_wrong_type_is_named(options: Any) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        generate_request("Hi", options)


def test_unknown_option_is_named_with_those_there_are() -> None:
    with pytest.raises(TypeError, match=r"no option 'max_tokens'.*max_new_tokens.*timeout_s"):
        generate_request("Hi", {"max_tokens": 5})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("Hi", {"top_k": -1}, "sampling.top_k"),
        ("Hi", {"seed": 2**64}, "sampling.seed"),
        ("Hi", {"max_new_tokens": -5}, "stop.max_new_tokens"),
        ("Hi", {"stop_token_ids": [-1]}, "stop.stop_token_ids"),
        ([3, -1], {}, "prompt.token_ids"),
        ("a\ud800", {}, "prompt.text"),
        ([{"role": "user", "content": "\ud800"}], {}, "prompt.messages[0].content"),
    ],
)
def test_value_that_the_wire_cannot_hold_is_an_invalid_request(
    prompt: Prompt, options: Any, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request(prompt, options)
    assert caught.value.field == field


def test_logprobs_come_with_their_position() -> None:
    chosen, other = TokenLogprob(token_id=1, logprob=-0.5), TokenLogprob(token_id=2, logprob=-1.5)
    message = GenerateResponse(logprobs=[PositionLogprobs(chosen=chosen, top=[chosen, other])])
    (position,) = chunk(message).logprobs
    assert (position.chosen.token_id, position.chosen.logprob) == (1, -0.5)
    assert [top.token_id for top in position.top] == [1, 2]


def test_finish_reason_of_a_newer_server_still_ends_the_answer() -> None:
    message = GenerateResponse()
    message.finish_reason = 99  # type: ignore[assignment]
    last = chunk(message)
    assert last.finish_reason == "other"
    assert last.usage is not None


def test_client_needs_grpc_and_protobuf_alone() -> None:
    folder = Path(twinpool.__file__).parent
    imported = set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module)
    outside = {n for n in imported if n.partition(".")[0] not in sys.stdlib_module_names}
    assert {n for n in outside if not n.startswith(("twinpool", "google.protobuf"))} == {"grpc"}


def test_import_loads_no_message_of_others() -> None:
    program = (
        "import twinpool, sys; print('google.rpc' in sys.modules, 'grpc_status' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_trace_goes_beside_the_request() -> None:
    options: GenerateOptions = {"traceparent": "00-ab-cd-01", "tracestate": None}
    assert trace_metadata(options) == (("traceparent", "00-ab-cd-01"),)
    assert generate_request("Hi", options) == generate_request("Hi", {})


@pytest.mark.parametrize("bad", ["00-\n", "\u00e9"])
def test_trace_that_no_header_can_hold_is_invalid(bad: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        trace_metadata({"traceparent": bad})
    assert caught.value.field == "traceparent"


def test_trace_that_is_no_text_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="traceparent"):
        trace_metadata({"traceparent": 5})  # type: ignore[typeddict-item]
