"""The line that shows how a run goes. Owns its counts; knows nothing of sending."""

from collections import Counter

from rich.console import Console
from rich.live import Live
from rich.text import Text

from bench.goodputs.load import OpenLoop
from bench.goodputs.records import Record
from bench.goodputs.slo import Slo

_PER_S = 2.0


class Progress:
    """Shows a live line on a terminal, else nothing; a context manager."""

    def __init__(self, slo: Slo) -> None:
        self._slo = slo
        self._console = Console(stderr=True)
        self._loop: OpenLoop | None = None
        self._rate, self._requests = 0.0, 0
        self._ended: Counter[str] = Counter()
        self._met = self._counted = 0
        self._late_s = 0.0
        self._live = Live(
            get_renderable=self.line,
            console=self._console,
            refresh_per_second=_PER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def begin(self, loop: OpenLoop, rate: float, requests: int) -> None:
        """Begin to count anew."""
        self._loop, self._rate, self._requests = loop, rate, requests
        self._ended.clear()
        self._met = self._counted = 0
        self._late_s = 0.0

    def ended(self, record: Record) -> None:
        """Count a request that is over."""
        self._ended[record.outcome] += 1
        self._late_s = max(self._late_s, record.late_s)
        if record.part == "window":
            self._counted += 1
            self._met += self._slo.met_by(record)

    def say(self, line: str) -> None:
        """Print a line that stays, above the live one."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def line(self) -> Text:
        """Return the line as it is now."""
        if self._loop is None:
            return Text("connecting")
        kept = f"{100 * self._met / self._counted:.0f}%" if self._counted else "-"
        late = f"sent {1e3 * self._late_s:.0f} ms late at most"
        ends = ", ".join(
            f"{count} {outcome}" for outcome, count in sorted(dict(self._ended).items())
        )
        return Text(
            f"{self._rate:g}/s: sent {self._loop.sent} of {self._requests}, {self._loop.open} open,"
            f" {ends or 'none ended'}; attained {kept}, {late}"
        )

    def __enter__(self) -> "Progress":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
