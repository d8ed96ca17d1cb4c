"""Settings that must be in place before any test imports torch or Triton."""

import os
from pathlib import Path

from hypothesis import settings

from service.threads import set_thread_env

set_thread_env(1)
# Without a GPU, Triton's kernels run step by step on the CPU. It is read when they are defined.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A change fails by what is in it, not by chance. `make soak` looks for what other examples find.
settings.register_profile("same examples", derandomize=True)
settings.load_profile("same examples")
