"""Two processes, sender and receiver, each on its core, driven through rounds by JSON lines.

Owns the order of a round and its clock; knows nothing of how bytes move. A side is told:

- `open`: the pool is made and filled. The answer is what the other side needs to know.
- `meet`: with the other side's answer.
- `prepare`: which slices are `mine` and `theirs`; written-to slices are cleared, caches flushed.
  From here until `finish` a side that only reacts keeps its transport going.
- `go`, to the side that initiates: the answer comes when the move is over for this side.
- `finish`, to the other: likewise. One of the two answers says when the move `began`, one when it
  `ended`; both read the clock that all processes of a machine share.
- `check`, to the receiver: every byte is where it belongs, or an error.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

from bench.movers.cores import pinned, sender_and_receiver
from bench.movers.works import Carrier, Work, choice
from bench.sides.process import Side

_ANSWER_S = 60.0
_OF_UCX = ("UCX_",)

SideName = Literal["source", "target"]


class Pair:
    """Both sides of one way to move bytes; a context manager that ends them."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        carrier: Carrier,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Start `command` twice, with UCX's variables for `carrier` and no others of UCX's.

        Raises SideFailed, as all that is asked of the two does.
        """
        settings = {**carrier.environment(), **(settings or {})}
        with ExitStack() as stack:
            self._source, self._target = (
                stack.enter_context(_on_core(core, f"{name}, {role}", command, settings))
                for role, core in zip(("sender", "receiver"), sender_and_receiver(), strict=True)
            )
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


def _on_core(core: int, name: str, command: Sequence[str], settings: Mapping[str, str]) -> Side:
    with pinned(core):
        return Side(name, command, settings, apart_from=_OF_UCX, answer_s=_ANSWER_S)
