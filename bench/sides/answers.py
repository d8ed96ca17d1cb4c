"""The loop of a process that answers lines of JSON. Imports nothing of this project.

A line is {"do": command, ...}, with the command's arguments beside it. Each gets one line in
return: what the command gives back, or {"error": why not}.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def _next_line() -> bytes:
    return sys.stdin.buffer.readline()


def serve(
    commands: Mapping[str, Callable[..., dict[str, Any]]],
    next_line: Callable[[], bytes] = _next_line,
) -> None:
    """Answer lines until there are no more, then end this process at once.

    `next_line` waits for one, and may do something useful meanwhile; b"" is the end.
    """
    # Libraries print to standard output; nothing but answers may be read there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while line := next_line():
        arguments = json.loads(line)
        try:
            answer = commands[arguments.pop("do")](**arguments)
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers, flush=True)
    # Without the orderly end, in which ranks, or a transfer's ends, would wait for each other.
    os._exit(0)
