"""Systems side by side: their processes, how they are asked, and the figures that come of it."""

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from bench import checkpoints, goodput_systems
from bench.goodputs import alone, contest, rows
from bench.goodputs.backend import Backend, Message, SendError, Served
from bench.goodputs.contest import beside
from bench.goodputs.joint import JointSearch
from bench.goodputs.loads import loads
from bench.goodputs.openai_backend import OpenAIBackend
from bench.goodputs.pair_backend import PairBackend
from bench.goodputs.programs import Program, running
from bench.goodputs.search import Search, Wanted
from bench.goodputs.slo import Slo
from bench.goodputs.systems import OURS, SYSTEMS, Machine, OpenBackend, System
from bench.goodputs.turns_backend import TurnsBackend
from bench.report import Row
from bench.workloads import traces
from bench.workloads.arrivals import Arrival, WorkloadError
from bench.workloads.prompts import Prompts
from bench.workloads.workload import Repaced
from tests.unit.bench import goodput_servers
from tests.unit.bench.goodput_servers import Script
from tests.unit.bench.test_goodput_figures import record

ROOT = Path(__file__).parents[3]
PROMPT = np.arange(7)
LOOSE, TIGHT = Slo(ttft_s=2.0, tpot_s=0.2), Slo(ttft_s=0.5, tpot_s=0.2)
CSV = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.1234567,50,20\n" for second in range(60)
)


def program(name: str, code: str, cores: tuple[int, ...] = ()) -> Program:
    return Program(name=name, command=(sys.executable, "-c", code), settings={}, cores=cores)


