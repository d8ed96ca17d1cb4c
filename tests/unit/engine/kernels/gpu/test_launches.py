"""No request waits for a compiler: the warm-up has launched all forms that passes use."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_passes_after_the_warm_up_launch_nothing_new(checkpoint: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.engine.kernels.gpu.launches", str(checkpoint)],
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
