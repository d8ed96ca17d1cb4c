"""Owns the router's settings: names, bounds, defaults. Imports nothing heavy."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from router.fairness import Tenants
from router.policies import PolicyName
from router.validate import Caps
from service.addresses import check_distinct, is_address, split_list
from service.logs import LogLevel
from service.security.settings import (
    TlsCa,
    TlsCert,
    TlsKey,
    TlsRequireClientCert,
    TlsServerName,
    TokensFile,
    WorkerTokenFile,
    check_tls,
)

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Cap = Annotated[int, Field(ge=1)]


class RouterConfig(BaseModel):
    """What `twinpool router` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(
        default=9000, ge=0, le=65535, description="Port to listen on; 0 takes a free one."
    )
    prefill: tuple[str, ...] = Field(
        default=(),
        description="host:port of a prefill instance; repeat it or separate them by commas. Those"
        " alone may then register, and status says which are missing. Any may unless it is given.",
    )
    decode: tuple[str, ...] = Field(default=(), description="The same for decode instances.")
    max_models: int = Field(
        default=16, ge=1, description="Models that instances may come with; one more is refused."
    )
    max_queue: int = Field(
        default=1024,
        ge=1,
        description="Requests to a model that may wait for room; more are refused.",
    )
    max_queue_wait_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds a request, new or moving, may wait for room or an instance at most.",
    )
    local_prefill_max: int = Field(
        default=0,
        ge=0,
        description="Tokens of a prompt that its decode instance may compute itself, where that is"
        " expected to be sooner done than at prefill; 0 has prefill compute all.",
    )
    max_bypasses: int = Field(
        default=64,
        ge=1,
        description="Times later requests may overtake one that does not fit yet.",
    )
    policy: PolicyName = Field(
        default="least-loaded", description="How instances are chosen for a request."
    )
    hedge_prefill: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Ask a second prefill instance once a first token takes so many times as long"
        " as usual; 0 is off.",
    )
    reserve: Literal["fixed", "expected"] = Field(
        default="fixed",
        description="What is booked at decode instances with --kv-overcommit: room for as much"
        " output as that says, or for what the tenant's own answers come to.",
    )
    reserve_quantile: float = Field(
        default=0.9,
        ge=0.5,
        le=0.99,
        description="With --reserve expected, the part of answers that keep to what is booked.",
    )
    breaker_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Part of an instance's last requests whose failure suspends it; 0 is off.",
    )
    refuse_early: bool = Field(
        default=True,
        description="Refuse at once what, as far as is known, cannot start in time.",
    )
    tenant_weight: dict[str, Weight] = Field(
        default_factory=dict,
        description="Share of each model's KV room, while others wait, of a tenant, or of * for any"
        " other; 1 where none is given.",
    )
    max_tenant_requests: dict[str, Cap] = Field(
        default_factory=dict,
        description="Open requests of a tenant, or of * for any other, to a model at most.",
    )
    max_tenant_queued: dict[str, Cap] = Field(
        default_factory=dict,
        description="Requests of a tenant, or of * for any other, that may wait for room of a model"
        " at most.",
    )
    max_tenant_tokens: dict[str, Cap] = Field(
        default_factory=dict,
        description="Tokens that open requests of a tenant, or of * for any other, to a model may"
        " come to hold room for at most.",
    )
    max_prefill_requests: int = Field(
        default=256, ge=1, description="Requests given to one prefill instance at once."
    )
    default_timeout_s: float = Field(
        default=600.0, gt=0, description="Deadline of requests that come without one."
    )
    default_max_new_tokens: int = Field(
        default=512, ge=1, description="Tokens generated at most where the request does not say."
    )
    max_new_tokens: int = Field(
        default=131072, ge=1, description="Largest max_new_tokens a request may ask for."
    )
    max_prompt_tokens: int = Field(
        default=1048576, ge=1, description="Longest prompt in tokens, if the model takes it."
    )
    max_prompt_chars: int = Field(
        default=8388608, ge=1, description="Longest prompt in characters."
    )
    max_messages: int = Field(default=1024, ge=1, description="Messages in a prompt at most.")
    max_stop_strings: int = Field(default=16, ge=0, description="Stop strings at most.")
    max_stop_chars: int = Field(default=256, ge=1, description="Longest stop string.")
    max_stop_token_ids: int = Field(default=64, ge=0, description="Stop token ids at most.")
    max_logprobs: int = Field(
        default=20, ge=0, le=20, description="Log-probabilities a position at most."
    )
    max_retries: int = Field(
        default=2,
        ge=0,
        le=15,
        description="Times in a row a request is started over without a token from decode.",
    )
    restart_grace_s: float = Field(
        default=5.0,
        ge=0,
        description="Seconds that new requests wait for a pool whose last instance has gone.",
    )
    heartbeat_interval_s: float = Field(
        default=1.0, ge=0.05, le=60, description="Seconds between instances' heartbeats."
    )
    heartbeats_missed: int = Field(
        default=3, ge=1, le=100, description="Missed heartbeats that make an instance lost."
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0, description="Seconds that open requests may take after SIGTERM."
    )
    tls_cert: TlsCert = None
    tls_key: TlsKey = None
    tls_ca: TlsCa = None
    tls_require_client_cert: TlsRequireClientCert = False
    tls_server_name: TlsServerName = ""
    tokens_file: TokensFile = None
    worker_token_file: WorkerTokenFile = None
    reflection: bool = Field(default=False, description="Offer gRPC reflection.")
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="Port of Prometheus metrics on loopback; 0 is off."
    )
    log_level: LogLevel = Field(default="info", description="What to log.")
    log_json: bool = Field(default=False, description="Log JSON lines.")
    access_log: str = Field(
        default="",
        description="File that gets a JSON line for each request at its end, or - for stdout.",
    )

    @field_validator("prefill", "decode", mode="before")
    @classmethod
    def _split_instances(cls, instances: object) -> object:
        return split_list(instances)

    @field_validator("prefill", "decode")
    @classmethod
    def _are_addresses(cls, instances: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(is_address, instances)):
            raise ValueError("must be host:port, as the instance says where it is called")
        check_distinct(instances, "instance")
        return instances

    @model_validator(mode="after")
    def _has_whole_tls(self) -> Self:
        check_tls(self)
        return self

    @property
    def tenants(self) -> Tenants:
        return Tenants(
            weights=self.tenant_weight,
            max_requests=self.max_tenant_requests,
            max_queued=self.max_tenant_queued,
            max_tokens=self.max_tenant_tokens,
        )

    @property
    def caps(self) -> Caps:
        return Caps(
            max_prompt_tokens=self.max_prompt_tokens,
            max_prompt_chars=self.max_prompt_chars,
            max_messages=self.max_messages,
            max_new_tokens=self.max_new_tokens,
            default_max_new_tokens=self.default_max_new_tokens,
            max_stop_strings=self.max_stop_strings,
            max_stop_chars=self.max_stop_chars,
            max_stop_token_ids=self.max_stop_token_ids,
            max_logprobs=self.max_logprobs,
        )
