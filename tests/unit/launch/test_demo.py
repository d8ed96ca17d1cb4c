"""The demonstration against a fake router that knows the answers."""

from collections.abc import AsyncIterator
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from twinpool import AsyncClient, TwinpoolError
from twinpool.v1 import inference_pb2 as pb
from twinpool.v1 import inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from twinpool.v1.common_pb2 import FINISH_REASON_STOP, ROLE_DECODE

from launch import demo
from launch.builtin import task
from launch.builtin.task import Example
from launch.cluster import Cluster
from service.lifecycle import Server

CONFIG = demo.DemoConfig(prompts=4, long_tokens=200)


class Inference(inference_pb2_grpc.InferenceServicer):
    """Answers from a table of prompts, one token a character."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        answer = self.answers[request.prompt.messages.messages[0].content]
        for character in answer:
            yield pb.GenerateResponse(text=character, token_ids=[ord(character)])
        yield pb.GenerateResponse(
            finish_reason=FINISH_REASON_STOP,
            usage=pb.Usage(prompt_tokens=9, completion_tokens=len(answer)),
            stats=pb.RequestStats(kv_bytes=1 << 20, kv_transport="ucx/posix"),
        )

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        raise NotImplementedError

    async def ListModels(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def CountTokens(
        self, request: pb.CountTokensRequest, context: Any
    ) -> pb.CountTokensResponse:
        raise NotImplementedError


class Membership(worker_pb2_grpc.MembershipServicer):
    """One decode instance that loses `leak` blocks after the first look."""

    def __init__(self, leak: int) -> None:
        self._leak = leak
        self._asked = 0

    async def GetStatus(
        self, request: worker_pb2.GetStatusRequest, context: Any
    ) -> worker_pb2.GetStatusResponse:
        status = worker_pb2.GetStatusResponse()
        free = 10 - (self._leak if self._asked else 0)
        self._asked += 1
        blocks = worker_pb2.BlockCounts(total=10, free=free)
        status.instances.add(name="decode-0", role=ROLE_DECODE, blocks=blocks)
        return status

    def Register(self, requests: Any, context: Any) -> Any:
        raise NotImplementedError

    async def Drain(self, request: Any, context: Any) -> worker_pb2.DrainResponse:
        raise NotImplementedError


def all_examples() -> tuple[list[Example], list[Example]]:
    """What the demonstration will ask: the examples it shows, and those it measures on."""
    rng = Random(CONFIG.seed)
    shown = [example for _, example in demo.showcase(rng, CONFIG.long_tokens)]
    return shown, demo.recall_examples(rng, CONFIG.prompts)


async def run_demo(
    monkeypatch: pytest.MonkeyPatch, *, wrong: tuple[str, ...] = (), leak: int = 0
) -> str:
    shown, measured = all_examples()
    answers = {e.prompt: e.answer for e in (*shown, *measured)} | dict.fromkeys(wrong, "0000")

    async def reference(folder: Any, prompts: list[str], **options: Any) -> list[dict[str, Any]]:
        assert prompts == [e.prompt for e in measured]
        return [{"text": e.answer, "token_ids": list(map(ord, e.answer))} for e in measured]

    monkeypatch.setattr(demo, "reference_answers", reference)
    monkeypatch.setattr(demo, "_SETTLE_TIMEOUT_S", 0.3)
    server = Server("router")
    server.add(
        inference_pb2_grpc.add_InferenceServicer_to_server,
        Inference(answers),
        "twinpool.v1.Inference",
    )
    server.add(
        worker_pb2_grpc.add_MembershipServicer_to_server, Membership(leak), "twinpool.v1.Membership"
    )
    console = Console(width=120, record=True, quiet=False)
    try:
        address = await server.start()
        cluster = cast(Cluster, SimpleNamespace(address=address))
        await demo.Demo(CONFIG, console).run(cluster)
    finally:
        await server.stop()
    return console.export_text()


async def test_right_answers_and_no_leak_are_all_right(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await run_demo(monkeypatch)
    assert text.rstrip().endswith("all right")
    rows = [line for line in text.splitlines() if "1.00 MiB" in line]
    assert len(rows) == 6
    assert all("right" in row and "ucx/posix" in row for row in rows)
    assert "100.0%" in text
    assert "4/4" in text


async def test_wrong_answer_fails_the_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, _ = all_examples()
    with pytest.raises(demo.DemoFailed, match="long recall: answered '0000'"):
        await run_demo(monkeypatch, wrong=(shown[0].prompt,))


async def test_recall_below_the_single_process_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    _, measured = all_examples()
    with pytest.raises(demo.DemoFailed, match="recall is 3/4 where one process has 4/4"):
        await run_demo(monkeypatch, wrong=(measured[1].prompt,))


async def test_leaked_blocks_fail_the_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(demo.DemoFailed, match="decode-0 has 3 blocks in use, 0 before"):
        await run_demo(monkeypatch, leak=3)


def test_examples_have_the_length_and_answers_that_the_task_promises() -> None:
    examples = dict(demo.showcase(Random(1), 4000))
    pairs = examples["long recall"].prompt.count(";")
    assert task.CHAT_TOKENS + task.QUESTION_TOKENS + task.PAIR_TOKENS * pairs > 3900
    assert examples["sum"].answer == "42"


async def test_refused_request_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(TwinpoolError):
            await demo.ask(client, "x", Example(task="talk", prompt="hi", answer="hello!"))
