"""The limits that an answer is to keep to, and those that MLPerf has. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.goodputs.records import Record


@dataclass(frozen=True, kw_only=True)
class Slo:
    """Limits of an answer's times, in seconds; None is none.

    As in `vllm bench serve` a request is good when it keeps all of them, and one that comes to its
    limit exactly keeps it.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2el_s: float | None = None

    def scaled(self, factor: float) -> "Slo":
        """Return limits so many times as long."""
        return Slo(
            **{name: None if limit is None else limit * factor for name, limit in self._limits()}
        )

    def met_by(self, record: Record) -> bool:
        """Tell whether a request was answered to its end within all limits."""
        return record.is_finished and not self.missed(record)

    def missed(self, record: Record) -> tuple[str, ...]:
        """Return which limits a finished request was beyond, as "ttft_s"."""
        return tuple(
            name
            for name, limit in self._limits()
            if limit is not None and not _OF[name](record) <= limit
        )

    def each(self) -> dict[str, "Slo"]:
        """Return each limit alone, by its name in figures."""
        return {
            name.removesuffix("_s").upper(): Slo(**{name: limit})
            for name, limit in self._limits()
            if limit is not None
        }

    def __str__(self) -> str:
        said = [f"{name} {next(iter(one._given())):g} s" for name, one in self.each().items()]
        return ", ".join(said) or "no limits"

    def _limits(self) -> tuple[tuple[str, float | None], ...]:
        return ("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s), ("e2el_s", self.e2el_s)

    def _given(self) -> list[float]:
        return [limit for _, limit in self._limits() if limit is not None]


_OF: Mapping[str, Callable[[Record], float]] = {
    "ttft_s": lambda record: record.ttft_s,
    "tpot_s": lambda record: record.tpot_s,
    "e2el_s": lambda record: record.e2el_s,
}


def _of(ttft_ms: int, tpot_ms: int) -> Slo:
    return Slo(ttft_s=ttft_ms / 1e3, tpot_s=tpot_ms / 1e3)


# From the tables of MLCommons' inference_policies, inference_rules.adoc (of July 2026), which has
# them kept by 99% of requests.
MLPERF: Mapping[str, Slo] = {
    "llama2-70b-server": _of(2000, 200),
    "llama2-70b-interactive": _of(450, 40),
    "llama3.1-8b-server": _of(2000, 100),
    "llama3.1-8b-interactive": _of(500, 30),
    "llama3.1-405b-server": _of(6000, 175),
    "llama3.1-405b-interactive": _of(4500, 80),
    "mixtral-8x7b-server": _of(2000, 200),
    "deepseek-r1-server": _of(2000, 80),
    "deepseek-r1-interactive": _of(1500, 15),
    "gpt-oss-120b-server": _of(3000, 80),
    "gpt-oss-120b-interactive": _of(2000, 20),
}
