"""What a prefill and a decode instance do alike at start: load the model, say who they are.

Owns the way from a model folder to a runner and to the hello a router gets. Joins nothing of engine
and transfer beyond shapes: that is for the roles.
"""

import asyncio
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from twinpool.v1 import common_pb2, worker_pb2

from engine.cache_memory import CacheMemory, cache_memory
from engine.config import ModelConfig, load_config
from engine.errors import EngineError
from engine.kvcache import Allocate
from engine.parallel import Collectives, ExpertGroup, Layout
from engine.ring.calibrate import MOST_GRAIN, Greatest, Trial
from engine.ring.comm import Wire
from engine.runner import ModelRunner
from engine.weights import fingerprint
from kvtransfer import (
    PROTOCOL_VERSION,
    CacheLayout,
    Identity,
    KVShape,
    compatibility_hash,
    uniform_cache,
)
from kvtransfer.hardware import SlowMemory, check_device_memory
from service.calibration import Calibration
from service.errors import StartError
from service.garbage import collect_rarely
from service.instance_config import InstanceConfig
from service.lifecycle import Server, join_address
from service.malloc import keep_freed_memory
from service.metrics import MetricsEndpoint
from service.routers import Routers
from service.version import server_version
from service.wire import layout_to_wire
from text.assets import TextAssets, load_assets
from text.errors import TextError

log = logging.getLogger(__name__)

