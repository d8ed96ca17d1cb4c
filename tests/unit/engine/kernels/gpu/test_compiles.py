"""The interpreter runs what a compiler may refuse, so each kernel is compiled, too."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
def test_every_kernel_compiles_for_a_hopper_gpu(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    module = "tests.unit.engine.kernels.gpu.compiles"
    done = subprocess.run(
        [sys.executable, "-m", module],
        env={**kept, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "_block_kernel",
        "_blocks_kernel",
        "_count_kernel",
        "_decode_kernel",
        "_down_kernel",
        "_draw_kernel",
        "_gate_up_kernel",
        "_gated_kernel",
        "_insert_kernel",
        "_latent_kernel",
        "_merge_kernel",
        "_merge_parts_kernel",
        "_move_kernel",
        "_norm_kernel",
        "_place_kernel",
        "_sum_kernel",
    ]
