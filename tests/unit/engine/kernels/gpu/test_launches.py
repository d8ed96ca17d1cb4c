"""No request waits for a compiler: the warm-up has launched all forms that passes use."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engine.checkpoints import ARCHITECTURES, DEEPSEEK_V3, LLAMA, make_checkpoint


@pytest.fixture(params=(*ARCHITECTURES, LLAMA, DEEPSEEK_V3))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    # Whole sixteens, as published models have: strides of others need forms of their own.
    sizes: dict[str, Any] = {}
    if request.param == DEEPSEEK_V3:
        sizes = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
    return make_checkpoint(tmp_path, request.param, **sizes)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_passes_after_the_warm_up_launch_nothing_new(folder: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.engine.kernels.gpu.launches", str(folder)],
        env=kept,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after_typical_sizes, after_all_forms = json.loads(done.stdout.splitlines()[-1])
    assert after_typical_sizes, "there was nothing to be met"
    assert after_all_forms == []
