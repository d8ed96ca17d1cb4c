"""Settings that prefill and decode instances share; imports nothing heavy.

Owns names, bounds and defaults; each role adds its own.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from service.addresses import check_distinct, is_address, split_list
from service.config import Positional
from service.logs import LogLevel
from service.security.settings import (
    TlsCa,
    TlsCert,
    TlsKey,
    TlsRequireClientCert,
    TlsServerName,
    WorkerTokenFile,
    check_tls,
)
from service.threads import default_threads

# Before the name in a router that stands for all addresses of the name.
DNS_PREFIX = "dns:"
_WILDCARDS = ("0.0.0.0", "::")  # what is listened on, never where somebody is reached


class InstanceConfig(BaseModel):
    """What any instance needs to start and to be found."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Annotated[Path, Positional("MODEL")] = Field(
        description="Folder of a Hugging Face checkpoint: config.json, *.safetensors, tokenizer."
    )
    served_model_name: str = Field(
        default="", description="Name clients may ask for; the folder's name unless given."
    )
    router: tuple[str, ...] = Field(
        default=("127.0.0.1:9000",),
        min_length=1,
        description="host:port of a router to join, or dns:NAME:PORT for all addresses of a name;"
        " repeat it or separate them by commas for several.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(
        default=0, ge=0, le=65535, description="Port to listen on; 0 takes a free one."
    )
    advertise_host: str = Field(
        default="", description="Host that others reach this instance by; --host unless given."
    )
    name: str = Field(
        default="",
        description="Name in the cluster, kept after a restart; from role and port unless given.",
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where the model runs.")
    gpu_memory_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Part of the GPU's memory that this process may take, where several share it.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="Type of weights and KV cache; auto takes the checkpoint's."
    )
    block_size: int = Field(default=32, ge=1, le=1024, description="Tokens in a KV cache block.")
    kv_memory_mib: int = Field(default=256, ge=1, description="Memory for the KV cache, in MiB.")
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        description="Tokens of a sequence at most; the model's own limit unless given.",
    )
    threads: int = Field(default_factory=default_threads, ge=1, description="Threads that compute.")
    deterministic: bool = Field(
        default=False,
        description="Give a request the same tokens whatever else is in the batch; slower in"
        " float32 and float16.",
    )
    data_host: str = Field(
        default="127.0.0.1", description="Address that KV data is sent from or taken on."
    )
    kv_lane: Literal["auto", "mapped", "stream", "ucx"] = Field(
        default="auto",
        description="How KV travels: mapped (memory of one host), ucx, stream (TCP), or auto.",
    )
    kv_host_copy: bool = Field(
        default=True,
        description="Send and take a GPU's KV by a copy in the host's memory, as large as the"
        " cache; without one it goes from GPU to GPU in a host, and by small buffers elsewhere.",
    )
    checksum: bool = Field(default=True, description="Check every piece of KV with a crc32.")
    drain_timeout_s: float = Field(
        default=30.0, ge=0, description="Seconds that open requests may take after SIGTERM."
    )
    step_timeout_s: float = Field(
        default=300.0,
        ge=0,
        description="Seconds after which a step is taken to hang: the instance then ends, so that"
        " its requests go on elsewhere; 0 waits for ever.",
    )
    tls_cert: TlsCert = None
    tls_key: TlsKey = None
    tls_ca: TlsCa = None
    tls_require_client_cert: TlsRequireClientCert = False
    tls_server_name: TlsServerName = ""
    worker_token_file: WorkerTokenFile = None
    reflection: bool = Field(default=False, description="Offer gRPC reflection.")
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="Port of Prometheus metrics on loopback; 0 is off."
    )
    log_level: LogLevel = Field(default="info", description="What to log.")
    log_json: bool = Field(default=False, description="Log JSON lines.")

    @field_validator("router", mode="before")
    @classmethod
    def _split_routers(cls, routers: object) -> object:
        return split_list(routers)

    @field_validator("router")
    @classmethod
    def _are_addresses(cls, routers: tuple[str, ...]) -> tuple[str, ...]:
        if not all(is_address(router.removeprefix(DNS_PREFIX)) for router in routers):
            raise ValueError("must be host:port, or dns:NAME:PORT")
        check_distinct(routers, "router")
        return routers

    @field_validator("data_host", "advertise_host")
    @classmethod
    def _is_one_address(cls, host: str) -> str:
        if host in _WILDCARDS:
            raise ValueError("peers need an address that they can reach, not a wildcard")
        return host

    @model_validator(mode="after")
    def _has_whole_tls(self) -> Self:
        check_tls(self)
        return self

    @model_validator(mode="after")
    def _is_reachable(self) -> Self:
        if self.host in _WILDCARDS and not self.advertise_host:
            raise ValueError("--advertise-host: is required where --host is a wildcard")
        return self
