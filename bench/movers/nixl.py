"""The peer: NIXL's UCX backend, from an environment of its own, in each of its modes."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from bench.movers.pair import Pair, SideName
from bench.movers.works import Carrier, Work
from bench.sides import answers

SETUP = """\
For NIXL beside it, set up an environment of its own and name its interpreter with --peer-python:
    python -m venv peer
    peer/bin/pip install --no-deps nixl-cu12 libucx-cu12
    peer/bin/pip install torch==2.13.0 numpy msgpack"""

_SIDE = Path(__file__).with_name("nixl_side.py")
# Of this project the side knows the loop that answers lines, and nothing else.
_ANSWERS = {"PYTHONPATH": str(Path(answers.__file__).parent)}
_INITIATORS: dict[str, SideName] = {"WRITE": "source", "READ": "target"}


def nixl_s(
    python: Path, work: Work, carrier: Carrier, numbers: Sequence[int]
) -> dict[str, list[float]]:
    """Return, for each mode by name, the seconds that each of these rounds took."""
    seconds: dict[str, list[float]] = {}
    for thread in (False, True):
        with Pair("NIXL", [str(python), str(_SIDE)], carrier, _ANSWERS) as pair:
            version = pair.open(work, progress_thread=thread)["version"]
            for number, (operation, initiator) in itertools.product(numbers, _INITIATORS.items()):
                mode = f"NIXL {version} {operation}" + (" with thread" if thread else "")
                seconds.setdefault(mode, []).extend(
                    pair.move(work, [number], initiator, operation=operation)
                )
    return seconds
