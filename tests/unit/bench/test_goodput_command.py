"""The goodput benchmark from its command line, against a server in another thread."""

import asyncio
import gc
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bench.goodput import app
from bench.goodputs.config import GoodputConfig
from bench.goodputs.records import read
from bench.goodputs.slo import MLPERF
from service.config import load
from tests.unit.bench import goodput_servers
from tests.unit.bench.goodput_servers import Script
from tests.unit.client.fake_router import FakeRouter, running_server

ROOT = Path(__file__).parents[3]
SHORT = ("--prompt-tokens", "5", "--output-tokens", "2", "--warmup", "100ms", "--duration", "500ms")


@pytest.fixture(autouse=True)
def _garbage_is_collected_as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """Run a server in a thread of its own: the command has a loop of its own, too."""
    found: list[str] = []
    is_up = threading.Event()
    loop = asyncio.new_event_loop()
    end = asyncio.Event()

    async def serve() -> None:
        async with goodput_servers.openai(script) as url:
            found.append(url)
            is_up.set()
            await end.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert is_up.wait(30)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()


def measured(url: str, out: Path, *options: str) -> Result:
    common = ("--backend", "openai", "--url", url, "--out", str(out), *SHORT)
    return CliRunner().invoke(app, [*common, *options])


def rows_of(file: Path) -> dict[str, float]:
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return {row["row"]: row["ours"] for row in rows}


def test_a_run_leaves_records_figures_and_a_report(tmp_path: Path) -> None:
    script = Script(ttft_s=0.01, tpot_s=0.01)
    file = tmp_path / "figures.json"
    with serving(script) as url:
        done = measured(
            url,
            tmp_path / "out",
            *("--rate", "30", "--slo", "llama2-70b-server", "--burstiness", "inf"),
            "--json",
            str(file),
        )
    assert done.exit_code == 0, done.output
    found = rows_of(file)
    assert found["attainment"] == 100
    assert 5 < found["submitted"] == found["finished"] < 18
    assert found["TTFT p50"] >= 10
    assert rows_of(tmp_path / "out" / "figures.json") == found
    records = read(tmp_path / "out" / "records.jsonl")
    # The first, which is asked alone, is none of them.
    assert len(records) == 18 == len(script.came_s) - 1
    assert f"100.0% of {found['submitted']} kept their limits" in done.output
    again = load(
        "goodput", GoodputConfig, flags={}, environ={}, file=tmp_path / "out" / "settings.json"
    )
    assert again.config.limits == MLPERF["llama2-70b-server"]
    assert again.config.burstiness == math.inf
    report = (tmp_path / "out" / "report.html").read_text()
    assert "TTFT 2 s, TPOT 0.2 s" in report
    assert "<svg" in report


def test_limits_beyond_reach_end_the_search_with_what_was_attained(tmp_path: Path) -> None:
    with serving(Script(ttft_s=0.01)) as url:
        options = ("--search", "--rate", "40", "--lowest", "20", "--ttft", "5ms", "--tpot", "1s")
        done = measured(url, tmp_path / "out", *options, "--no-plots")
    assert done.exit_code == 1
    assert "No rate down to 20 requests/s has 90% keep TTFT 0.005 s, TPOT 1 s" in done.output
    assert "TTFT alone by 0.0%" in done.output
    assert "a request alone takes" in done.output
    assert {record.rate for record in read(tmp_path / "out" / "records.jsonl")} == {20.0, 40.0}
    assert rows_of(tmp_path / "out" / "figures.json")["highest rate of 90% attainment"] == 0


def test_a_server_that_breaks_off_ends_with_its_words_and_the_records(tmp_path: Path) -> None:
    script = Script()
    with serving(script) as url:
        done = measured(url, tmp_path / "out", "--rates", "20,40", "--no-plots")
        assert done.exit_code == 0, done.output
        script.refuses = True
        refused = measured(url, tmp_path / "refused", "--rate", "20", "--no-plots")
    assert refused.exit_code == 1
    assert "HTTP 429" in refused.output
    gone = measured(url, tmp_path / "gone", "--rate", "20", "--no-plots")
    assert gone.exit_code == 1
    assert "the connection broke" in gone.output
    again = measured(url, tmp_path / "out", "--rate", "20")
    assert again.exit_code == 1
    assert "is there already" in again.output