_MIB = 1 << 20
# Blocks, of a grain on each rank, that a cache has at least where the grain is chosen.
_LEAST_ROUNDS = 16
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a process has of its instance's model, and the ties to the ranks that have the rest.

    `meet` returns when all ranks have called it, and `greatest` what the ranks' calls give together
    (engine.ring.calibrate). A grain that the layout leaves open has `most_grain` tokens at most.
    """

    layout: Layout = field(default_factory=Layout)
    ranks: Collectives | None = None
    experts: ExpertGroup | None = None
    dispatch: str = "auto"
    redundant_experts: int = 0
    ring: Wire | None = None
    ring_mode: str = "auto"
    stages: Wire | None = None
    rank: int = 0
    meet: Callable[[], None] = lambda: None
    greatest: Greatest = lambda x: x
    most_grain: int = MOST_GRAIN

    @property
    def wires(self) -> dict[str, Wire]:
        """The ties over which messages go, by what for."""
        ties = {"ring": self.ring, "stage": self.stages}
        return {name: wire for name, wire in ties.items() if wire is not None}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model ready to run, and how the cluster knows it. Transfers read and write `memory`."""

    config: ModelConfig
    runner: ModelRunner
    memory: CacheMemory
    layout: CacheLayout
    description: worker_pb2.ModelDescription
    assets: TextAssets
    part: Part

    @property
    def num_blocks(self) -> int:
        """Blocks in the cache, each over all of its cp ranks; each dp rank has as many."""
        return self.runner.num_blocks

    @property
    def block_tokens(self) -> int:
        """Tokens that such a block holds."""
        return self.runner.block_tokens

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens of a sequence at most: what the model and the cache allow."""
        return min(self.description.max_model_len, self.num_blocks * self.block_tokens)


def load_model(
    settings: InstanceConfig,
    allocate: Allocate | None = None,
    part: Part | None = None,
    threads: int | None = None,
    *,
    keeps_logits: bool = False,
) -> Model:
    """Read a model folder and get it ready to run; `allocate` gives the cache its memory.

    `keeps_logits` is ModelRunner's.

    With a `part` all ranks of the instance must do this, since they warm up together.

    Raises:
        StartError: The folder, the device or the memory does not do; the message says which.
    """
    folder = settings.model.expanduser()
    part = part or Part()
    torch.set_num_threads(threads or settings.threads)
    keep_freed_memory()
    device = _device(settings, part)
    started = time.monotonic()
    try:
        config = load_config(folder)
        assets = load_assets(folder)
        dtype = _DTYPES[config.dtype if settings.dtype == "auto" else settings.dtype]
        runner = _runner(settings, config, dtype, device, part, allocate, keeps_logits=keeps_logits)
        memory = cache_memory(runner.cache, allocate, host_copy=settings.kv_host_copy)
        _check_lending(settings, memory)
        part = replace(part, layout=runner.layout)
        part.meet()  # some load longer than others; in a pass they wait for seconds only
        runner.warm_up()
        description = _describe(settings, folder, config, dtype, assets)
    except (EngineError, TextError) as error:
        raise StartError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise StartError(
            f"the GPU has too little memory left for the model and {settings.kv_memory_mib} MiB of"
            " KV: give less with --kv-memory-mib, or more of the GPU with --gpu-memory-fraction"
        ) from error
    log.info(
        "%s (%s, %s) is ready after %.1f s: %d KV blocks of %d tokens",
        description.name,
        description.architecture,
        description.dtype,
        time.monotonic() - started,
        runner.num_blocks,
        runner.block_tokens,
    )
    shape = KVShape(
        layers=config.num_layers,
        planes=config.kv_planes,
        kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        dtype=description.dtype,
    )
    return Model(
        config=config,
        runner=runner,
        memory=memory,
        layout=uniform_cache(
            (shape,),
            settings.block_size,
            tp=part.layout.tp,
            pp=part.layout.pp,
            cp=part.layout.cp,
            dp=part.layout.dp,
            cp_order="cyclic",
            cp_grain=part.layout.cp_grain or None,
        ),
        description=description,
        assets=assets,
        part=part,
    )


@dataclass(frozen=True, kw_only=True)
class Incarnation:
    """One life of an instance: the same name with a later epoch replaces it.

    `data_token` is its secret for those who send KV to it.
    """

    name: str
    epoch: int
    data_token: bytes = field(default_factory=lambda: secrets.token_bytes(16), repr=False)


def new_incarnation(settings: InstanceConfig, role: str) -> Incarnation:
    """Name this start of an instance; clocks are good enough for epochs to rise."""
    return Incarnation(name=_name(settings, role), epoch=time.time_ns())


def make_identity(model: Model, who: Incarnation) -> Identity:
    """Who the instance is on the data path."""
    shapes = [layout.shape for layout in model.layout.groups]
    return Identity(
        instance=who.name,
        epoch=who.epoch,
        compatibility=compatibility_hash(PROTOCOL_VERSION, model.description.fingerprint, shapes),
        token=who.data_token,
    )


def make_hello(
    settings: InstanceConfig,
    model: Model,
    who: Incarnation,
    *,
    role: common_pb2.Role.ValueType,
    port: int,
    max_sequences: int,
    data_addresses: Sequence[tuple[str, int]] = (),
    data_token: bytes = b"",
    prefix_seed: bytes = b"",
    expected_output_tokens: int = 0,
    credits: bool = False,
    local_prefill_tokens: int = 0,
    colocated: bool = False,
) -> worker_pb2.InstanceHello:
    """What the instance tells routers; `data_addresses` is where its ranks take KV, if they do."""
    return worker_pb2.InstanceHello(
        name=who.name,
        epoch=who.epoch,
        role=role,
        address=join_address(settings.advertise_host or settings.host, port),
        model=model.description,
        layout=layout_to_wire(model.layout, data_addresses),
        capacity=worker_pb2.Capacity(
            blocks=model.num_blocks * model.part.layout.dp,
            block_size=model.block_tokens,
            max_sequences=max_sequences,
            max_sequence_tokens=model.max_sequence_tokens,
            dp=model.part.layout.dp,
            expected_output_tokens=expected_output_tokens,
            local_prefill_tokens=local_prefill_tokens,
            colocated=colocated,
        ),
        data_token=data_token,
        version=server_version(),
        prefix_seed=prefix_seed,
        ep=model.part.layout.ep,
        credits=credits,
    )


def _name(settings: InstanceConfig, role: str) -> str:
    """The instance's name in the cluster: the given one, or what its address makes unique."""
    if settings.name:
        return settings.name
    if not settings.port:
        return f"{role}-{secrets.token_hex(3)}"  # the port changes with each start as well
    host = settings.advertise_host or settings.host
    is_local = host in ("127.0.0.1", "::1", "localhost")
    return f"{role}-{settings.port}" if is_local else f"{role}-{host}-{settings.port}"


