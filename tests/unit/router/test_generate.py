"""Requests that go well, and what their answers say."""

import asyncio

import pytest
from twinpool.v1 import inference_pb2

from service.errors import Unavailable
from tests.unit.router.fakes import LENGTH, STOP
from tests.unit.router.served import END, TOKENIZER
from tests.unit.router.system import collect, error_of, pair, running, text_of, until


async def test_tokens_of_prefill_and_decode_reach_the_client_in_order() -> None:
    async with pair() as (system, prefill, decode):
        messages = await collect(system.generate(max_new_tokens=11))
        await system.settled()
    assert text_of(messages) == "hello world"
    assert [i for m in messages for i in m.token_ids] == decode.answer
    assert messages[-1].finish_reason == LENGTH
    assert messages[-1].usage.prompt_tokens == len("say hello")
    assert messages[-1].usage.completion_tokens == 11
    stats = messages[-1].stats
    assert (stats.prefill_instance, stats.decode_instance) == ("prefill", "decode")
    assert (stats.kv_bytes, stats.kv_transport, stats.retries) == (4096, "fake/memory", 0)
    assert (stats.prefill_s, stats.handoff_s) == (0.25, 0.125)
    assert decode.aborted == prefill.aborted == []


async def test_all_messages_of_an_answer_carry_the_request_id_the_pools_know() -> None:
    async with pair() as (system, prefill, decode):
        messages = await collect(system.generate(max_new_tokens=4))
        [request_id] = {m.request_id for m in messages}
        assert [f"{s.request_id:016x}" for s in prefill.starts] == [request_id]
        assert [f"{r:016x}" for r in decode.reserves] == [request_id]


async def test_prefill_hears_whose_request_it_is_and_what_it_shares() -> None:
    async with pair() as (system, prefill, _):
        await collect(system.generate(max_new_tokens=1, tenant="a team", cache_salt="a user"))
        [start] = prefill.starts
        assert (start.tenant, start.cache_salt) == ("a team", "a user")


async def test_first_token_does_not_wait_for_the_reservation_or_the_transfer() -> None:
    async with pair() as (system, prefill, decode):
        decode.reserve_gate.clear()
        prefill.transfer_gate.clear()
        call = system.generate(max_new_tokens=3)
        first = await call.read()
        assert list(first.token_ids) == decode.answer[:1]
        decode.reserve_gate.set()
        prefill.transfer_gate.set()
        assert text_of([first, *await collect(call)]) == "hel"
        await system.settled()


async def test_one_token_needs_no_decode_instance() -> None:
    async with running() as system:
        prefill = await system.add_prefill()
        messages = await collect(system.generate(max_new_tokens=1))
        assert text_of(messages) == "h"
        assert not prefill.starts[0].transfer
        assert messages[-1].finish_reason == LENGTH
        assert messages[-1].stats.decode_instance == ""
        await system.settled()


async def test_answer_that_ends_with_its_first_token_gives_the_reservation_back() -> None:
    async with pair() as (system, prefill, decode):
        prefill.answer = [END]
        prefill.first_finish = STOP
        [message] = await collect(system.generate(max_new_tokens=8))
        assert message.finish_reason == STOP
        assert (message.text, list(message.token_ids)) == ("", [END])
        await system.settled()
        assert decode.aborted == list(decode.reserves)


async def test_logprobs_pass_through() -> None:
    async with pair() as (system, _, decode):
        messages = await collect(system.generate(max_new_tokens=3, logprobs=1))
    positions = [p for m in messages for p in m.logprobs]
    assert [p.chosen.token_id for p in positions] == decode.answer[:3]
    assert [len(p.top) for p in positions] == [1, 1, 1]


@pytest.mark.parametrize("tokens_per_step", [1, 3, 16])
async def test_stop_string_across_steps_ends_the_answer_before_it(tokens_per_step: int) -> None:
    async with pair() as (system, _, decode):
        decode.tokens_per_step = tokens_per_step
        messages = await collect(system.generate(max_new_tokens=200, stop=["o wor"]))
        assert text_of(messages) == "hell"
        assert messages[-1].finish_reason == STOP
        # What the step made beyond the stop string was generated all the same.
        tokens = [i for m in messages for i in m.token_ids]
        assert len(tokens) == messages[-1].usage.completion_tokens >= len("hello wor")
        await system.settled()
        assert decode.aborted == list(decode.reserves)


