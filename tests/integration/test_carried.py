"""A draining decode instance's sequences go on elsewhere with the KV that they have there."""

import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from twinpool.errors import DeadlineExceeded

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, free_port, some_slow, wait_until
from tests.integration.conftest import BLOCK
from tests.integration.test_moves import (
    BEGUN,
    PROMPTS,
    Stream,
    Wanted,
    begin_all,
    check_all,
    wanted,
)
from tests.integration.test_ranks import prompt_of

__all__ = ["wanted"]  # a fixture, of whatever `twins` are here

FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK), "--drain-timeout-s", "20")
# Each dp rank has as many blocks, so that each instance gets some of the sequences.
ONE, TP2, PP2 = (), ("--tp", "2", "--kv-memory-mib", "128"), ("--pp", "2", "--kv-memory-mib", "128")
DP2 = ("--dp", "2", "--ep", "2")
# Of the instances that sequences leave and go to.
LAYOUTS = {
    "tp2 to 1": (TP2, ONE),
    "1 to pp2": (ONE, PP2),
    "tp2 to tp2": (TP2, TP2),
    "dp2 x ep2 to 1": (DP2, ONE),
    "1 to dp2 x ep2": (ONE, DP2),
}
LONG: dict[str, Any] = {"max_new_tokens": 1500, "ignore_eos": True, "temperature": 0.7, "seed": 3}


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        text = page.read().decode()
    # The router's have their model's name as well.
    text = text.replace('model_name="model",', "").replace('{model_name="model"}', "")
    found = re.search(rf"^twinpool_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


class Decodes(Cluster):
    """A cluster with two decode instances, which may be of several ranks."""

    def __init__(self, logs: Path, a: tuple[str, ...] = (), b: tuple[str, ...] = ()) -> None:
        self._router, self._prefill = free_port(), free_port()
        super().__init__(
            MODEL_DIR,
            logs,
            *FLAGS,
            router_flags=("--metrics-port", str(self._router)),
            decodes=("a", "b"),
            more_flags={"prefill": ("--metrics-port", str(self._prefill)), "a": a, "b": b},
        )

    @property
    def carried(self) -> float:
        return metric(self._router, 'router_carries_total{outcome="carried"}')

    @property
    def carried_bytes(self) -> float:
        return metric(self._router, "router_carried_bytes_total")

    @property
    def stayed(self) -> float:
        return metric(self._router, 'router_carries_total{outcome="stayed"}')

    @property
    def prefilled(self) -> float:
        return metric(self._prefill, "prefill_prompt_tokens_total")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decodes]:
    with Decodes(tmp_path_factory.mktemp("twins")) as cluster:
        yield cluster


def begun(cluster: Cluster, prompt: Any, **options: Any) -> tuple[Stream, str, str]:
    """An answer that has begun, the decode instance where it is, and the other one."""
    cluster.wait_idle()
    stream = Stream(cluster, prompt, cache_salt=uuid4().hex, **options)
    wait_until(lambda: len(stream.token_ids) >= BEGUN, "tokens")
    source = cluster.busiest("a", "b")
    return stream, source, "b" if source == "a" else "a"


def wait_paused(stream: Stream) -> None:
    """Return once no token has come for a while."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 0.3:
        if len(stream.token_ids) != seen:
            seen, since = len(stream.token_ids), time.monotonic()
        time.sleep(0.01)


def restart(cluster: Cluster, name: str) -> None:
    cluster.start(name)
    cluster.wait_ready()
    cluster.wait_idle()


def test_answers_of_all_kinds_go_on_without_any_prefill(twins: Decodes, wanted: Wanted) -> None:
    streams = begin_all(twins, wanted)
    before, work = twins.carried, twins.prefilled
    source = twins.busiest("a", "b")
    twins.signal(source, signal.SIGTERM)
    assert twins.wait_exit(source) == 0
    check_all(streams, wanted)
    assert twins.carried > before
    assert twins.prefilled == work
    assert twins.carried_bytes > 0
    restart(twins, source)


@pytest.mark.slow
def test_answer_is_carried_to_and_fro(twins: Decodes) -> None:
    longer = {**LONG, "max_new_tokens": 5000}  # an instance has to come back in the meantime
    with twins.client() as client:
        right = client.complete(PROMPTS[1], timeout_s=60, **longer)
    stream, *there = begun(twins, PROMPTS[1], **longer)
    work = twins.prefilled
    for name in there:
        told = len(stream.token_ids)
        twins.signal(name, signal.SIGTERM)
        assert twins.wait_exit(name) == 0
        wait_until(lambda told=told: len(stream.token_ids) > told + 5, "it goes on")  # type: ignore[misc]
        twins.start(name)
        twins.wait_ready()
    stream.join()
    stream.check(right)
    assert stream.moves == 2
    assert twins.prefilled == work
    twins.wait_idle()


@pytest.mark.parametrize("who", some_slow(["target", "source"]))
def test_instance_that_dies_in_mid_move_costs_no_token(twins: Decodes, who: str) -> None:
    with twins.client() as client:
        right = client.complete(PROMPTS[2], timeout_s=60, **LONG)
    stream, source, target = begun(twins, PROMPTS[2], **LONG)
    before = twins.stayed
    twins.signal(target, signal.SIGSTOP)
    twins.signal(source, signal.SIGTERM)
    wait_paused(stream)
    if who == "target":
        twins.kill(target)
        twins.start(target)
    else:
        twins.kill(source)
        twins.signal(target, signal.SIGCONT)
    stream.join()
    stream.check(right)
    assert twins.stayed > before
    if who == "target":
        assert twins.wait_exit(source) == 0
    restart(twins, source)


@pytest.mark.parametrize("why", some_slow(["client leaves", "deadline"], "client leaves"))
def test_request_that_ends_in_mid_move_leaves_nothing(twins: Decodes, why: str) -> None:
    before = twins.carried
    timeout_s = 6 if why == "deadline" else 60
    longer = {**LONG, "max_new_tokens": 4000}
    stream, source, target = begun(twins, PROMPTS[0], timeout_s=timeout_s, **longer)
    twins.signal(target, signal.SIGSTOP)
    twins.signal(source, signal.SIGTERM)
    wait_paused(stream)
    if why == "client leaves":
        stream.cancel()
    stream.join()
    assert isinstance(stream.error, DeadlineExceeded) == (why == "deadline")
    assert stream.chunks[-1].finish_reason is None
    twins.signal(target, signal.SIGCONT)
    assert twins.wait_exit(source) == 0
    restart(twins, source)
    assert twins.carried == before


@pytest.mark.parametrize("layouts", some_slow(LAYOUTS))
def test_layouts_may_differ(tmp_path: Path, layouts: str) -> None:
    with Decodes(tmp_path, *LAYOUTS[layouts]) as cluster:
        prompt: Any = prompt_of(700, seed=1)
        options = {**LONG, "max_new_tokens": 600}
        with cluster.client() as client:
            right = client.complete(prompt, timeout_s=60, **options)
        streams = [Stream(cluster, prompt, **options) for _ in range(4)]
        wait_until(lambda: all(len(s.token_ids) >= BEGUN for s in streams), "tokens of all")
        before, work = cluster.carried, cluster.prefilled
        cluster.signal("a", signal.SIGTERM)
        assert cluster.wait_exit("a") == 0
        for stream in streams:
            stream.join()
            stream.check(right)
        assert cluster.carried > before
        assert cluster.prefilled == work
        restart(cluster, "a")
