"""What a process that gives way tells the kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

AUTOGROUP = Path("/proc/self/autogroup")
SHOW = """
import os, pathlib, sys
from service.priority import give_way

for nice in sys.argv[1:]:
    give_way(int(nice))
print(os.getpriority(os.PRIO_PROCESS, 0))
group = pathlib.Path("/proc/self/autogroup")
print(group.read_text().split()[-1] if group.exists() else "none")
"""


def niceness(*nice: int) -> list[str]:
    """That of a process with its session, which has given way so often."""
    ran = subprocess.run(
        [sys.executable, "-c", SHOW, *map(str, nice)],
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    )
    return ran.stdout.split()


@pytest.mark.skipif(os.getpriority(os.PRIO_PROCESS, 0) != 0, reason="the tests run with a niceness")
def test_gives_way_within_its_session_and_beside_others() -> None:
    as_group = "7" if AUTOGROUP.exists() else "none"
    assert niceness(7) == ["7", as_group]
    assert niceness(7, 3)[0] == "7"
    assert niceness(0)[0] == "0"
