"""Processes that take turns."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from bench.sides import answers
from bench.sides.process import Side, SideFailed, environment, high_water_bytes, used_cpu_s

ECHO = """
import json, os, sys
for line in sys.stdin:
    asked = json.loads(line) | {"process": os.getpid()}
    if asked["do"] == "die":
        sys.exit("last words")
    if asked["do"] == "fill":
        kept = bytearray(b"x") * (asked["mib"] << 20)
        kept = None
    print(json.dumps({"error": "no"} if asked["do"] == "fail" else asked), flush=True)
"""
COMMAND = [sys.executable, "-c", ECHO]


def test_a_side_is_stopped_but_in_its_turn() -> None:
    with Side("echo", COMMAND, {}) as side:
        process = side.ask("say")["process"]
        told = os.waitid(os.P_PID, process, os.WSTOPPED | os.WNOWAIT)
        assert told is not None
        assert told.si_status == signal.SIGSTOP
        assert side.ask("say", word="y")["word"] == "y"


def test_an_error_and_an_end_are_told_with_the_last_words() -> None:
    with Side("echo", COMMAND, {}) as side:
        with pytest.raises(SideFailed, match="echo: no"):
            side.ask("fail")
        with pytest.raises(SideFailed, match="last words"):
            side.ask("die")
    with pytest.raises(SideFailed, match="cannot be run"):
        Side("nobody", ["/nowhere"], {})


def test_a_peak_is_remembered_until_it_is_to_be_forgotten() -> None:
    with Side("echo", COMMAND, {}) as side:
        side.ask("fill", mib=64)
        assert side.peak_bytes() > 64 << 20
        side.forget_peak()
        assert side.peak_bytes() < 64 << 20


def test_settings_reach_a_side_and_those_for_other_threads_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    show = "import json, os; input(); print(json.dumps(dict(os.environ)))"
    with Side("environment", [sys.executable, "-c", show], {"OMP_NUM_THREADS": "7"}) as side:
        found = side.ask("show")
    assert found["OMP_NUM_THREADS"] == "7"
    assert "OMP_WAIT_POLICY" not in found
    assert found["PATH"] == os.environ["PATH"]


def test_what_else_is_kept_from_a_side_is_said_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("UCX_TLS", "tcp")
    assert "UCX_TLS" not in environment({}, ("UCX_",))
    assert environment({}, ("UCX_",))["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_side_is_named_by_what_it_opens_as_and_ended_where_it_does_not_open() -> None:
    with Side("echo", COMMAND, {}).open(version="echo 1") as side:
        assert side.name == "echo 1"
    side = Side("echo", [sys.executable, "-c", 'input(); print(\'{"error": "no"}\')'], {})
    with pytest.raises(SideFailed, match="echo: no"):
        side.open()
    assert side.cpu_s() == 0


def test_memory_and_time_are_read_as_proc_tells_them(tmp_path: Path) -> None:
    status, stat = tmp_path / "status", tmp_path / "stat"
    status.write_text("Name:\tx\nVmHWM:\t      12 kB\nVmRSS:\t 5 kB\n")
    stat.write_text("1 (a ) b) S 2 3 4 5 6 7 8 9 10 11 300 20 0 0\n")
    assert high_water_bytes(status) == 12 * 1024
    assert used_cpu_s(stat) == 320 / os.sysconf("SC_CLK_TCK")
    assert high_water_bytes(tmp_path / "gone") == used_cpu_s(tmp_path / "gone") == 0


@pytest.mark.parametrize("name", ["answers", "servers", "tied", "vllm_side", "vllm_served_side"])
def test_what_runs_under_a_peers_interpreter_needs_nothing_of_this_project(name: str) -> None:
    source = Path(answers.__file__).with_name(f"{name}.py").read_text()
    assert not re.search(r"^(from|import) (bench|engine|service|twinpool)", source, re.MULTILINE)
