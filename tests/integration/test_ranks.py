"""A prefill instance of several ranks answers as one rank does, and lives and dies as one."""

import os
import random
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from engine.config import load_config
from launch.builtin import MODEL_DIR, task
from service.threads import thread_env
from tests.integration.cluster import ROOT, Cluster, free_port, some_slow, wait_until
from tests.integration.conftest import BLOCK, Reference, reference
from tests.integration.test_faults import SEED, Attempt
from text.assets import load_assets
from text.tokenizer import Tokenizer

# By name; a grain of one block and of two, so that short prompts are on all ranks as well.
LAYOUTS = {
    "tp2": ("--tp", "2"),
    "cp2": ("--cp", "2", "--cp-grain", "64"),
    "cp3": ("--cp", "3", "--cp-grain", "32"),
    "cp2 x tp2": ("--cp", "2", "--tp", "2", "--cp-grain", "32", "--sequence-parallel"),
    "pp2": ("--pp", "2"),
    "pp2 x cp2": ("--pp", "2", "--cp", "2", "--cp-grain", "64"),
}
FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK))
CONFIG = load_config(MODEL_DIR)
BLOCK_BYTES = 2 * 4 * BLOCK * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_size
METRICS = free_port()
LENGTHS = (1, 31, 64, 65, 193, 700, 2500)


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.fixture(scope="module", params=some_slow(LAYOUTS, "cp2 x tp2"))
def split(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A system whose prefill instance has several ranks."""
    more = ("--max-batched-tokens", "512", "--metrics-port", str(METRICS))
    flags = {"prefill": (*LAYOUTS[request.param], *more)}
    with Cluster(MODEL_DIR, tmp_path_factory.mktemp("split"), *FLAGS, more_flags=flags) as cluster:
        yield cluster


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300) for _ in range(length)]


def answer(cluster: Cluster, prompt: list[int], tokens: int, temperature: float = 0) -> list[int]:
    with cluster.client() as client:
        done = client.complete(
            prompt,
            max_new_tokens=tokens,
            ignore_eos=True,
            timeout_s=60,
            temperature=temperature,
            seed=11,
        )
    return list(done.token_ids)


def other_ranks(cluster: Cluster, name: str) -> list[int]:
    """The process ids of an instance's ranks but the first, in order."""
    children = Path(f"/proc/{cluster.pid(name)}/task/{cluster.pid(name)}/children").read_text()
    return [int(pid) for pid in children.split()]


def test_tokens_equal_a_single_ranks(split: Cluster, expected: Reference) -> None:
    for length in LENGTHS:
        prompt = prompt_of(length, seed=length)
        assert answer(split, prompt, 8) == expected.tokens(prompt, 8)


def test_recall_over_the_whole_context(split: Cluster, expected: Reference) -> None:
    tokenizer = Tokenizer(load_assets(MODEL_DIR))
    example = task.recall(random.Random(4), task.MAX_PAIRS)
    prompt = tokenizer.encode_messages([("user", example.prompt)])
    assert 7000 < len(prompt) < 8180
    found = answer(split, prompt, 8)
    assert found == expected.tokens(prompt, 8)
    assert example.answer in tokenizer.decode(found)


def test_mixed_requests_side_by_side_equal_a_single_ranks(
    split: Cluster, expected: Reference
) -> None:
    rng = random.Random(7)
    prompts = [prompt_of(rng.choice((3, 40, 120, 333, 900)), seed) for seed in range(24)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: answer(split, prompt, 6, 0.9), prompts))
    assert answers == [expected.tokens(prompt, 6, temperature=0.9, seed=11) for prompt in prompts]
    split.wait_idle()


def test_known_beginning_is_found_on_all_ranks(split: Cluster, expected: Reference) -> None:
    beginning = prompt_of(600, seed=1)
    answer(split, beginning, 2)
    for more in (0, 1, 200):
        prompt = beginning + prompt_of(more, seed=2)
        with split.client() as client:
            done = client.complete(prompt, max_new_tokens=6, ignore_eos=True, timeout_s=60)
        assert done.stats.cached_tokens >= 384
        assert list(done.token_ids) == expected.tokens(prompt, 6)


