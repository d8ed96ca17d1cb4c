"""Two models behind one router, whose instances it was told of."""

import random
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from twinpool.errors import InvalidRequest, TwinpoolError, Unavailable

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, free_port, wait_until
from tests.integration.conftest import Reference, reference

METRICS = free_port()
MAX_NEW = 24
INSTANCES = ("prefill", "decode", "dense-prefill", "dense-decode")


class Named(Cluster):
    """Two models, and a router with a list of their instances."""

    def __init__(self, dense: Path, logs: Path) -> None:
        flags = {
            name: ("--served-model-name", "dense" if name.startswith("dense") else "tiny")
            for name in INSTANCES
        }
        super().__init__(
            MODEL_DIR,
            logs,
            *("--dtype", "float32", "--kv-memory-mib", "8"),
            router_flags=("--metrics-port", str(METRICS), "--restart-grace-s", "0.2"),
            prefills=("prefill", "dense-prefill"),
            decodes=("decode", "dense-decode"),
            more_flags=flags,
            models={name: dense for name in INSTANCES if name.startswith("dense")},
        )
        for name in INSTANCES:
            self._commands["router"] += [f"--{self._commands[name][0]}", self.address_of(name)]

    def address_of(self, name: str) -> str:
        """Where an instance is called."""
        command = self._commands[name]
        return f"127.0.0.1:{command[command.index('--port') + 1]}"

    def add_stranger(self) -> str:
        """Start an instance that the router was not told of; returns its name."""
        role, model, *options = self._commands["prefill"]
        options[options.index("--port") + 1] = str(free_port())
        options[options.index("--name") + 1] = "stranger"
        self._commands["stranger"] = [role, model, *options]
        self.start("stranger")
        return "stranger"


@pytest.fixture(scope="module")
def served(dense_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Named]:
    with Named(dense_model, tmp_path_factory.mktemp("models")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def references(dense_model: Path) -> dict[str, Reference]:
    return {"tiny": reference(MODEL_DIR), "dense": reference(dense_model)}


def test_requests_to_two_models_at_once_are_each_answered_by_their_own(
    served: Named, references: dict[str, Reference]
) -> None:
    rng = random.Random(7)
    asked = [(name, [rng.randrange(400) for _ in range(70)]) for name in ("tiny", "dense") * 3]
    with served.client() as client, ThreadPoolExecutor(len(asked)) as threads:

        def answer(name: str, prompt: list[int]) -> list[int]:
            done = client.complete(prompt, model=name, max_new_tokens=MAX_NEW, ignore_eos=True)
            assert done.stats.decode_instance == ("dense-decode" if name == "dense" else "decode")
            return list(done.token_ids)

        answers = list(threads.map(answer, *zip(*asked, strict=True)))
        found = {m.name: m.requests.finished for m in client.status().models}
        ready = {m.name: m.ready for m in client.models()}
    for (name, prompt), tokens in zip(asked, answers, strict=True):
        assert tokens == references[name].tokens(prompt, MAX_NEW)
    assert found == {"tiny": 3, "dense": 3}
    assert ready == {"tiny": True, "dense": True}
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    for name in found:
        counted = f'twinpool_router_requests_total{{model_name="{name}",outcome="finished"}} 3.0'
        assert counted in lines
    served.wait_idle()


@pytest.mark.parametrize("model", ["", "other"])
def test_model_that_is_not_served_is_told_which_are(served: Named, model: str) -> None:
    with served.client() as client, pytest.raises(InvalidRequest, match="'dense', 'tiny'"):
        client.complete("hi", model=model)


def test_lost_instance_is_missed_and_the_other_model_goes_on(served: Named) -> None:
    served.kill("dense-decode")
    with served.client() as client:
        wait_until(lambda: bool(client.status().missing), "an instance is missed")
        [missing] = client.status().missing
        assert (missing.role, missing.address) == ("decode", served.address_of("dense-decode"))
        with pytest.raises(Unavailable, match="no decode instance"):
            client.complete([1, 2], model="dense", max_new_tokens=2)
        assert len(client.complete([1, 2], model="tiny", max_new_tokens=2).token_ids) == 2
        served.start("dense-decode")

        def is_back() -> bool:
            try:
                client.complete([1, 2], model="dense", max_new_tokens=2)
            except TwinpoolError:
                return False
            return True

        wait_until(is_back, "the lost instance is back")
        assert not client.status().missing


def test_instance_that_the_router_was_not_told_of_ends_with_the_reason(served: Named) -> None:
    stranger = served.add_stranger()
    assert served.wait_exit(stranger) == 1
    assert "is none of those that this router was given with --prefill" in served.log(stranger)
