"""What a process that serves spares its collector."""

import subprocess
import sys

SHOW = """
import gc
from service.garbage import collect_rarely

kept = [[] for _ in range(5000)]
collect_rarely()
print(gc.get_freeze_count() >= len(kept), gc.get_threshold()[0] > 700, gc.isenabled())
"""


def test_what_is_there_at_the_start_is_not_looked_at_again() -> None:
    ran = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True"] * 3