def test_no_rank_sends_what_decode_has(split: Cluster, expected: Reference) -> None:
    beginning = prompt_of(12 * BLOCK, seed=71)
    answer(split, beginning, 2)
    for more, blocks in ((0, 0), (1, 1), (7 * BLOCK, 7)):
        prompt = beginning + prompt_of(more, seed=72)
        with split.client() as client:
            done = client.complete(prompt, max_new_tokens=6, ignore_eos=True, timeout_s=60)
        assert list(done.token_ids) == expected.tokens(prompt, 6)
        assert done.stats.decode_cached_tokens == len(beginning)
        assert done.stats.kv_bytes == blocks * BLOCK_BYTES
    split.wait_idle()


def test_metrics_count_all_ranks(split: Cluster, request: pytest.FixtureRequest) -> None:
    before = metrics()
    with split.client() as client:
        done = client.complete(prompt_of(1500, seed=55), max_new_tokens=2, ignore_eos=True)
    ranks = len(other_ranks(split, "prefill")) + 1
    moved = "twinpool_prefill_kv_transfer_bytes_total"
    wait_until(lambda: metrics()[moved] >= before[moved] + done.stats.kv_bytes, "all KV is counted")
    after = metrics()
    computed = "twinpool_prefill_computed_tokens_total"
    assert after[computed] == before[computed] + 1500
    layout = request.node.callspec.params["split"]
    for link, degree in (("ring", "cp"), ("stage", "pp")):
        name = f"twinpool_prefill_{link}_bytes_total"
        sent = [f'{name}{{rank="{rank}"}}' for rank in range(ranks)]
        # A last stage's ranks but one send nothing: its logits are on one of them.
        silent = 1 if (link, layout) == ("stage", "pp2 x cp2") else 0
        wanted = len(sent) - silent if degree in layout else 0
        wait_until(partial(_have_risen, sent, before, wanted), "what each rank sent is counted")


def _have_risen(names: list[str], before: Counter[str], wanted: int) -> bool:
    after = metrics()
    return sum(after[name] > before[name] for name in names) == wanted


def metrics() -> Counter[str]:
    """All samples; what is not there counts as 0."""
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    found = Counter[str]()
    for line in lines:
        if line[:1] != "#":
            name, _, value = line.rpartition(" ")
            found[name] = float(value)  # type: ignore[assignment]
    return found


def test_all_processes_listen_on_loopback_alone(split: Cluster) -> None:
    pids = [split.pid(name) for name in ("router", "prefill", "decode")]
    sockets = set[str]()
    for pid in [*pids, *other_ranks(split, "prefill")]:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                sockets.add(os.readlink(descriptor))
    found = 0
    # 127.0.0.1, also as an IPv6 address, and ::1, as the kernel writes them.
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                found += 1
                assert local.partition(":")[0] in loopback, line
    assert found >= 4