async def test_text_that_only_began_like_a_stop_string_comes_in_the_end() -> None:
    async with pair() as (system, _, _):
        messages = await collect(system.generate(max_new_tokens=11, stop=["world!"]))
    assert text_of(messages) == "hello world"
    assert messages[-1].finish_reason == LENGTH


async def test_stop_strings_wait_for_min_new_tokens() -> None:
    async with pair() as (system, _, _):
        messages = await collect(
            system.generate(max_new_tokens=30, min_new_tokens=9, stop=["lo", "ell"])
        )
    assert text_of(messages) == "hello worldh"


async def test_seed_is_drawn_where_chance_plays_a_part_and_only_there() -> None:
    async with pair() as (system, prefill, decode):
        await collect(system.generate(max_new_tokens=2, temperature=0.7))
        await collect(system.generate(max_new_tokens=2, temperature=0.7, seed=5))
        await collect(system.generate(max_new_tokens=2))
        drawn, given, greedy = (start.sampling for start in prefill.starts)
        reserved = [r.sampling.seed for r in decode.reserves.values()]
    assert drawn.HasField("seed")
    assert given.seed == 5
    assert not greedy.HasField("seed")
    assert reserved[:2] == [drawn.seed, 5]


async def test_prompt_goes_to_decode_only_where_sampling_looks_at_it() -> None:
    async with pair() as (system, _, decode):
        await collect(system.generate(max_new_tokens=2))
        await collect(system.generate(max_new_tokens=2, repetition_penalty=1.5))
        plain, penalized = decode.reserves.values()
    assert not plain.prompt_token_ids
    assert list(penalized.prompt_token_ids) == TOKENIZER.encode("say hello")


async def test_unset_max_new_tokens_is_clipped_to_what_the_pools_hold() -> None:
    async with pair(default_max_new_tokens=4000) as (system, _, decode):
        decode.step_gate.clear()
        call = system.generate()
        await until(lambda: bool(decode.reserves))
        [reserve] = decode.reserves.values()
        # 64 blocks of 16 tokens are less than the model's context of 4096.
        assert reserve.stop.max_new_tokens == 64 * 16 - len("say hello")
        call.cancel()
        await system.settled()


async def test_messages_and_token_ids_are_prompts_too() -> None:
    async with pair() as (system, prefill, _):
        chat = inference_pb2.GenerateRequest()
        chat.prompt.messages.messages.add(role="user", content="hi")
        chat.stop.max_new_tokens = 1
        ids = inference_pb2.GenerateRequest()
        ids.prompt.token_ids.ids.extend([3, 1, 2])
        ids.stop.max_new_tokens = 1
        await collect(system.inference.Generate(chat))
        await collect(system.inference.Generate(ids))
        sent = [list(start.prompt_token_ids) for start in prefill.starts]
    assert sent == [TOKENIZER.encode("hi"), [3, 1, 2]]


async def test_long_text_is_tokenized_off_the_event_loop() -> None:
    async with pair() as (system, _, _):
        prompt = inference_pb2.Prompt(text="word " * 100_000)
        counting = asyncio.ensure_future(
            system.inference.CountTokens(inference_pb2.CountTokensRequest(prompt=prompt))
        )
        messages = await collect(system.generate(max_new_tokens=2))
        assert text_of(messages) == "he"
        assert (await counting).tokens == 500_000


async def test_describe_says_what_may_be_asked_for() -> None:
    async with pair() as (system, _, _):
        described = await system.inference.Describe(inference_pb2.DescribeRequest())
    assert described.model == "echo"
    assert described.has_chat_template
    assert described.max_model_len == 4096
    assert described.max_request_tokens == 64 * 16


async def test_without_instances_every_call_is_unavailable_at_once() -> None:
    async with running(restart_grace_s=600) as system:
        error = await error_of(system.generate())
        assert isinstance(error, Unavailable)
        assert error.reason == "NO_INSTANCE"
        described = system.inference.Describe(inference_pb2.DescribeRequest())
        assert isinstance(await error_of(described), Unavailable)
