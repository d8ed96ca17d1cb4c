"""Each request leaves one line, with numbers and names and nothing of what was said."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twinpool.v1 import inference_pb2

from router import access_log
from router.access_log import AccessEntry, AccessLog
from service.errors import StartError
from tests.unit.router.system import collect, error_of, pair, until

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
METADATA = (("traceparent", f"00-{TRACE_ID}-00f067aa0ba902b7-01"),)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_line_tells_of_a_finished_request(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with pair(access_log=str(path)) as (system, prefill, _):
        messages = await collect(system.generate(max_new_tokens=5, tenant="a team", priority=3))
        await system.settled()
        await until(lambda: len(lines(path)) == 1)
        assert not [t for t in threading.enumerate() if t.name == "access-log" and not t.daemon]
    [line] = lines(path)
    assert line["request_id"] == messages[0].request_id
    told = ("method", "outcome", "reason", "tenant", "token", "model", "priority")
    assert [line[name] for name in told] == ["Generate", "finished", "", "a team", "", "echo", 3]
    assert (line["prompt_tokens"], line["output_tokens"]) == (len("say hello"), 5)
    assert (line["prefill_instance"], line["decode_instance"]) == ("prefill", "decode")
    assert (line["prefill_s"], line["handoff_s"], line["retries"]) == (0.25, 0.125, 0)
    assert 0 < line["ttft_s"] <= line["total_s"]
    assert line["reserve_s"] > 0
    assert len(line["trace_id"]) == 32
    assert line["time"] > 1.7e9
    assert "say" not in path.read_text()
    assert "hello" not in path.read_text()
    assert prefill.answer[0] not in line.values()


async def test_trace_of_the_client_reaches_the_line_and_the_instances(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with pair(access_log=str(path)) as (system, prefill, decode):
        heard: list[tuple[str, str]] = []
        for instance in (prefill, decode):
            instance.on_metadata = heard.extend
        request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="say hello"))
        request.stop.max_new_tokens = 3
        call = system.inference.Generate(request, timeout=20.0, metadata=METADATA)
        await collect(call)
        await until(lambda: len(lines(path)) == 1)
    assert lines(path)[0]["trace_id"] == TRACE_ID
    parents = [value for key, value in heard if key == "traceparent"]
    assert len(parents) == 2
    assert all(value.split("-")[1] == TRACE_ID for value in parents)


async def test_refused_invalid_and_aborted_requests_leave_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with pair(access_log=str(path)) as (system, _, decode):
        await error_of(system.generate(max_new_tokens=2000))
        await error_of(system.generate(max_new_tokens=3, temperature=-1.0))
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=5)
        await call.read()
        call.cancel()
        await until(lambda: len(lines(path)) == 3)
        await system.settled()
    ends = [(line["outcome"], line["reason"]) for line in lines(path)]
    assert ends == [("refused", "NEVER_FITS"), ("invalid", "INVALID_REQUEST"), ("aborted", "")]
    assert lines(path)[2]["output_tokens"] == 1


def test_log_goes_on_in_a_new_file_when_the_old_one_was_moved(tmp_path: Path) -> None:
    path, moved = tmp_path / "access.log", tmp_path / "access.log.1"
    log = AccessLog(str(path), on_lost=lambda: None)
    log.put(AccessEntry(request_id="one"))
    _wait(lambda: path.exists() and len(lines(path)) == 1)
    path.rename(moved)
    log.put(AccessEntry(request_id="two"))
    log.close()
    assert [line["request_id"] for line in lines(moved)] == ["one"]
    assert [line["request_id"] for line in lines(path)] == ["two"]
    assert path.stat().st_mode & 0o007 == 0


def test_lines_that_the_disk_cannot_follow_are_lost_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "_MOST_WAITING", 2)
    lost: list[None] = []
    stuck = threading.Event()
    log = AccessLog(str(tmp_path / "access.log"), on_lost=lambda: lost.append(None))
    monkeypatch.setattr(AccessLog, "_follow", lambda self: stuck.wait(20))
    log.put(AccessEntry())
    _wait(lambda: log._entries.empty())  # the thread has it, and is stuck
    for _ in range(5):
        log.put(AccessEntry())
    assert len(lost) == 3
    stuck.set()
    log.close()
    assert len(lines(tmp_path / "access.log")) == 3


def test_file_that_cannot_be_opened_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="--access-log"):
        AccessLog(str(tmp_path / "no" / "folder"), on_lost=lambda: None)


def test_dash_is_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    log = AccessLog("-", on_lost=lambda: None)
    log.put(AccessEntry(request_id="one", ttft_s=0.12345678))
    log.close()
    line = json.loads(capsys.readouterr().out)
    assert (line["request_id"], line["ttft_s"]) == ("one", 0.123457)
