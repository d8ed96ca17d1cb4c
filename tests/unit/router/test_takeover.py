"""A router is lost in mid-answer: its client goes on at another one, and the answer is the same."""

from array import array
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from twinpool.v1 import inference_pb2

from service.errors import Incompatible, InvalidRequest, Refused, ServiceError
from service.security.settings import Security
from service.security.tokens import WorkerToken
from tests.unit.router.fakes import FakeDecode, FakePrefill
from tests.unit.router.served import TOKENIZER
from tests.unit.router.system import System, collect, error_of, pair, running, text_of, until

ID = "00000000abcdef00"
ANSWER = "hello world"
DIGEST = blake2b(array("I", TOKENIZER.encode("say hello")).tobytes(), digest_size=8).digest()


@asynccontextmanager
async def after(
    given: str, **settings: Any
) -> AsyncIterator[tuple[System, FakePrefill, FakeDecode, inference_pb2.Resumption]]:
    """A router beside the one that has given so much of its answer, and what a client says of it.

    The scripted answer's tokens are its characters.
    """
    async with pair(**settings) as (system, prefill, decode):
        terms = inference_pb2.Terms(
            max_new_tokens=11, model_fingerprint="f00d", prompt_digest=DIGEST
        )
        resume = inference_pb2.Resumption(
            request_id=ID,
            terms=terms,
            output_token_ids=decode.answer[: len(given)],
            text_chars=len(given),
        )
        yield system, prefill, decode, resume


def go_on(system: System, resume: inference_pb2.Resumption, **fields: Any) -> Any:
    request = inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text="say hello"), resume=resume
    )
    for name, value in fields.items():
        for part in (request.sampling, request.stop, request):
            if name in part.DESCRIPTOR.fields_by_name:
                if isinstance(value, list):
                    getattr(part, name).extend(value)
                else:
                    setattr(part, name, value)
                break
        else:
            raise AttributeError(name)
    return system.inference.Generate(request, timeout=20.0)


async def test_first_message_says_what_another_router_needs() -> None:
    async with pair() as (system, prefill, _):
        messages = await collect(system.generate(max_new_tokens=3, temperature=0.5))
        first, *others = messages
        [start] = prefill.starts
        assert start.sampling.HasField("seed")
        assert first.terms == inference_pb2.Terms(
            seed=start.sampling.seed,
            max_new_tokens=3,
            model_fingerprint="f00d",
            prompt_digest=DIGEST,
        )
        assert not any(message.HasField("terms") for message in others)


async def test_answer_goes_on_where_its_client_has_it() -> None:
    async with after("hello") as (system, prefill, decode, resume):
        messages = await collect(go_on(system, resume, logprobs=1, min_new_tokens=7))
        assert text_of(messages) == " world"
        assert [t for m in messages for t in m.token_ids] == decode.answer[5:]
        assert len([p for m in messages for p in m.logprobs]) == 6
        assert {m.request_id for m in messages} == {ID}
        usage, stats = messages[-1].usage, messages[-1].stats
        assert (usage.prompt_tokens, usage.completion_tokens) == (len("say hello"), 11)
        assert (stats.moves, stats.retries) == (0, 0)
        assert stats.prefill_s > 0
        [start] = prefill.starts
        assert start.output_tokens == 5
        assert list(start.prompt_token_ids[-5:]) == decode.answer[:5]
        assert (start.stop.max_new_tokens, start.stop.min_new_tokens) == (11, 7)
        # What the lost router did under the first id may not have ended in the pools.
        assert f"{start.request_id:016x}" != ID
        await system.settled()


async def test_drawn_answer_goes_on_with_the_seed_of_its_first_router() -> None:
    async with after("he") as (system, prefill, _, resume):
        resume.terms.seed = 77
        await collect(go_on(system, resume, temperature=1.0))
        assert prefill.starts[0].sampling.seed == 77
        await system.settled()


async def test_answer_counts_once_and_its_first_token_not_again() -> None:
    async with after("hello") as (system, _, _, resume):
        await collect(go_on(system, resume))
        await system.settled()
        read = system.sample
        assert read("twinpool_router_taken_over_requests_total") == 1
        assert read("twinpool_router_tokens_total", {"kind": "completion"}) == 11
        assert read("twinpool_time_to_first_token_seconds_count") == 0


@pytest.mark.parametrize("given", ["hello", "hello w", "hello wor"])
async def test_stop_string_that_spans_the_loss_ends_the_answer(given: str) -> None:
    async with after(given) as (system, _, _, resume):
        resume.text_chars = min(len(given), len("hello "))  # the rest is held back
        messages = await collect(go_on(system, resume, stop=["world"]))
        assert text_of(messages) == "hello "[resume.text_chars :]
        await system.settled()


