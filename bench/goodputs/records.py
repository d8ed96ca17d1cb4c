"""What became of each request, and the file that keeps it. Owns the file's form."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self, TypeAlias

from bench.workloads.arrivals import Part

Outcome: TypeAlias = Literal["finished", "refused", "timeout", "lost", "failed", "stopped"]
"""refused: no room. lost: no server there, or gone meanwhile. stopped: by the benchmark's end."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One request; moments are seconds since its run began.

    Attributes:
        run: Number of the run that it is of.
        rate: What was offered in that run, requests a second.
        scheduled_s: When it was to be sent.
        sent_s: When it was.
        ended_s: When all was over, be it by an error.
        ttft_s: From sending to the first token; 0 where none came.
        itl_s: The gaps between messages with tokens.
        asked_tokens: What the answer was to have; `output_tokens` is what the server counted.
        error: What the server said, where it was not answered to its end.
    """

    run: int
    rate: float
    index: int
    part: Part
    outcome: Outcome
    scheduled_s: float
    sent_s: float
    ended_s: float
    ttft_s: float = 0.0
    itl_s: tuple[float, ...] = ()
    prompt_tokens: int
    asked_tokens: int
    output_tokens: int = 0
    error: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether it was answered to its end."""
        return self.outcome == "finished"

    @property
    def e2el_s(self) -> float:
        """From sending to the last token."""
        return self.ttft_s + sum(self.itl_s)

    @property
    def tpot_s(self) -> float:
        """Time for each token after the first; 0 where there is none, which keeps any limit."""
        if self.output_tokens <= 1:
            return 0.0
        return sum(self.itl_s) / (self.output_tokens - 1)

    @property
    def late_s(self) -> float:
        """How much later than scheduled it was sent."""
        return self.sent_s - self.scheduled_s


class RecordFile:
    """Records as JSON lines, each written at once; a context manager that closes the file."""

    def __init__(self, path: Path) -> None:
        """Begin a new file; raises OSError."""
        self.path = path
        # Line by line, so that a crash keeps all that were over.
        self._file: IO[str] = path.open("w", buffering=1, encoding="utf-8")

    def write(self, record: Record) -> None:
        """Add a record."""
        self._file.write(json.dumps(asdict(record)) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def read(path: Path) -> list[Record]:
    """Return a file's records; a last line that was cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            fields = json.loads(line)
            records.append(Record(**fields | {"itl_s": tuple(fields["itl_s"])}))
    return records