def test_a_search_that_breaks_off_names_no_rate(tmp_path: Path) -> None:
    row = {"input_length": 9, "output_length": 2, "hash_ids": [1]}
    lines = [json.dumps(row | {"timestamp": 10 * number}) + "\n" for number in range(30)]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    options = ("--trace", str(tmp_path / "few.jsonl"), "--search", "--rate", "40", "--ttft", "9s")
    with serving(Script()) as url:
        done = measured(url, tmp_path / "out", *options, "--no-plots", "--runs", "1")
    assert done.exit_code == 1
    assert "take 48 requests, the workload has 30" in done.output
    assert "did not come to its end" in done.output
    assert not any(name.startswith("highest") for name in rows_of(tmp_path / "out/figures.json"))


def test_what_can_not_be_drawn_is_said_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = measured("http://127.0.0.1:1", tmp_path / "out", "--rate", "1")
    assert done.exit_code == 1
    assert "needs matplotlib" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--rate: is required"),
        (("--rate", "1", "--url", "http://a:1"), "--url: .*is for --backend openai"),
        (("--rate", "0"), "--rate: found '0'.*greater than 0"),
        (("--rates", "1,x"), "--rates: .*valid number"),
        (("--rate", "1", "--rates", "2"), "--rates: cannot be given with --rate"),
        (("--search",), "--search: needs limits"),
        (("--rate", "1", "--ttft", "500"), "--ttft: found '500'.*with a unit"),
        (("--rate", "1", "--tpot", "0ms"), "--tpot: .*greater than 0"),
        (("--rate", "1", "--slo", "fast"), "--slo: .*one of llama2-70b-server"),
        (("--rate", "1", "--prompt-tokens", "uniform:9"), "--prompt-tokens: .*must be"),
        (("--workload", "azure-code"), "--traces: is required"),
        (("--search", "--ttft", "1s", "--lowest", "2000"), "--lowest: is above --highest"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(app, list(options))
    assert done.exit_code == 2
    assert re.search(said, done.output), done.output


def test_a_bad_trace_or_address_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    options = ("--out", str(tmp_path / "out"), "--no-plots")
    bad = CliRunner().invoke(app, ["--trace", str(tmp_path / "bad.jsonl"), *options])
    assert bad.exit_code == 1
    assert "line 1: has no field timestamp, input_length" in bad.output
    row = {"timestamp": 0, "input_length": 9, "output_length": 2, "hash_ids": [1]}
    (tmp_path / "few.jsonl").write_text(json.dumps(row) + "\n")
    script = Script()
    with serving(script) as url:
        few = measured(
            url,
            tmp_path / "few",
            "--trace",
            str(tmp_path / "few.jsonl"),
            "--rates",
            "9,18",
            "--no-plots",
        )
    assert few.exit_code == 1
    assert "take 5 requests, the workload has 1" in few.output
    assert not script.came_s
    nowhere = measured("nowhere", tmp_path / "out", "--rate", "1", "--no-plots")
    assert nowhere.exit_code == 1
    assert "found 'nowhere'; must be as http://" in nowhere.output


def test_the_command_asks_a_router(tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")])}
    router = FakeRouter()
    with running_server(router):
        command = [sys.executable, "-m", "launch", "bench", "goodput", "--url", router.address]
        command += [*SHORT, "--rate", "20", "--out", str(tmp_path / "out"), "--no-plots"]
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "100.0% of" in done.stderr
    assert "request goodput" in done.stdout
    assert {request.stop.ignore_eos for request in router.requests} == {True}
    assert {len(request.prompt.token_ids.ids) for request in router.requests} == {5}