async def test_answer_that_moves_again_keeps_all_that_it_had() -> None:
    async with after("hel") as (system, prefill, first, resume):
        first.silent_after = 6
        second = await system.add_decode("second")
        call = go_on(system, resume)
        messages = [await call.read()]
        while sum(len(m.token_ids) for m in messages) < 3:
            messages.append(await call.read())
        await first.die()
        messages += await collect(call)
        assert text_of(messages) == ANSWER[3:]
        assert [start.output_tokens for start in prefill.starts] == [3, 6]
        assert messages[-1].usage.completion_tokens == 11
        assert second.reserves
        await system.settled()


async def test_one_that_has_begun_elsewhere_goes_ahead_of_those_that_wait() -> None:
    async with after("hello", max_queue=1) as (system, _, decode, resume):
        decode.step_gate.clear()
        holder = system.generate(max_new_tokens=1000)
        await until(lambda: bool(decode.reserves))
        waiting = system.generate(max_new_tokens=1000)
        await until(lambda: system.group.admission.queued == 1)
        resume.terms.max_new_tokens = 600
        call = go_on(system, resume)
        await until(lambda: system.group.admission.queued == 2)
        holder.cancel()
        await until(lambda: len(decode.reserves) == 2)
        decode.step_gate.set()
        assert len(text_of(await collect(call))) == 595
        waiting.cancel()
        await system.settled()


@pytest.mark.parametrize("forged", [False, True])
async def test_where_workers_have_a_token_only_a_router_can_have_an_answer_go_ahead(
    tmp_path: Path, forged: bool
) -> None:
    token = tmp_path / "worker.token"
    token.write_text("0123456789abcdef0123456789abcdef\n")
    async with AsyncExitStack() as stack:
        system = await stack.enter_async_context(running(max_queue=1, worker_token_file=token))
        security = Security(shows=WorkerToken(token))
        await system.add_prefill(security=security)
        decode = await system.add_decode(security=security)
        began = await collect(system.generate(max_new_tokens=900, temperature=1.0, tenant="a"))
        resume = inference_pb2.Resumption(
            request_id=began[0].request_id,
            terms=began[0].terms,
            output_token_ids=decode.answer[:5],
            text_chars=5,
        )
        assert len(resume.terms.proof) == 32
        decode.step_gate.clear()
        holder = system.generate(max_new_tokens=1000)
        await until(lambda: len(decode.reserves) == 2)
        waiting = system.generate(max_new_tokens=1000)
        await until(lambda: system.group.admission.queued == 1)
        call = go_on(system, resume, temperature=1.0, tenant="b" if forged else "a")
        if forged:
            error = await error_of(call)
            assert isinstance(error, Refused)
            assert error.reason == "QUEUE_FULL"
        else:
            await until(lambda: system.group.admission.queued == 2)
        for other in (call, waiting, holder):
            other.cancel()
        await system.settled()


async def test_tenants_cap_holds_for_what_another_router_began() -> None:
    async with after("hello", max_tenant_requests={"*": 1}) as (system, _, decode, resume):
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=9, tenant="a")
        await until(lambda: bool(decode.reserves))
        error = await error_of(go_on(system, resume, tenant="a"))
        assert isinstance(error, Refused)
        assert error.reason == "TENANT_CAP"
        call.cancel()
        await system.settled()


@pytest.mark.parametrize(
    ("field", "value", "kind", "named"),
    [
        ("request_id", "secret", InvalidRequest, "resume.request_id"),
        ("output_token_ids", [], InvalidRequest, "resume.output_token_ids"),
        ("output_token_ids", [1] * 11, InvalidRequest, "resume.output_token_ids"),
        ("output_token_ids", [1, 257], InvalidRequest, "resume.output_token_ids[1]"),
        ("text_chars", 4, Incompatible, "RESUME_MISMATCH"),
        ("model_fingerprint", "beef", Incompatible, "RESUME_MISMATCH"),
        ("prompt_digest", b"another", Incompatible, "RESUME_MISMATCH"),
        ("max_new_tokens", 0, InvalidRequest, "stop.max_new_tokens"),
    ],
)
async def test_what_cannot_be_gone_on_with_is_refused(
    field: str, value: Any, kind: type[ServiceError], named: str
) -> None:
    async with after("hello") as (system, prefill, _, resume):
        part = resume.terms if field in resume.terms.DESCRIPTOR.fields_by_name else resume
        if isinstance(value, list):
            del getattr(part, field)[:]
            getattr(part, field).extend(value)
        else:
            setattr(part, field, value)
        error = await error_of(go_on(system, resume))
        assert isinstance(error, kind)
        assert named in (error.reason, getattr(error, "field", ""))
        assert not prefill.starts
        await system.settled()


async def test_drawn_answer_without_its_seed_is_refused() -> None:
    async with after("hello") as (system, _, _, resume):
        error = await error_of(go_on(system, resume, temperature=0.5))
        assert isinstance(error, InvalidRequest)
        assert error.field == "resume.terms.seed"


async def test_answer_that_has_ended_is_refused() -> None:
    async with after("hello") as (system, _, _, resume):
        error = await error_of(go_on(system, resume, stop=["ell"]))
        assert isinstance(error, InvalidRequest)
        assert error.field == "resume.output_token_ids"