def _device(settings: InstanceConfig, part: Part) -> torch.device:
    if settings.device == "cpu":
        return torch.device("cpu")
    try:
        check_device_memory(os.environ)
    except SlowMemory as error:
        raise StartError(f"--device cuda: {error}") from error
    if part.layout.ranks > 1:
        raise StartError(
            f"--device cuda: an instance on GPUs has one rank yet, not {part.layout.ranks}; use"
            " --device cpu, or no --tp, --pp, --cp, --dp"
        )
    if not torch.cuda.is_available():
        raise StartError("--device cuda: found no CUDA device that torch can use; use --device cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_per_process_memory_fraction(settings.gpu_memory_fraction, device)
    return device


def _runner(
    settings: InstanceConfig,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    part: Part,
    allocate: Allocate | None,
    *,
    keeps_logits: bool,
) -> ModelRunner:
    """Load a rank's part of the weights, and make room for its cache."""
    blocks = partial(_num_blocks, settings, config, dtype)
    with progress_bar("loading weights", DownloadColumn()) as progress:
        return ModelRunner(
            folder=settings.model.expanduser(),
            config=config,
            dtype=dtype,
            device=device,
            num_blocks=blocks if part.layout.grain_is_open else blocks(part.layout),
            block_size=settings.block_size,
            layout=part.layout,
            ranks=part.ranks,
            experts=part.experts,
            dispatch=part.dispatch,
            redundant_experts=part.redundant_experts,
            ring=part.ring,
            ring_mode=part.ring_mode,
            stages=part.stages,
            keeps_logits=keeps_logits,
            choose_grain=partial(_choose_grain, settings, config, dtype, part),
            progress=progress,
            allocate=allocate if device.type == "cpu" else None,
            deterministic=settings.deterministic,
        )


def _num_blocks(
    settings: InstanceConfig, config: ModelConfig, dtype: torch.dtype, layout: Layout
) -> int:
    block_bytes = ModelRunner.kv_block_bytes(config, dtype, settings.block_size, layout)
    blocks = settings.kv_memory_mib * _MIB // block_bytes
    if blocks == 0:
        raise StartError(
            f"--kv-memory-mib: found {settings.kv_memory_mib}, but one block of"
            f" {settings.block_size} tokens takes {block_bytes / _MIB:.1f} MiB; give more"
        )
    return int(blocks)


def _choose_grain(
    settings: InstanceConfig, config: ModelConfig, dtype: torch.dtype, part: Part, trial: Trial
) -> int:
    """Return the grain that suits this machine, and leaves the cache some blocks."""
    assert part.ring is not None
    calibration = Calibration(
        folder=settings.model.expanduser(),
        config=config,
        dtype=dtype,
        device=torch.device(settings.device),
        layout=part.layout,
        wire=part.ring,
        greatest=part.greatest,
        is_first=part.rank == 0,
    )
    blocks = _num_blocks(settings, config, dtype, replace(part.layout, cp=1, cp_rank=0))
    most = min(part.most_grain, blocks // _LEAST_ROUNDS * settings.block_size)
    return calibration.choose_grain(trial, settings.block_size, most)


def _check_lending(settings: InstanceConfig, memory: CacheMemory) -> None:
    """Raise StartError where a GPU's memory cannot be shared in the way that was asked for."""
    if memory.boxes is None or settings.kv_lane not in ("auto", "mapped"):
        return
    try:
        memory.boxes.lend(memory.tensor)
    except OSError as error:
        raise StartError(
            f"--no-kv-host-copy: {error}; use --kv-host-copy, or --kv-lane stream"
        ) from error


def _describe(
    settings: InstanceConfig,
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    assets: TextAssets,
) -> worker_pb2.ModelDescription:
    limit = config.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > limit:
        raise StartError(
            f"--max-model-len: found {settings.max_model_len}, but the model was made for {limit}"
        )
    return worker_pb2.ModelDescription(
        name=settings.served_model_name or folder.resolve().name,
        fingerprint=fingerprint(folder),
        architecture=config.architecture,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=settings.max_model_len or limit,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        assets_digest=assets.digest,
    )


@contextmanager
def progress_bar(what: str, amount: ProgressColumn) -> Iterator[Callable[[int, int], None] | None]:
    """Give what takes how much is done and of how much, to show it on a terminal.

    None elsewhere, where it would fill the log.
    """
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn(what), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


async def serve_instance(
    settings: InstanceConfig,
    server: Server,
    registry: CollectorRegistry,
    routers: Routers,
    *,
    drain: Callable[[], Coroutine[Any, Any, None]],
    background: Iterable[Coroutine[Any, Any, None]],
) -> None:
    """Serve until told to stop, metrics included; `background` goes on until the drain is over.

    So does the registration with `routers`. From its first step on `drain` has heartbeats say that
    the instance drains.
    """

    async def drain_telling() -> None:
        draining = asyncio.create_task(drain())
        routers.beat()  # until they know they give it requests, which it has to turn away
        await draining

    collect_rarely()
    with ExitStack() as stack:
        if settings.metrics_port:
            stack.enter_context(MetricsEndpoint(registry, port=settings.metrics_port))
        await server.serve_until_stopped(
            drain=drain_telling,
            drain_timeout_s=settings.drain_timeout_s,
            background=[routers.run(), *background],
        )


def die(error: BaseException) -> None:
    """End the process at once: its engine is broken, and peers notice a closed connection best."""
    log.critical("the engine is broken, the instance goes down: %s", type(error).__name__)
    logging.shutdown()
    os._exit(70)
