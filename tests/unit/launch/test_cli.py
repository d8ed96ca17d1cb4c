import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from twinpool.v1 import inference_pb2 as pb
from twinpool.v1 import inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from twinpool.v1.common_pb2 import FINISH_REASON_STOP, ROLE_DECODE, ROLE_PREFILL
from typer.testing import CliRunner, Result

from launch.cli import app
from service.errors import Refused
from service.lifecycle import Server

ROOT = Path(__file__).parents[3]


class Inference(inference_pb2_grpc.InferenceServicer):
    """Answers in two parts and keeps what it was asked."""

    def __init__(self, *, has_template: bool = True, error: Exception | None = None) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self._has_template = has_template
        self._error = error

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        if self._error is not None:
            raise self._error
        yield pb.GenerateResponse(request_id="00ff", text="hel", token_ids=[1])
        yield pb.GenerateResponse(
            request_id="00ff",
            text="lo",
            token_ids=[2],
            finish_reason=FINISH_REASON_STOP,
            usage=pb.Usage(prompt_tokens=3, completion_tokens=2),
            stats=pb.RequestStats(kv_bytes=4096, kv_transport="ucx/posix"),
        )

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        return pb.DescribeResponse(model="m", has_chat_template=self._has_template)

    async def ListModels(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def CountTokens(
        self, request: pb.CountTokensRequest, context: Any
    ) -> pb.CountTokensResponse:
        raise NotImplementedError


class Membership(worker_pb2_grpc.MembershipServicer):
    def __init__(self, *models: str) -> None:
        self._models = models or ("tiny",)

    """Knows one instance of each role."""

    async def GetStatus(
        self, request: worker_pb2.GetStatusRequest, context: Any
    ) -> worker_pb2.GetStatusResponse:
        status = worker_pb2.GetStatusResponse(router_id="router-1", version="0.1.0", uptime_s=61)
        for model in self._models:
            status.models.add(ready=model != "half").model.name = model
        status.missing.add(role=ROLE_DECODE, address="10.0.0.21:9102")
        status.requests.finished = 12
        status.requests.overcommitted, status.requests.outgrown = 8, 3
        for name, role in (("decode-0", ROLE_DECODE), ("prefill-0", ROLE_PREFILL)):
            blocks = worker_pb2.BlockCounts(
                total=100, free=77, cached=5, used=15, reserved=2, quarantined=1
            )
            status.instances.add(
                name=name, role=role, model=self._models[-1], layout="tp1", blocks=blocks
            )
        status.instances[0].draining = True
        status.instances[0].overcommit_risk = 0.0321
        status.instances[0].pairs.add(
            peer="decode-x",
            transport="tcp",
            rtt_s=3e-4,
            bytes_per_s=2.5e9,
            note="slow",
        )
        return status

    def Register(self, requests: Any, context: Any) -> Any:
        raise NotImplementedError

    async def Drain(self, request: Any, context: Any) -> worker_pb2.DrainResponse:
        raise NotImplementedError


@asynccontextmanager
async def router(
    inference: Inference | None = None, membership: Membership | None = None
) -> AsyncIterator[str]:
    server = Server("router")
    server.add(
        inference_pb2_grpc.add_InferenceServicer_to_server,
        inference or Inference(),
        "twinpool.v1.Inference",
    )
    server.add(
        worker_pb2_grpc.add_MembershipServicer_to_server,
        membership or Membership(),
        "twinpool.v1.Membership",
    )
    yield await server.start()
    await server.stop()


async def invoke(*args: str, stdin: str = "") -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, list(args), input=stdin)


# ---- help


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    source = (
        "import sys\n"
        "from launch.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'grpc', 'pydantic', 'rich', 'prefill'} & set(sys.modules)))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    for name in (
        "serve",
        "router",
        "prefill",
        "decode",
        "generate",
        "status",
        "plan",
        "simulate",
        "demo",
    ):
        assert f"\n  {name} " in output
    assert output.endswith("[]\n")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("serve", ["--port", "--threads", "--restart / --no-restart", "--config"]),
        ("router", ["--max-queue", "--log-json", "--print-config"]),
        ("prefill", ["MODEL", "--router", "--threads"]),
        ("decode", ["MODEL", "--router", "--data-port"]),
        ("generate", ["{prompt}", "--max-new-tokens", "--temperature", "--chat / --raw", "--stop"]),
        ("status", ["--router", "--json", "--watch"]),
        ("plan", ["MODEL", "--gpu", "--trace", "--ttft", "--json FILE"]),
        ("simulate", ["MODEL", "--gpu", "--prefill", "--colocated", "--json"]),
        ("demo", ["--prompts", "--long-tokens"]),
    ],
)
async def test_each_command_explains_its_options(command: str, flags: list[str]) -> None:
    result = await invoke(command, "--help")
    assert result.exit_code == 0
    assert all(flag in result.output for flag in flags)


