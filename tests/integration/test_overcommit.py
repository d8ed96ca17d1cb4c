"""Decode promises more than it has: requests take turns, and their answers are the same."""

import random
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from twinpool.errors import Refused

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, free_port, some_slow
from tests.integration.conftest import Reference, reference
from tests.integration.test_ranks import answer, prompt_of

FLAGS = ("--dtype", "float32", "--block-size", "8")
# The memory holds 256 tokens for each rank of tp; a request has up to 180.
TINY = ("--kv-memory-mib", "1", "--kv-overcommit", "4", "--max-sequences", "16")
# By name: the decode instances, and what they are made of.
DECODES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "one": (("decode",), ()),
    "two": (("first", "second"), ("--no-prefix-cache",)),
    "dp2 x ep2": (("decode",), ("--dp", "2", "--ep", "2")),
    "pp2": (("decode",), ("--pp", "2")),
}


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


class Tight(Cluster):
    """A system whose decode instances have to hand sequences back."""

    ports: dict[str, int]

    def preemptions(self) -> float:
        """Those of all decode instances."""
        return sum(self._metric(port, "preempted_sequences") for port in self.ports.values())

    def grown_blocks(self) -> float:
        """Those of all decode instances."""
        return sum(self._metric(port, "grown_blocks") for port in self.ports.values())

    def _metric(self, port: int, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            lines = page.read().decode().splitlines()
        found = f"twinpool_decode_{name}_total "
        [value] = [line.removeprefix(found) for line in lines if line.startswith(found)]
        return float(value)


@pytest.fixture(scope="module", params=some_slow(DECODES, "two"))
def tight(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tight]:
    """One or two decode instances with next to no room."""
    names, flags = DECODES[request.param]
    ports = {name: free_port() for name in names}
    more = {name: (*TINY, *flags, "--metrics-port", str(port)) for name, port in ports.items()}
    logs = tmp_path_factory.mktemp("tight")
    with Tight(MODEL_DIR, logs, *FLAGS, decodes=names, more_flags=more) as cluster:
        cluster.ports = ports
        yield cluster


def test_answers_side_by_side_are_those_of_one_after_another(
    tight: Tight, expected: Reference
) -> None:
    rng = random.Random(5)
    wanted = [(prompt_of(rng.randrange(4, 60), s), rng.randrange(40, 120)) for s in range(14)]
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(lambda want: answer(tight, want[0], want[1], 0.9), wanted))
    assert answers == [
        expected.tokens(prompt, tokens, temperature=0.9, seed=11) for prompt, tokens in wanted
    ]
    tight.wait_idle()
    assert tight.preemptions() >= len(wanted) / 2
    assert tight.grown_blocks() > tight.preemptions()


def test_clients_that_leave_a_tight_instance_leave_nothing_behind(tight: Tight) -> None:
    def leave_after(tokens: int) -> None:
        with tight.client() as client:
            stream = client.generate(prompt_of(30, tokens), max_new_tokens=100, ignore_eos=True)
            for _ in range(tokens):
                next(stream)
            stream.close()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(leave_after, range(1, 60, 5)))
    tight.wait_idle()


def test_request_that_no_instance_could_hold_whole_is_refused(tight: Tight) -> None:
    with tight.client() as client, pytest.raises(Refused):
        client.complete(prompt_of(100, 1), max_new_tokens=4000, ignore_eos=True)
