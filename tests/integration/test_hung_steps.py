"""An engine that hangs in a process that looks alive: it ends, and nobody waits for it."""

import signal
from pathlib import Path
from typing import Any

import pytest

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, wait_until
from tests.integration.conftest import BLOCK
from tests.integration.test_moves import Stream

OPTIONS: dict[str, Any] = {"max_new_tokens": 300, "ignore_eos": True}
PROMPT = "Once upon a time"
BROKEN = 70


def test_hung_engines_end_and_what_they_had_goes_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINPOOL_TEST_HANGS", str(tmp_path))
    with Cluster(
        MODEL_DIR,
        tmp_path,
        *("--dtype", "float32", "--block-size", str(BLOCK), "--step-timeout-s", "1"),
        prefills=("p", "q"),
        decodes=("a", "b"),
        launcher="tests.integration.hangs",
    ) as cluster:
        with cluster.client() as client:
            right = client.complete(PROMPT, timeout_s=60, **OPTIONS)
        streams = [Stream(cluster, PROMPT, **OPTIONS) for _ in range(4)]
        wait_until(lambda: all(len(stream.token_ids) > 9 for stream in streams), "tokens of all")
        hung = (cluster.busiest("a", "b"), "p")
        for name in hung:
            (tmp_path / name).touch()
        late = [Stream(cluster, PROMPT, **OPTIONS) for _ in range(2)]
        for stream in (*streams, *late):
            stream.join()
            stream.check(right)
        assert max(stream.moves for stream in streams) == 1
        for name in hung:
            assert cluster.wait_exit(name) == BROKEN
            said = cluster.log(name)
            assert "a step has not ended for 1 s (--step-timeout-s)" in said
            assert "hang_or_run" in said  # where it hung
        cluster.wait_idle()


def test_engine_that_hangs_while_it_is_to_stop_does_not_keep_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINPOOL_TEST_HANGS", str(tmp_path))
    with Cluster(
        MODEL_DIR,
        tmp_path,
        *("--dtype", "float32", "--block-size", str(BLOCK), "--drain-timeout-s", "60"),
        *("--step-timeout-s", "2"),
        decodes=("a",),
        launcher="tests.integration.hangs",
    ) as cluster:
        stream = Stream(cluster, PROMPT, timeout_s=20, **OPTIONS)
        wait_until(lambda: len(stream.token_ids) > 9, "tokens")
        (tmp_path / "a").touch()
        cluster.signal("a", signal.SIGTERM)
        assert cluster.wait_exit("a") == BROKEN
        stream.cancel()
        stream.join()