def test_requests_that_clients_leave_give_everything_back(
    split: Cluster, expected: Reference
) -> None:
    rng = random.Random(SEED)
    for number in range(12):
        with split.client() as client:
            stream = client.generate(
                prompt_of(rng.choice((40, 900, 2500)), number), max_new_tokens=50, ignore_eos=True
            )
            for _ in range(rng.randrange(3)):
                next(stream)
            stream.close()
    split.wait_idle()
    prompt = prompt_of(100, seed=3)
    assert answer(split, prompt, 4) == expected.tokens(prompt, 4)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two prefill instances of two ranks each; both are slow enough to be hit in a step."""
    slow = ("--max-batched-tokens", "64")
    with Cluster(
        MODEL_DIR,
        tmp_path_factory.mktemp("twins"),
        *FLAGS,
        prefills=("a", "b"),
        more_flags={"a": (*LAYOUTS["cp2"], *slow), "b": (*LAYOUTS["pp2"], *slow)},
    ) as cluster:
        yield cluster


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("name", "victim"),
    [
        ("a", "other"),
        pytest.param("a", "first", marks=pytest.mark.slow),
        pytest.param("b", "other", marks=pytest.mark.slow),
    ],
)
def test_lost_rank_takes_its_instance_down_and_another_takes_over(
    twins: Cluster, expected: Reference, how: signal.Signals, name: str, victim: str
) -> None:
    # Of two cp ranks each has half of a prompt: to them come twice as many as to the others.
    seeds = [random.Random(f"{how} {name} {victim} {i}").randrange(1 << 30) for i in range(9)]
    attempts = [Attempt(twins, prompt_of(2500, seed), 6) for seed in seeds]
    others = other_ranks(twins, name)
    doomed = twins.pid(name) if victim == "first" else others[0]
    wait_until(lambda: busy(twins, name), "the instance computes")
    signal.pidfd_send_signal(os.pidfd_open(doomed), how)
    for attempt in attempts:
        attempt.join()
        assert attempt.error is None
        attempt.check(expected)
    if victim == "first" and how is signal.SIGSTOP:
        twins.kill(name)  # a stopped process cannot end itself
    twins.wait_exit(name)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others), "no rank is left")
    twins.start(name)
    twins.wait_ready()
    twins.wait_idle()


@pytest.mark.slow
def test_drained_instance_ends_with_all_its_ranks(twins: Cluster, expected: Reference) -> None:
    others = other_ranks(twins, "b")
    attempts = [Attempt(twins, prompt_of(2500, 7000 + seed), 6) for seed in range(9)]
    wait_until(lambda: busy(twins, "b"), "the instance computes")
    for pid in others:
        os.kill(pid, signal.SIGINT)  # as a terminal does to a whole group
    twins.signal("b", signal.SIGTERM)
    assert twins.wait_exit("b") == 0
    for attempt in attempts:
        attempt.join()
        assert attempt.error is None
        attempt.check(expected)
    assert not any(Path(f"/proc/{pid}").exists() for pid in others)
    twins.start("b")
    twins.wait_ready()


def test_layout_that_cannot_be_is_refused_with_those_that_can(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prefill", str(MODEL_DIR), "--tp", "3"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "tp=3 does not divide" in refused.stderr
    assert "use tp=1, 2" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_grain_is_measured_at_the_first_start_and_known_at_the_next(
    tmp_path: Path, expected: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = {"prefill": ("--cp", "2")}
    with Cluster(MODEL_DIR, tmp_path, *FLAGS, more_flags=flags) as cluster:
        cluster.kill("prefill")
        cluster.start("prefill")
        known = "known from an earlier start"
        wait_until(lambda: known in cluster.log("prefill"), "the grain is chosen again")
        cluster.wait_ready()
        for length in (40, 1500):
            prompt = prompt_of(length, seed=length)
            assert answer(cluster, prompt, 4) == expected.tokens(prompt, 4)
        grains = re.findall(f"a grain is ([0-9]+) .*, (measured|{known})", cluster.log("prefill"))
    (first, how), second = grains
    assert how == "measured"
    assert second == (first, known)
    assert 64 <= int(first) <= 1024


@pytest.mark.slow
def test_ranks_that_torchrun_starts_on_two_nodes_are_one_instance(
    tmp_path: Path, expected: Reference
) -> None:
    with Cluster(MODEL_DIR, tmp_path, *FLAGS, prefills=()) as cluster, ExitStack() as nodes:
        port = str(free_port())
        first, second = (
            nodes.enter_context(torchrun(node, port, cluster.address, tmp_path))
            for node in range(2)
        )
        wait_until(lambda: names(cluster) == {"decode", "wide"}, "the instance is there", 60)
        for length in (40, 700):
            prompt = prompt_of(length, seed=length)
            assert answer(cluster, prompt, 6) == expected.tokens(prompt, 6)
        first.terminate()
        assert second.wait(30) == 0, (tmp_path / "node-1.log").read_text()


@contextmanager
def torchrun(
    node: int, port: str, router: str, logs: Path, role: str = "prefill", layout: str = "cp2"
) -> Iterator["subprocess.Popen[bytes]"]:
    """One of two nodes of an instance named "wide", with a rank on each."""
    group = f"--nnodes 2 --node-rank {node} --nproc-per-node 1 --master-addr 127.0.0.1"
    command = [sys.executable, "-m", "torch.distributed.run", *group.split()]
    command += ["--master-port", port, "-m", role, str(MODEL_DIR), *FLAGS, *LAYOUTS[layout]]
    command += ["--threads", "1", "--router", router, "--name", "wide"]
    environment = {**os.environ, **thread_env(1)}
    with (logs / f"node-{node}.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.terminate()  # torchrun ends its ranks, which a kill would leave behind
        process.wait(30)


def names(cluster: Cluster) -> set[str]:
    with cluster.client() as client:
        return {instance.name for instance in client.status().instances}


def busy(cluster: Cluster, name: str) -> bool:
    with cluster.client() as client:
        [found] = [i for i in client.status().instances if i.name == name]
    return found.running > 0
