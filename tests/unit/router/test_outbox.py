"""What waits for a slow client, and the levels and counts a router shows of itself."""

import asyncio

from prometheus_client import generate_latest

from router.config import RouterConfig
from router.outbox import Outbox
from router.request import AnswerPart, Finish, PositionLogprobs, TokenLogprob
from tests.unit.router.system import collect, pair


def part(text: str, tokens: int, finish: Finish | None = None) -> AnswerPart:
    chosen = TokenLogprob(tokens, -1.0)
    return AnswerPart(
        text=text,
        token_ids=(tokens,),
        logprobs=(PositionLogprobs(chosen=chosen, top=()),),
        finish=finish,
        completion_tokens=tokens,
    )


async def test_part_goes_out_alone_while_the_client_keeps_up() -> None:
    outbox = Outbox()
    waiting = asyncio.ensure_future(outbox.next())
    await asyncio.sleep(0)
    outbox.put(part("a", 1))
    assert await waiting == part("a", 1)
    outbox.put(part("b", 2))
    assert await outbox.next() == part("b", 2)


async def test_parts_that_piled_up_go_out_as_one() -> None:
    outbox = Outbox()
    for step in (part("a", 1), part("b", 2), part("c", 3, Finish.STOP)):
        outbox.put(step)
    outbox.close()
    joined = await outbox.next()
    assert joined is not None
    assert (joined.text, joined.token_ids, joined.finish) == ("abc", (1, 2, 3), Finish.STOP)
    assert [p.chosen.token_id for p in joined.logprobs] == [1, 2, 3]
    assert joined.completion_tokens == 3
    assert await outbox.next() is None


async def test_end_wakes_who_waits() -> None:
    outbox = Outbox()
    waiting = asyncio.ensure_future(outbox.next())
    await asyncio.sleep(0)
    outbox.close()
    assert await waiting is None


async def test_metrics_show_requests_times_and_the_ledger() -> None:
    async with pair() as (system, _, decode):
        await collect(system.generate(max_new_tokens=5))
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=100)
        await call.read()
        shown = generate_latest(system.registry).decode()
        call.cancel()
        await system.settled()
    for line in (
        'twinpool_router_requests_total{model_name="echo",outcome="finished"} 1.0',
        'twinpool_router_requests_total{model_name="echo",outcome="refused"} 0.0',
        'twinpool_router_tokens_total{kind="completion",model_name="echo"} 5.0',
        'twinpool_time_to_first_token_seconds_count{model_name="echo"} 2.0',
        'twinpool_time_per_output_token_seconds_count{model_name="echo"} 1.0',
        'twinpool_request_success_total{finished_reason="length",model_name="echo"} 1.0',
        'twinpool_request_success_total{finished_reason="abort",model_name="echo"} 0.0',
        'twinpool_request_prompt_tokens_sum{model_name="echo"} 9.0',
        'twinpool_request_generation_tokens_sum{model_name="echo"} 5.0',
        'twinpool_num_requests_running{model_name="echo"} 1.0',
        'twinpool_num_requests_waiting{model_name="echo"} 0.0',
        'twinpool_hop_seconds_sum{hop="prefill",model_name="echo"} 0.25',
        'twinpool_hop_seconds_sum{hop="handoff",model_name="echo"} 0.125',
        'twinpool_hop_seconds_count{hop="reserve",model_name="echo"} 1.0',
        'twinpool_hop_seconds_count{hop="decode_first_step",model_name="echo"} 1.0',
        'twinpool_router_ledger_blocks{model_name="echo",state="held"} 7.0',
        'twinpool_router_queue_depth{model_name="echo"} 0.0',
        'twinpool_router_open_requests{model_name="echo"} 1.0',
        'twinpool_router_ledger_total_blocks{model_name="echo"} 64.0',
        'twinpool_router_ledger_free_blocks{model_name="echo"} 57.0',
        'twinpool_router_retries_total{model_name="echo"} 0.0',
    ):
        assert line in shown.splitlines()


def test_defaults_bind_loopback_only() -> None:
    assert RouterConfig().host == "127.0.0.1"
