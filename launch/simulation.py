"""What `twinpool simulate` takes, and the setup and load that follow. Checks; runs nothing."""

import math
import re
from pathlib import Path
from typing import Annotated, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from planner.calibration import assumed, read_calibration
from planner.hardware import find_device
from planner.layout import Role
from planner.models import find_model
from planner.pools import Slo
from planner.simulator.arrivals import at_random, rate_of, repeated
from planner.simulator.setup import Beside, Loss, Setup
from planner.simulator.sizing import Instances, SetupError, Sizing, parse_instances
from planner.traces import Request, read_trace
from router.policies import PolicyName
from service.config import Positional
from service.durations import Limit, Seconds, seconds
from service.options import Flag

_REQUESTS = 1000
_LOSS = re.compile(r"(prefill|decode)(?::(\d+))?@(.+)")


def _split(value: object) -> object:
    """Return the parts of texts with commas: "1,2" and "4" are three."""
    if not isinstance(value, list):
        return value
    return [part for each in value for part in str(each).split(",")]


Rate: TypeAlias = Annotated[float, Field(gt=0)]


class SimulationConfig(BaseModel):
    """Which instances, what load, and what answers are to keep to."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Annotated[str, Positional("MODEL")] = Field(
        description="A config.json, a folder that has one, or a published model's name."
    )
    gpu: str = Field(description="Kind of device, as h100.")
    prefill: str | None = Field(default=None, description="Prefill instances, as 2xtp2.")
    decode: str | None = Field(default=None, description="Decode instances, as 4xtp1.")
    colocated: str | None = Field(
        default=None, description="Instances that do both, in the place of the two, as 6xtp2."
    )
    trace: Path | None = Field(
        default=None, description="Azure's CSV or Mooncake's JSONL; may be gzipped."
    )
    prompt_tokens: int | None = Field(default=None, ge=1, description="In the place of a trace.")
    output_tokens: int | None = Field(default=None, ge=1, description="In the place of a trace.")
    requests: int | None = Field(
        default=None,
        ge=2,
        description="The trace's first ones, or all of it again and again; without a trace"
        f" {_REQUESTS} unless given.",
    )
    rates: Annotated[tuple[Rate, ...], BeforeValidator(_split)] = Field(
        default=(), description="Requests a second, as 1,2,4; the trace's own unless given."
    )
    search: bool = Field(
        default=False, description="Find the highest rate that attains enough, from --rates on."
    )
    ttft: Limit | None = Field(default=None, description="Limit of the time to first token.")
    tpot: Limit | None = Field(
        default=None, description="Limit of the time for each token after it."
    )
    attainment: float = Field(
        default=0.9, gt=0, lt=1, description="Part of the requests that must keep both limits."
    )
    policy: PolicyName = Field(default="least-loaded", description="How routers place requests.")
    routers: int = Field(
        default=1, ge=1, description="Routers, each with its part of the instances."
    )
    lose: list[str] = Field(
        default=[], description="An instance that is lost, as decode@60s or prefill:1@2min."
    )
    reserve: float = Field(default=0.1, ge=0, lt=1, description="Part of memory that stays free.")
    max_batch: int = Field(default=256, ge=1, description="Sequences of a decode step, times dp.")
    max_batched_tokens: int = Field(
        default=2048, ge=32, description="Prompt tokens of a prefill step, times cp."
    )
    chunk_tokens: int = Field(
        default=512, ge=2, description="With --colocated, tokens of a step, times dp."
    )
    max_queue: int = Field(
        default=1024, ge=1, description="Requests that wait at a router; more are refused."
    )
    max_queue_wait: Limit = Field(
        default=60.0, description="That a request waits for room at most."
    )
    hop: Seconds = Field(
        default=0.001,
        ge=0,
        description="Between client and instance over the router, in one direction.",
    )
    hand_over: Seconds = Field(
        default=0.0,
        ge=0,
        description="From prefill's end to decode's beginning, beside the transfer.",
    )
    calibration: str | None = Field(
        default=None, description="A measured calibration: a file, or a shipped one's name."
    )
    weight_bits: float | None = Field(
        default=None, gt=0, description="Of a weight; the model's own unless given."
    )
    kv_bits: float | None = Field(
        default=None, gt=0, description="Of an element of KV; the model's own unless given."
    )
    seed: int = Field(default=0, ge=0, description="Of arrivals at random.")
    json_file: Annotated[Path | None, Flag("--json")] = Field(
        default=None, description="Write all figures to this file."
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        is_split = self.prefill is not None and self.decode is not None
        if is_split is (self.colocated is not None) or (
            self.colocated is not None and (self.prefill or self.decode)
        ):
            raise ValueError("give --prefill and --decode, or --colocated alone")
        lengths = self.prompt_tokens is not None, self.output_tokens is not None
        drawn = all(lengths)
        if any(lengths) if self.trace is not None else not drawn:
            raise ValueError("give --trace, or --prompt-tokens and --output-tokens")
        if drawn and not self.rates:
            raise ValueError("--rates: is required without a trace")
        if self.search and (self.ttft is None or self.tpot is None):
            raise ValueError("--search: needs limits: give --ttft and --tpot")
        if self.search and len(self.rates) > 1:
            raise ValueError("--search: begins at one rate; give one at most")
        return self

    @property
    def limits(self) -> Slo:
        """What answers are to keep to."""
        return Slo(
            ttft_s=self.ttft or math.inf, tpot_s=self.tpot or math.inf, attainment=self.attainment
        )

    def load(self) -> list[Request]:
        """Return the requests, at the first rate that is asked for. Raises TraceError."""
        if self.trace is None:
            assert self.prompt_tokens is not None
            assert self.output_tokens is not None
            count = self.requests or _REQUESTS
            return at_random(
                count, self.prompt_tokens, self.output_tokens, self.rates[0], self.seed
            )
        requests = read_trace(self.trace)
        if rate_of(requests) == 0:
            raise SetupError(f"--trace: all requests of {self.trace} come at one time")
        return repeated(requests, self.requests or len(requests))

    def setup(self) -> Setup:
        """Return what is simulated. Raises PlannerError where it cannot be had."""
        sizing = self._sizing()
        prefills = None
        if self.prefill is not None:
            wanted = parse_instances(self.prefill, Role.PREFILL)
            prefills = sizing.prefills(wanted, max_batched_tokens=self.max_batched_tokens)
        chunk_tokens = self.chunk_tokens if self.colocated is not None else None
        try:
            return Setup(
                prefills=prefills,
                decodes=sizing.decodes(
                    self._decodes, max_batch=self.max_batch, chunk_tokens=chunk_tokens
                ),
                routers=self.routers,
                policy=self.policy,
                beside=Beside(request_s=self.hop, answer_s=self.hop, hand_over_s=self.hand_over),
                losses=tuple(map(_loss, self.lose)),
                max_queue=self.max_queue,
                max_queue_wait_s=self.max_queue_wait,
            )
        except ValueError as exc:
            raise SetupError(str(exc)) from exc

    @property
    def _decodes(self) -> Instances:
        return parse_instances(self.colocated or self.decode or "", Role.DECODE)

    @property
    def devices(self) -> int:
        """Devices of all instances. Raises SetupError."""
        if self.prefill is None:
            return self._decodes.devices
        return self._decodes.devices + parse_instances(self.prefill, Role.PREFILL).devices

    def _sizing(self) -> Sizing:
        shape = find_model(self.model, self.weight_bits, self.kv_bits)
        device = find_device(self.gpu)
        calibration = assumed(device.name)
        if self.calibration is not None:
            calibration = read_calibration(self.calibration, device.name, shape.name)
        return Sizing(shape=shape, device=device, calibration=calibration, reserve=self.reserve)


def _loss(text: str) -> Loss:
    match = _LOSS.fullmatch(text)
    if match is None:
        raise SetupError(f"--lose: found {text!r}; write decode@60s, or prefill:1@60s")
    try:
        at_s = seconds(match[3])
    except ValueError as exc:
        raise SetupError(f"--lose: found {text!r}; the time {exc}") from exc
    assert isinstance(at_s, float)
    return Loss(role=Role(match[1]), instance=int(match[2] or 0), at_s=at_s)
