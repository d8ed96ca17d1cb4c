"""What `python -m bench.goodput` takes, and what it makes of it. Checks; opens no connection."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bench.goodputs.backend import Backend
from bench.goodputs.openai_backend import OpenAIBackend
from bench.goodputs.search import Search, Wanted
from bench.goodputs.slo import MLPERF, Slo
from bench.goodputs.twinpool_backend import TwinpoolBackend
from bench.workloads import traces
from bench.workloads.arrivals import Phases
from bench.workloads.synthetic import lengths
from bench.workloads.workload import Drawn, Replayed, Workload
from service.durations import Limit, Seconds
from service.options import Flag

_START_RATE = 1.0


def _split(value: object) -> object:
    """Return the parts of texts with commas: "1,2" and "4" are three."""
    if not isinstance(value, list):
        return value
    return [part for each in value for part in str(each).split(",")]


def _checked_lengths(value: object) -> str:
    return lengths(str(value)).text


def _known(name: str) -> str:
    if name not in MLPERF:
        raise ValueError(f"must be one of {', '.join(MLPERF)}")
    return name


LengthText: TypeAlias = Annotated[str, BeforeValidator(_checked_lengths)]
Rate: TypeAlias = Annotated[float, Field(gt=0)]


class GoodputConfig(BaseModel):
    """Whom to ask, with what, how fast, and what answers are to keep to."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="constants"
    )

    backend: Literal["twinpool", "openai"] = Field(
        default="twinpool", description="What the server speaks."
    )
    url: str = Field(
        default="127.0.0.1:9000",
        description="Router's HOST:PORT, or http://HOST:PORT of an OpenAI-compatible server, whose"
        " key is taken from OPENAI_API_KEY.",
    )
    model: str = Field(default="", description="Name of the model, where several are served.")
    tls_ca: Path | None = Field(default=None, description="PEM file of the CA of a router's TLS.")
    token_file: Path | None = Field(default=None, description="File of the token for a router.")
    workload: Literal[
        "synthetic", "azure-code", "azure-conv", "mooncake-conversation", "mooncake-synthetic"
    ] = Field(default="synthetic", description="What is asked.")
    traces: Path | None = Field(
        default=None, description="Folder of the public traces' files; needed for their workloads."
    )
    trace: Path | None = Field(
        default=None,
        description="File of requests in Mooncake's format (or Azure's, .csv), in the place of a"
        " workload; .gz is unpacked.",
    )
    prompt_tokens: LengthText = Field(
        default="512",
        description="Of synthetic requests: N, uniform:LOW:HIGH, lognormal:MID:SIGMA.",
    )
    output_tokens: LengthText = Field(default="128", description="The same for answers.")
    burstiness: float = Field(
        default=1.0,
        gt=0,
        description="Of synthetic requests: 1 is Poisson, less comes in bursts, inf is steady.",
    )
    time_scale: float = Field(
        default=1.0, gt=0, description="Stretches a trace's times, where no rate is given."
    )
    length_scale: float = Field(
        default=1.0, gt=0, description="Stretches a trace's prompts and answers."
    )
    spread: Seconds | None = Field(
        default=None,
        description="Puts a trace's requests off by up to this at random; for mooncake-conversation"
        " 3s unless given, since its times are rounded.",
    )
    max_context: int | None = Field(
        default=None, ge=2, description="Leaves out requests of more tokens; the server's limit."
    )
    max_requests: int | None = Field(default=None, ge=1, description="Of a run's window, at most.")
    vocab_size: int = Field(
        default=10_000,
        ge=2,
        description="Prompts are of token ids below it, where the server does not say.",
    )
    seed: int = Field(default=0, ge=0, description="Of all that is random.")
    warmup: Seconds = Field(
        default="10s", ge=0, validate_default=True, description="Requests before those that count."
    )
    duration: Seconds = Field(
        default="60s", gt=0, validate_default=True, description="The window whose requests count."
    )
    cooldown: Seconds = Field(
        default="0s",
        ge=0,
        validate_default=True,
        description="Requests after the window, so that its last ones have company.",
    )
    timeout: Seconds = Field(
        default="600s", gt=0, validate_default=True, description="For one request, at most."
    )
    late_limit: Seconds = Field(
        default="50ms",
        ge=0,
        validate_default=True,
        description="Warns where a request is sent later than this after it was due.",
    )
    slo: Annotated[str, AfterValidator(_known)] | None = Field(
        default=None, description=f"MLPerf's limits: {', '.join(MLPERF)}."
    )
    ttft: Limit | None = Field(
        default=None, description="Limit of the time to first token, as 500ms."
    )
    tpot: Limit | None = Field(
        default=None, description="Limit of the time for each token after it."
    )
    e2el: Limit | None = Field(default=None, description="Limit of the time to the last token.")
    rate: Rate | None = Field(
        default=None, description="Requests a second; a trace's own where none is given."
    )
    rates: Annotated[tuple[Rate, ...], BeforeValidator(_split)] = Field(
        default=(), description="Runs each of them, as 1,2,4."
    )
    search: bool = Field(
        default=False, description="Finds the highest rate that attains enough, from --rate on."
    )
    lowest: Rate = Field(default=0.05, description="Rate below which the search does not go.")
    highest: Rate = Field(default=1000.0, description="Rate above which it does not go.")
    attainment: float = Field(
        default=0.9, gt=0, lt=1, description="Part of the requests that must keep their limits."
    )
    confidence: float = Field(
        default=0.95, gt=0, lt=1, description="Of the intervals that attainments lie in."
    )
    runs: int = Field(
        default=3, ge=1, description="Of one rate at most, where its interval is on no side."
    )
    precision: float = Field(
        default=0.1, ge=0.01, description="Part of the rate to which the search goes on."
    )
    out: Path | None = Field(
        default=None,
        description="New folder for records, figures and the report; else it is named by the time.",
    )
    json_file: Annotated[Path | None, Flag("--json")] = Field(
        default=None, description="Write the figures to this file, too."
    )
    plots: bool = Field(default=True, description="Draw; takes matplotlib.")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.backend == "twinpool" and "://" in self.url:
            raise ValueError(f"--url: found {self.url!r}; a URL is for --backend openai")
        if self.rates and (self.search or self.rate is not None):
            raise ValueError("--rates: cannot be given with --rate or --search")
        if self.search and not self.limits.each():
            raise ValueError("--search: needs limits: give --slo, --ttft, --tpot or --e2el")
        if self.lowest > self.highest:
            raise ValueError(f"--lowest: is above --highest ({self.highest:g})")
        if self._is_named and self.traces is None:
            raise ValueError(f"--traces: is required with --workload {self.workload}")
        needs_rate = self.trace is None and not self._is_named
        if needs_rate and self.rate is None and not self.rates and not self.search:
            raise ValueError("--rate: is required (or --rates, --search) unless a trace has one")
        return self

    @property
    def _is_named(self) -> bool:
        return self.trace is None and self.workload != "synthetic"

    @property
    def limits(self) -> Slo:
        """The limits of MLPerf, if any, with those that were given in their places."""
        named = MLPERF[self.slo] if self.slo else Slo()
        return Slo(
            ttft_s=self.ttft or named.ttft_s,
            tpot_s=self.tpot or named.tpot_s,
            e2el_s=self.e2el or named.e2el_s,
        )

    @property
    def phases(self) -> Phases:
        """How long requests come for."""
        return Phases(warmup_s=self.warmup, window_s=self.duration, cooldown_s=self.cooldown)

    @property
    def wanted(self) -> Wanted:
        """What the search is after."""
        return Wanted(
            attainment=self.attainment,
            confidence=self.confidence,
            runs=self.runs,
            precision=self.precision,
        )

    @property
    def first_rate(self) -> float | None:
        """The rate that is run first; None is a trace's own."""
        if self.search:
            return min(max(self.rate or _START_RATE, self.lowest), self.highest)
        return self.rates[0] if self.rates else self.rate

    def open_search(self) -> Search | None:
        """Return the search, where one is wanted."""
        if not self.search or self.first_rate is None:
            return None
        return Search(self.wanted, start=self.first_rate, lowest=self.lowest, highest=self.highest)

    def open_backend(self) -> Backend:
        """Return the server, in the loop that is to use it; raises ValueError."""
        if self.backend == "openai":
            key = os.environ.get("OPENAI_API_KEY", "")
            return OpenAIBackend(self.url, model=self.model, api_key=key)
        return TwinpoolBackend(
            self.url, model=self.model, ca=self.tls_ca, token_file=self.token_file
        )

    def open_workload(self) -> Workload:
        """Return the workload, with its file read; raises WorkloadError."""
        if self.trace is None and not self._is_named:
            return Drawn(
                prompts=lengths(self.prompt_tokens),
                outputs=lengths(self.output_tokens),
                burstiness=self.burstiness,
                seed=self.seed,
            )
        path, spread_s = self.trace, 0.0
        if path is None:
            assert self.traces is not None
            file, spread_s = traces.NAMED[self.workload]
            path = self.traces / file
        return Replayed(
            requests=traces.read(path, spread_s=spread_s if self.spread is None else self.spread),
            time_scale=self.time_scale,
            length_scale=self.length_scale,
        )
