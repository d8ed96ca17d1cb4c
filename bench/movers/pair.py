"""Two processes, sender and receiver, each on its core, driven through rounds by JSON lines.

Owns the processes, the order of a round and its clock; knows nothing of how bytes move. A side
answers every line with one line:

- `open`: the pool is made and filled. The answer is what the other side needs to know.
- `meet`: with the other side's answer.
- `prepare`: which slices are `mine` and `theirs`; written-to slices are cleared, caches flushed.
  From here until `finish` a side that only reacts keeps its transport going.
- `go`, to the side that initiates: the answer comes when the move is over for this side.
- `finish`, to the other: likewise. One of the two answers says when the move `began`, one when it
  `ended`; both read the clock that all processes of a machine share.
- `check`, to the receiver: every byte is where it belongs, or an error.
"""

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Literal, Self

from bench.movers.cores import pinned, sender_and_receiver
from bench.movers.works import Carrier, Work, choice

_ANSWER_S = 60.0
_EXIT_S = 10.0

SideName = Literal["source", "target"]


class MoverFailed(RuntimeError):
    """A process that moves bytes died, fell silent, or says that bytes are wrong."""


class Child:
    """One side: a process that answers JSON lines."""

    def __init__(self, name: str, command: Sequence[str], core: int, env: dict[str, str]) -> None:
        """Start `command` on `core`; raises MoverFailed where it cannot be run."""
        self._name = name
        with ExitStack() as stack:
            # A pipe would fill up where nobody reads it.
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            try:
                with pinned(core):
                    self._process = subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=self._stderr,
                        env=env,
                    )
            except OSError as exc:
                raise MoverFailed(f"{name}: {command[0]} cannot be run: {exc}") from exc
            self._stack = stack.pop_all()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self._stdout = self._stack.enter_context(self._process.stdout)

    def tell(self, do: str, **arguments: Any) -> None:
        """Send one command; raises MoverFailed where the process is gone."""
        try:
            self._stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError as exc:
            raise MoverFailed(self._last_words("is gone")) from exc

    def hear(self) -> dict[str, Any]:
        """Wait for the answer; raises MoverFailed for an error, silence or the process's end."""
        if not select.select([self._stdout], [], [], _ANSWER_S)[0]:
            raise MoverFailed(self._last_words(f"gave no answer for {_ANSWER_S:.0f} s"))
        line = self._stdout.readline()
        if not line:
            raise MoverFailed(self._last_words("is gone"))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MoverFailed(f"{self._name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Let the process end by itself, and kill it where it does not."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stack.close()

    def _last_words(self, what: str) -> str:
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        return f"{self._name} {what}; it said: {said[-2000:] or 'nothing'}"


class Pair:
    """Both sides of one way to move bytes; a context manager that ends them."""

    def __init__(self, name: str, command: Sequence[str], carrier: Carrier) -> None:
        """Start `command` twice, with UCX's variables for `carrier` and no others of UCX's."""
        inherited = {key: value for key, value in os.environ.items() if key[:4] != "UCX_"}
        env = inherited | carrier.environment()
        sender, receiver = sender_and_receiver()
        with ExitStack() as stack:
            self._source = Child(f"{name}, sender", command, sender, env)
            stack.callback(self._source.close)
            self._target = Child(f"{name}, receiver", command, receiver, env)
            stack.callback(self._target.close)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def open(self, work: Work, **options: Any) -> dict[str, Any]:
        """Make both sides ready for `work`; returns the sender's answer to `open`."""
        sizes = {"pool_slices": work.pool_slices, "slice_bytes": work.slice_bytes, **options}
        source, target = self._both(
            "open", {"side": "source", **sizes}, {"side": "target", **sizes}
        )
        self._both("meet", {"peer": target}, {"peer": source})
        return source

    def move(
        self, work: Work, numbers: Iterable[int], initiator: SideName = "source", **options: Any
    ) -> list[float]:
        """Run the rounds of these numbers; returns the seconds that each took."""
        said = (self.round(work, number, initiator, **options) for number in numbers)
        return [float(each["ended"] - each["began"]) for each in said]

    def round(
        self, work: Work, number: int, initiator: SideName = "source", **options: Any
    ) -> dict[str, Any]:
        """Run one round; returns what both sides said of it."""
        sources, targets = choice(work, number)
        shared = {"number": number, **options}
        self._both(
            "prepare",
            {"mine": sources, "theirs": targets, "initiate": initiator == "source", **shared},
            {"mine": targets, "theirs": sources, "initiate": initiator == "target", **shared},
        )
        first, second = self._source, self._target
        if initiator == "target":
            first, second = second, first
        first.tell("go")
        times = first.hear()
        second.tell("finish")
        times |= second.hear()
        self._target.tell("check")
        self._target.hear()
        return times

    def _both(
        self, do: str, source: dict[str, Any], target: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        self._source.tell(do, **source)
        self._target.tell(do, **target)
        return self._source.hear(), self._target.hear()