def test_workers_help_and_settings_load_no_torch() -> None:
    source = (
        "import sys\n"
        "from launch.cli import app\n"
        "for args in (['prefill', '--help'], ['decode', '/m', '--print-config'], ['status'],\n"
        "             ['plan', '--help']):\n"
        "    try: app(args)\n"
        "    except SystemExit: pass\n"
        "print('torch' in sys.modules)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert output.endswith("False\n")


async def test_unknown_command_is_a_usage_error() -> None:
    result = await invoke("serv")
    assert result.exit_code == 2
    assert "serv" in result.stderr


# ---- generate


async def test_generate_prints_the_answer_and_asks_as_a_chat() -> None:
    inference = Inference()
    async with router(inference) as address:
        result = await invoke("generate", "hi", "--router", address, "--system", "be brief")
    assert (result.exit_code, result.stdout) == (0, "hello\n")
    messages = inference.requests[0].prompt.messages.messages
    assert [(m.role, m.content) for m in messages] == [("system", "be brief"), ("user", "hi")]


async def test_generate_passes_its_options_on() -> None:
    inference = Inference()
    options = ["--top-p", "0.25", "--top-k", "3", "--seed", "4"]
    options += ["--max-new-tokens", "5", "--temperature", "0.5"]
    async with router(inference) as address:
        await invoke(
            *("generate", "hi", "--router", address, "--raw", "--stop", "a", "--stop", "b"),
            *(*options, "--model", "m"),
        )
    request = inference.requests[0]
    assert request.model == "m"
    assert request.prompt.text == "hi"
    assert request.stop.max_new_tokens == 5
    assert list(request.stop.stop) == ["a", "b"]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.25)
    assert (sampling.top_k, sampling.seed) == (3, 4)


async def test_generate_sends_plain_text_where_the_model_has_no_template() -> None:
    inference = Inference(has_template=False)
    async with router(inference) as address:
        await invoke("generate", "-", "--router", address, stdin="from stdin")
    assert inference.requests[0].prompt.text == "from stdin"


async def test_generate_json_has_answer_usage_and_stats() -> None:
    async with router() as address:
        result = await invoke("generate", "hi", "--router", address, "--json")
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["token_ids"]) == ("hello", [1, 2])
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}
    assert answer["stats"]["kv_transport"] == "ucx/posix"
    assert answer["request_id"] == "00ff"


async def test_generate_shows_a_refusal_in_one_line() -> None:
    error = Refused("NEVER_FITS", needed=9, free=4)
    async with router(Inference(error=error)) as address:
        result = await invoke("generate", "hi", "--router", address)
    assert result.exit_code == 1
    assert result.stderr == f"twinpool: {error.message}\n"


@pytest.mark.parametrize("command", [("generate", "hi"), ("status",)])
async def test_router_that_is_not_there_is_one_line(command: tuple[str, ...]) -> None:
    result = await invoke(*command, "--router", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.stderr
    assert len(result.stderr.splitlines()) == 1


async def test_system_message_and_raw_text_exclude_each_other() -> None:
    result = await invoke("generate", "hi", "--raw", "--system", "x")
    assert result.exit_code == 2


# ---- status


async def test_status_shows_instances_blocks_and_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    async with router() as address:
        result = await invoke("status", "--router", address)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "model tiny" in result.stdout
    assert "12 finished" in result.stdout
    assert "3 of 8 reservations were outgrown" in result.stdout
    assert "lacks blocks: 3.2%" in result.stdout
    prefill = next(line for line in lines if "prefill-0" in line)
    decode = next(line for line in lines if "decode-0" in line)
    assert lines.index(prefill) < lines.index(decode)
    numbers = [cell.strip() for cell in prefill.split("│")[5:11]]
    assert numbers == ["77", "5", "2", "15", "1", "100"]
    assert "(draining)" in decode
    pair = next(line for line in lines if "decode-x" in line)
    cells = [cell.strip() for cell in pair.split("│")[1:-1]]
    assert cells == ["decode-0", "decode-x", "0", "tcp", "300 us", "2.50", "slow"]


async def test_status_says_which_named_instances_are_missing() -> None:
    async with router() as address:
        result = await invoke("status", "--router", address)
    assert "missing: decode instance at 10.0.0.21:9102" in result.stdout


async def test_status_of_several_models_tells_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    async with router(membership=Membership("tiny", "half")) as address:
        result = await invoke("status", "--router", address)
    lines = result.stdout.splitlines()
    for name, is_ready in (("tiny", True), ("half", False)):
        at = next(n for n, line in enumerate(lines) if line.startswith(f"model {name} "))
        assert "0 running" in lines[at + 1]
        assert ("not ready" in lines[at + 2]) is not is_ready
    [prefill] = [line for line in lines if "prefill-0" in line]
    assert [cell.strip() for cell in prefill.split("│")[1:4]] == ["half", "prefill", "prefill-0"]


async def test_status_json_is_the_whole_status() -> None:
    async with router() as address:
        result = await invoke("status", "--router", address, "--json")
    status = json.loads(result.stdout)
    assert status["requests"]["finished"] == 12
    assert status["instances"][0]["blocks"]["quarantined"] == 1
    assert status["instances"][0]["pairs"][0]["transport"] == "tcp"