def test_a_server_has_its_cores_and_ends_with_who_started_it() -> None:
    core = min(os.sched_getaffinity(0))
    inner = "import os, time; print(os.sched_getaffinity(0), flush=True); time.sleep(600)"
    outer = (
        "import signal, sys; from bench.sides import servers;"
        f" servers.spawn([sys.executable, '-c', {inner!r}], signal.SIGTERM, cores=[{core}],"
        " says_to=sys.stdout); sys.stdin.readline()"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")])}
    with subprocess.Popen(
        [sys.executable, "-c", outer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environ,
        text=True,
    ) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == f"{{{core}}}\n"
        starter.kill()
        # The pipe ends when the last one that has it does.
        assert starter.stdout.read() == ""


def test_a_server_that_cannot_be_run_says_so(tmp_path: Path) -> None:
    missing = Program(name="none", command=("/nowhere",), settings={}, cores=())
    with (
        pytest.raises(RuntimeError, match=r"has ended with 1\n.*none\.log:\n.*/nowhere cannot be"),
        running([missing], lambda: False, tmp_path),
    ):
        pass


def test_programs_that_do_not_come_up_are_named_with_their_last_words(tmp_path: Path) -> None:
    well = program("well", "import time; print('all is well', flush=True); time.sleep(600)")
    ill = program("ill", "print('first'); raise SystemExit('no memory')")
    with (
        pytest.raises(RuntimeError, match="no memory") as failed,
        running([well, ill], lambda: False, tmp_path / "logs"),
    ):
        pass
    assert "first" in str(failed.value)
    assert "all is well" not in str(failed.value)


def test_programs_run_until_the_block_ends(tmp_path: Path) -> None:
    code = "import os, time; open('{}', 'w').write(str(os.getpid())); time.sleep(600)"
    files = [tmp_path / "one", tmp_path / "two"]
    with running(
        [program(file.name, code.format(file)) for file in files],
        lambda: all(file.exists() and file.read_text() for file in files),
        tmp_path,
    ):
        numbers = [int(file.read_text()) for file in files]
        for number in numbers:
            os.kill(number, 0)
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_what_fails_because_a_program_has_died_says_what_that_said(tmp_path: Path) -> None:
    up, go = tmp_path / "up", tmp_path / "go"
    code = (
        f"import os, time; open({str(up)!r}, 'w').write(str(os.getpid()))\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "print('out of memory')"
    )

    def ask() -> None:
        go.touch()
        os.waitid(os.P_PID, int(up.read_text()), os.WEXITED | os.WNOWAIT)
        raise SendError("lost", "no answer")

    with (
        pytest.raises(RuntimeError, match=r"no answer\n(.|\n)*out of memory"),
        running([program("brief", code)], lambda: up.exists() and bool(up.read_text()), tmp_path),
    ):
        ask()


async def answered(backend: Backend, tokens: int = 3) -> list[Message]:
    return [message async for message in backend.send(backend.prepare(PROMPT, tokens))]


async def test_a_pair_is_asked_in_two_steps_and_decode_told_what_prefill_said() -> None:
    where = {"remote_block_ids": [4, 2]}
    prefill, decode = Script(hands_over=where), Script()
    async with goodput_servers.openai(prefill) as first, goodput_servers.openai(decode) as second:
        backend = PairBackend(first, second)
        assert (await backend.describe()).max_context == 2048
        messages = await answered(backend)
        await backend.close()
    [asked] = prefill.questions
    assert (asked["max_tokens"], asked["stream"], asked["prompt"]) == (1, False, PROMPT.tolist())
    assert asked["kv_transfer_params"]["do_remote_decode"] is True
    [then] = decode.questions
    assert (then["max_tokens"], then["kv_transfer_params"]) == (3, where)
    assert then["prompt"] == PROMPT.tolist()
    assert [message.ends_prefill for message in messages] == [True, *[False] * 4]
    assert sum(message.has_tokens for message in messages) == 3
    assert messages[-1].usage == (7, 3)


async def test_a_prefill_that_hands_nothing_over_fails_the_request() -> None:
    decode = Script()
    async with goodput_servers.openai(Script()) as first, goodput_servers.openai(decode) as second:
        backend = PairBackend(first, second)
        await backend.describe()
        with pytest.raises(SendError, match="no kv_transfer_params"):
            await answered(backend)
        await backend.close()
    assert not decode.questions


async def test_servers_are_asked_in_turn() -> None:
    scripts = [Script(), Script()]
    async with contextlib.AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(goodput_servers.openai(it)) for it in scripts]
        backend = TurnsBackend([OpenAIBackend(url) for url in urls])
        await backend.describe()
        for tokens in range(1, 6):
            await answered(backend, tokens)
        await backend.close()
    asked = [[question["max_tokens"] for question in script.questions] for script in scripts]
    assert asked == [[1, 3, 5], [2, 4]]


class Handing:
    """A backend that tells when prefill has ended, or does not."""

    def __init__(self, *messages: Message) -> None:
        self._messages = messages
        self.prompts: list[list[int]] = []

    async def describe(self) -> Served:
        return Served(model="m", version="1")

    def prepare(self, prompt: NDArray[np.int64], output_tokens: int) -> None:
        self.prompts.append(prompt.tolist())

    async def send(self, prepared: Any) -> AsyncGenerator[Message]:
        for message in self._messages:
            yield message

    async def close(self) -> None:
        pass


TOKEN, FIRST_STEP = Message(has_tokens=True), Message(has_tokens=False, ends_prefill=True)
NOTHING = Message(has_tokens=False)


@pytest.mark.parametrize(
    "messages", [(TOKEN, NOTHING, TOKEN, TOKEN), (FIRST_STEP, NOTHING, TOKEN, TOKEN)]
)
async def test_a_hand_over_is_from_prefills_end_to_the_next_token(
    messages: tuple[Message, ...],
) -> None:
    backend = Handing(*messages)
    prompts = Prompts(seed=0, run=1, vocab_size=500)
    clock = itertools.count(0.0).__next__
    found = await alone.asked_alone(backend, prompts, 9, 3, clock)
    assert len(found) == 3
    assert len({tuple(prompt) for prompt in backend.prompts}) == alone.WARM_UP + 3
    first = 2 if messages[0].ends_prefill else 1  # the message that brings the first token
    for times in found:
        assert (times.ttft_s, times.next_s) == (first, 1)
        assert times.tpot_s == pytest.approx((3 - first) / (alone.NEW_TOKENS - 1))
    shown = alone.rows(9, found, hands_over=True)
    tpot_ms = 1000 * found[0].tpot_s
    assert [(row.row, row.ours) for row in shown] == [
        ("TTFT of one request, 9 tokens", 1000 * first),
        ("TPOT of one request, 9 tokens", pytest.approx(tpot_ms)),
        ("hand-over, 9 tokens", 1000),
        ("hand-over beyond a step, 9 tokens", pytest.approx(1000 - tpot_ms)),
    ]
    assert len(alone.rows(9, found, hands_over=False)) == 2


async def test_an_answer_of_one_message_shows_no_next_token() -> None:
    prompts = Prompts(seed=0, run=1, vocab_size=500)
    with pytest.raises(SendError, match="one message"):
        await alone.asked_alone(Handing(TOKEN), prompts, 9, 2)


def test_a_run_counts_for_all_limits_and_each_search_has_its_turn() -> None:
    search = JointSearch(
        {
            slo: Search(Wanted(runs=1), start=1.0, lowest=0.1, highest=100.0)
            for slo in (TIGHT, LOOSE)
        }
    )
    assert search.next() == 1.0
    search.add(1.0, [record(ttft_s=1.0) for _ in range(10)])
    assert search.next() == 2.0  # the loose ones'
    assert search.next() == 0.5  # the tight ones'
    search.add(0.5, [record(ttft_s=0.1) for _ in range(10)])
    best = {slo: found.best for slo, found in search.of_limits.items()}
    assert {slo: point and point.rate for slo, point in best.items()} == {TIGHT: 0.5, LOOSE: 1.0}
    found = [rows.best_row(each) for each in search.of_limits.values()]
    assert [(row.ours, row.spread) for row in found] == [(0.5, 0.5), (1.0, None)]


def test_a_joint_search_ends_with_its_last_search() -> None:
    wanted = Wanted(runs=1)
    search = JointSearch({LOOSE: Search(wanted, start=1.0, lowest=1.0, highest=1.0)})
    assert search.next() == 1.0
    search.add(1.0, [record(ttft_s=1.0)])
    assert search.next() is None


def test_a_traces_lengths_come_at_random_times_of_the_rate() -> None:
    burst = [Arrival(at_s=0.0, prompt_tokens=10 * n, output_tokens=4) for n in range(1, 201)]
    workload = Repaced(requests=burst, length_scale=0.5, seed=1)
    found = workload.at(4.0, 20.0, None)
    assert [each.prompt_tokens for each in found] == [5 * n for n in range(1, 81)]
    assert found == workload.at(4.0, 20.0, None)
    gaps = np.diff([each.at_s for each in found])
    assert 0.5 < gaps.std() / gaps.mean() < 1.5
    assert max(each.at_s for each in found) < 20.0
    with pytest.raises(WorkloadError, match="no rate of their own"):
        workload.at(None, 20.0, None)


def test_scales_reach_lengths_and_limits() -> None:
    chat, code = loads(chat_scale=0.5, code_scale=0.25, slo_scale=2.0)
    plain, _ = loads(chat_scale=1.0, code_scale=1.0, slo_scale=1.0)
    assert (chat.length_scale, code.length_scale) == (0.5, 0.25)
    for slow, fast in zip(chat.limits, plain.limits, strict=True):
        assert slow == fast.scaled(2.0)


def figure(name: str, value: float) -> Row:
    return Row(row=name, ours=value, unit="requests/s", higher_is_better=True)


def test_ours_stands_beside_every_other_system() -> None:
    found = {
        OURS: [figure("chat", 4.0), figure("hand-over", 1.0)],
        "vLLM": [figure("chat", 2.0), figure("other", 3.0)],
        "vLLM x2": [figure("chat", 0.0)],
    }
    shown = [(row.row, row.ours, row.peer, row.peer_name) for row in beside(found)]
    assert shown == [
        ("chat", 4.0, 2.0, "vLLM"),
        ("chat", 4.0, 0.0, "vLLM x2"),
        ("hand-over", 1.0, None, None),
        ("vLLM, other", 3.0, None, None),
    ]


def test_each_instance_has_its_part_of_the_cores() -> None:
    machine = Machine(model=Path("m"), max_context=9, kv_gib=2, cores=(0, 1, 4, 5), logs=Path("l"))
    assert machine.parts(2) == [(0, 1), (4, 5)]
    assert machine.parts(1) == [(0, 1, 4, 5)]


def test_vllm_without_an_interpreter_is_refused(tmp_path: Path) -> None:
    machine = Machine(model=tmp_path, max_context=9, kv_gib=2, cores=(0, 1), logs=tmp_path)
    with (
        pytest.raises(RuntimeError, match="--vllm-python is required"),
        SYSTEMS["vLLM 1P1D NIXL"].start(machine),
    ):
        pass


class Answering:
    """A backend that answers at once."""

    async def describe(self) -> Served:
        return Served(model="m", version="1")

    def prepare(self, prompt: NDArray[np.int64], output_tokens: int) -> tuple[int, int]:
        return len(prompt), output_tokens

    async def send(self, prepared: tuple[int, int]) -> AsyncGenerator[Message]:
        prompt_tokens, output_tokens = prepared
        for _ in range(output_tokens):
            yield TOKEN
        yield Message(has_tokens=False, usage=(prompt_tokens, output_tokens))

    async def close(self) -> None:
        pass


@contextlib.contextmanager
def good(machine: Machine) -> Iterator[OpenBackend]:
    machine.logs.mkdir(parents=True)
    yield Answering


@contextlib.contextmanager
def bad(machine: Machine) -> Iterator[OpenBackend]:
    raise RuntimeError("no memory")
    yield Answering


def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[Any, list[Any]]:
    """Run the command over systems that answer at once; return its end, and its figures."""
    for name in ("code", "conv"):
        (tmp_path / f"AzureLLMInferenceTrace_{name}.csv").write_text(CSV)
    named = {
        f"azure-{name}": (f"AzureLLMInferenceTrace_{name}.csv", 0.0) for name in ("code", "conv")
    }
    systems = {
        OURS: System(instances=1, hands_over=True, start=good),
        "broken": System(instances=1, start=bad),
        "other": System(instances=1, start=good),
        "large": System(instances=1 << 20, start=good),
        "peer": System(instances=1, is_vllm=True, start=good),
    }
    monkeypatch.setattr(contest, "SYSTEMS", systems)
    monkeypatch.setattr(traces, "NAMED", named)
    monkeypatch.setattr(checkpoints, "kept", lambda folder, name: folder)
    monkeypatch.setattr(checkpoints, "add_tokenizer", lambda folder, into: None)
    file = tmp_path / "figures.json"
    command = ["--traces", str(tmp_path), "--json", str(file), "--budget-s", "0", "--repeats", "2"]
    command += ["--duration-s", "0.2", "--warmup-s", "0", *options]
    done = CliRunner().invoke(goodput_systems.app, command)
    return done, json.loads(file.read_text())["rows"] if file.exists() else []


def test_systems_are_asked_one_after_another_and_the_others_where_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    done, shown = held(tmp_path, monkeypatch, "--out", str(out))
    assert done.exit_code == 1
    assert "broken: no memory" in done.output
    assert "large is left out: it needs 1048576 cores" in done.output
    rates = [row for row in shown if "highest rate" in row["row"]]
    assert len(rates) == 4  # two loads with two limits each
    assert {(row["ours"], row["peer"], row["peer_name"]) for row in rates} == {
        (load.start, load.start, "other")
        for load in loads(chat_scale=1.0, code_scale=1.0, slo_scale=1.0)
    }
    assert sum(row["row"].startswith("hand-over, ") for row in shown) == 3
    assert sum(row["row"].startswith("TTFT of one") for row in shown) == 3
    points = [row for row in shown if "attainment of 1 runs" in row["row"]]
    assert len(points) == 8
    assert all(row["ours"] == 100 and math.isfinite(row["spread"]) for row in points)
    assert (out / "other" / "chat.jsonl").read_text()
    assert (out / "chat-1.svg").exists()
    again, _ = held(tmp_path, monkeypatch, "--out", str(out))
    assert again.exit_code == 2
    assert "is there already" in again.output


def test_a_pattern_takes_systems_and_what_they_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, shown = held(tmp_path, monkeypatch, "--rows", "chat, other")
    assert done.exit_code == 0, done.output
    assert {row["row"].split(", ")[0] for row in shown} == {"other"}
    assert not any("code" in row["row"] for row in shown)


def test_what_cannot_be_done_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(goodput_systems.app, ["--traces", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "cannot be read" in done.output
    done, _ = held(tmp_path, monkeypatch, "--rows", "chat, peer")
    assert done.exit_code == 2
    assert "no system is left to be asked" in done.output
    done, _ = held(tmp_path, monkeypatch, "--json", str(tmp_path / "none" / "f.json"))
    assert done.exit_code == 2
    assert "there is no folder" in done.output
