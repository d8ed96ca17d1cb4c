"""A launcher whose engine's steps hang while there is a file named like the instance.

As `python -m prefill` and `python -m decode`, with the role as the first argument. The files are
looked for in $TWINPOOL_TEST_HANGS.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decode.__main__
import decode.compute
import prefill.__main__
import prefill.compute


def hanging(run: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """A step that does not begin while there is the file."""

    def hang_or_run(*args: Any, **more: Any) -> Any:
        while file.exists():
            time.sleep(0.02)
        return run(*args, **more)

    return hang_or_run


def main() -> None:
    """Launch an instance."""
    role = sys.argv.pop(1)
    file = Path(os.environ["TWINPOOL_TEST_HANGS"]) / sys.argv[sys.argv.index("--name") + 1]
    compute = {"prefill": prefill.compute, "decode": decode.compute}[role].RankCompute
    compute.run = hanging(compute.run, file)
    {"prefill": prefill.__main__, "decode": decode.__main__}[role].app()


if __name__ == "__main__":
    main()
