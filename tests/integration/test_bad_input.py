"""What people get wrong ends in one line that says what to do, never in a trace or a hang."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from twinpool.errors import InvalidRequest, Refused, Unavailable

from launch.builtin import MODEL_DIR
from tests.integration.cluster import ROOT, Cluster, free_port, wait_until
from tests.integration.conftest import BLOCK


def launch(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the built-in checkpoint, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    return folder


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def rename_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["GPT5ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))


# What is done to a model's folder, and what the refusal names.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "model"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "cut weights": (cut_weights, "model.safetensors"),
    "architecture": (rename_architecture, "GPT5ForCausalLM"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
}
ROLES = ("prefill", "decode")


@pytest.fixture(scope="module")
def refusals(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], subprocess.CompletedProcess[str]]:
    """What each role says to each damage; side by side, since each takes seconds to load."""

    def refused(role: str, damage: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("broken") / "model"
        shutil.copytree(MODEL_DIR, folder)
        DAMAGES[damage][0](folder)
        return launch(role, str(folder), "--router", f"127.0.0.1:{free_port()}")

    asked = list(itertools.product(ROLES, DAMAGES))
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(asked, pool.map(lambda each: refused(*each), asked), strict=True))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("role", ROLES)
def test_bad_model_folder_is_named(
    refusals: dict[tuple[str, str], subprocess.CompletedProcess[str]], role: str, damage: str
) -> None:
    done = refusals[role, damage]
    assert done.returncode == 1
    assert DAMAGES[damage][1] in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_stops_with_the_reason_of_its_child(broken: Path) -> None:
    cut_weights(broken)
    done = launch("launch", "serve", str(broken), "--port", "0")
    assert done.returncode == 1
    assert "model.safetensors" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--port", "70000"), "--port"),
        (("--dtype", "int3"), "--dtype"),
        (("--block-size", "0"), "--block-size"),
        (("--kv-memory-mib", "none"), "--kv-memory-mib"),
    ],
)
def test_bad_flag_is_named_with_what_was_found(flags: tuple[str, str], named: str) -> None:
    done = launch("decode", str(MODEL_DIR), *flags)
    assert done.returncode == 2
    assert named in done.stderr
    assert flags[1] in done.stderr


def test_model_longer_than_it_was_made_for_is_refused() -> None:
    done = launch("decode", str(MODEL_DIR), "--max-model-len", "99999999")
    assert done.returncode == 1
    assert "--max-model-len" in done.stderr


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A system whose pools hold little."""
    logs = tmp_path_factory.mktemp("small")
    flags = ("--dtype", "float32", "--block-size", str(BLOCK), "--kv-memory-mib", "2")
    with Cluster(MODEL_DIR, logs, *flags) as cluster:
        yield cluster


def test_port_in_use_is_said(small: Cluster) -> None:
    port = small.address.rpartition(":")[2]
    done = launch("router", "--port", port)
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "in use" in done.stderr


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_instance_of_another_dtype_is_refused_by_name(small: Cluster, role: str) -> None:
    done = launch(role, str(MODEL_DIR), "--router", small.address, "--dtype", "bfloat16")
    assert done.returncode == 1
    assert "bfloat16" in done.stderr
    assert "float32" in done.stderr


def test_instance_that_calls_another_model_the_same_is_refused_by_name(
    small: Cluster, dense_model: Path
) -> None:
    name = ("--served-model-name", MODEL_DIR.name)
    done = launch(
        "decode", str(dense_model), "--router", small.address, "--dtype", "float32", *name
    )
    assert done.returncode == 1
    assert "fingerprint" in done.stderr or "architecture" in done.stderr
    assert "Traceback" not in done.stderr


def test_request_that_no_pool_can_ever_hold_is_refused_without_a_retry(small: Cluster) -> None:
    with small.client() as client, pytest.raises(Refused) as refused:
        client.complete([1] * 200, max_new_tokens=3000)
    assert refused.value.retry_after_s is None
    assert refused.value.needed == 3200
    assert 0 < (refused.value.free or 0) < 3200


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([], {}, "prompt"),
        ("", {}, "prompt"),
        ([1 << 30], {}, "prompt"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"min_p": 1.5}, "min_p"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens"),
        ([1], {"logprobs": 1000}, "logprobs"),
        ([1], {"stop": ["x" * 100_000]}, "stop"),
    ],
)
def test_bad_request_names_the_field(
    small: Cluster, prompt: str | list[int], options: dict[str, object], field: str
) -> None:
    with small.client() as client, pytest.raises(InvalidRequest) as invalid:
        client.complete(prompt, **options)  # type: ignore[arg-type]
    assert field in (invalid.value.field or "")


def test_message_that_is_too_large_is_refused(small: Cluster) -> None:
    with small.client() as client, pytest.raises((Refused, InvalidRequest)):
        client.complete("a " * (9 << 20))


def test_prompt_longer_than_the_model_is_refused(small: Cluster) -> None:
    with small.client() as client, pytest.raises((Refused, InvalidRequest)):
        client.complete([1] * 100_000)


def test_router_that_is_not_there_is_said_to_the_client() -> None:
    done = launch("launch", "generate", "hello", "--router", f"127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


def test_worker_waits_for_its_router_and_says_so(tmp_path: Path) -> None:
    cluster = Cluster(MODEL_DIR, tmp_path, "--dtype", "float32")
    try:
        cluster.start("decode")
        wait_until(lambda: "not reachable" in cluster.log("decode"), "the message")
        assert "Traceback" not in cluster.log("decode")
        cluster.start("router")
        cluster.start("prefill")
        cluster.wait_ready()
    finally:
        cluster.close()


def test_request_without_any_instance_is_unavailable(tmp_path: Path) -> None:
    cluster = Cluster(MODEL_DIR, tmp_path)
    try:
        cluster.start("router")
        wait_until(lambda: "ready" in cluster.log("router"), "the router")
        with cluster.client() as client, pytest.raises(Unavailable, match="registered"):
            client.complete([1], timeout_s=20)
    finally:
        cluster.close()
