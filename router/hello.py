"""Owns the reading of what an instance sends over its Register stream: hello, heartbeat, credit
and news of the prefix cache.

Turns wire messages into `membership`'s types and refuses what does not make sense by itself.
"""

import math

from twinpool.v1 import common_pb2, kv_pb2, worker_pb2

from router.ledger import Capacity, InstanceKey
from router.membership import Blocks, Credit, Heartbeat, Instance, Layout, Model, Pair, Role
from router.prefix_index import PrefixEvents
from service.errors import InvalidRequest
from service.step_fit import StepSpeed

_ROLES = {common_pb2.ROLE_PREFILL: Role.PREFILL, common_pb2.ROLE_DECODE: Role.DECODE}
_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_DTYPES = tuple(_ELEMENT_BYTES)
_MAX_NAME_CHARS = 128
# A folder's name may be as long; what is shown in metrics and errors is to be bounded.
_MAX_MODEL_CHARS = 256
_MAX_SHARDS = 4096
_MAX_SEED_BYTES = 256
# What a heartbeat may tell of; the rest is left out.
_MOST_PAIRS = 4096


def instance_from_wire(hello: worker_pb2.InstanceHello) -> Instance:
    """Raises InvalidRequest naming the field that makes no sense."""
    _require(
        1 <= len(hello.name) <= _MAX_NAME_CHARS and hello.name.isprintable(),
        "hello.name",
        repr(hello.name[:_MAX_NAME_CHARS]),
        f"1 to {_MAX_NAME_CHARS} printable characters are needed",
    )
    _require(hello.epoch > 0, "hello.epoch", hello.epoch, "a number above 0 is needed")
    _require(hello.role in _ROLES, "hello.role", hello.role, "prefill or decode is needed")
    _check_address(hello.address)
    role = _ROLES[hello.role]
    if role is Role.DECODE:
        _require(bool(hello.data_token), "hello.data_token", "empty", "a secret is needed")
    return Instance(
        key=InstanceKey(hello.name, hello.epoch),
        role=role,
        address=hello.address,
        model=_model(hello.model),
        layout=_layout(hello, role),
        capacity=_capacity(hello.capacity, hello.layout, role),
        data_token=hello.data_token,
        version=hello.version,
        prefix_seed=_prefix_seed(hello.prefix_seed),
        credits=hello.credits and role is Role.DECODE,
    )


def heartbeat_from_wire(message: worker_pb2.Heartbeat) -> Heartbeat:
    blocks = message.blocks
    return Heartbeat(
        blocks=Blocks(
            total=blocks.total,
            free=blocks.free,
            reserved=blocks.reserved,
            used=blocks.used,
            quarantined=blocks.quarantined,
            cached=blocks.cached,
        ),
        running=message.running,
        waiting=message.waiting,
        pairs=tuple(_pair(pair) for pair in message.pairs[:_MOST_PAIRS]),
        speed=_speed(message.speed) if message.HasField("speed") else None,
    )


def _speed(message: worker_pb2.StepSpeed) -> StepSpeed | None:
    """Returns None for what no instance can measure: placement would never recover from it."""
    parts = (message.base_s, message.sequence_s, message.token_s)
    if not all(math.isfinite(part) and part >= 0 for part in parts) or not any(parts):
        return None
    return StepSpeed(base_s=message.base_s, sequence_s=message.sequence_s, token_s=message.token_s)


def prefix_events_from_wire(message: worker_pb2.PrefixEvents) -> PrefixEvents:
    return PrefixEvents(
        sequence=message.sequence,
        reset=message.reset,
        stored=message.stored,
        removed=message.removed,
    )


def credit_from_wire(message: worker_pb2.Credit, capacity: Capacity) -> Credit:
    """Raises InvalidRequest where the instance gives what it does not have."""
    _require(
        len(message.blocks) == capacity.dp,
        "credit.blocks",
        f"those of {len(message.blocks)} dp ranks",
        f"the instance has {capacity.dp}",
    )
    most = max(message.blocks)
    _require(
        most <= capacity.dp_blocks,
        "credit.blocks",
        most,
        f"a dp rank has {capacity.dp_blocks}",
    )
    _require(
        message.sequences <= capacity.max_sequences,
        "credit.sequences",
        message.sequences,
        f"the instance has {capacity.max_sequences}",
    )
    return Credit(
        serial=message.serial,
        blocks=tuple(message.blocks),
        sequences=message.sequences,
        shared=message.shared,
        scarce=message.scarce,
    )


def _pair(message: worker_pb2.KvPair) -> Pair:
    return Pair(
        peer=message.peer,
        rank=message.rank,
        transport=message.transport,
        rtt_s=message.rtt_s,
        bytes_per_s=message.bytes_per_s,
        note=message.note,
    )


def _model(message: worker_pb2.ModelDescription) -> Model:
    _require(
        1 <= len(message.name) <= _MAX_MODEL_CHARS and message.name.isprintable(),
        "hello.model.name",
        repr(message.name[:_MAX_NAME_CHARS]),
        f"1 to {_MAX_MODEL_CHARS} printable characters are needed: set --served-model-name",
    )
    for name in ("fingerprint", "architecture", "assets_digest"):
        value = getattr(message, name)
        _require(bool(value), f"hello.model.{name}", "empty", "it must be set")
    _require_dtype("hello.model.dtype", message.dtype)
    for name in ("max_model_len", "vocab_size"):
        value = getattr(message, name)
        _require(value > 0, f"hello.model.{name}", value, "a number above 0 is needed")
    return Model(
        name=message.name,
        fingerprint=message.fingerprint,
        architecture=message.architecture,
        dtype=message.dtype,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        assets_digest=message.assets_digest,
    )


def _prefix_seed(seed: bytes) -> bytes:
    _require(
        len(seed) <= _MAX_SEED_BYTES,
        "hello.prefix_seed",
        f"{len(seed)} bytes",
        f"at most {_MAX_SEED_BYTES} are allowed",
    )
    return seed


def _capacity(message: worker_pb2.Capacity, layout: kv_pb2.KvLayout, role: Role) -> Capacity:
    for name in ("blocks", "block_size", "max_sequences", "max_sequence_tokens"):
        value = getattr(message, name)
        _require(value > 0, f"hello.capacity.{name}", value, "a number above 0 is needed")
    _require(
        message.block_size % layout.block_size == 0,
        "hello.capacity.block_size",
        message.block_size,
        f"a multiple of the layout's block_size, {layout.block_size} here, is needed",
    )
    _require(
        message.block_size % _cp(layout) == 0,
        "hello.capacity.block_size",
        message.block_size,
        f"a multiple of the {_cp(layout)} cp ranks is needed",
    )
    dp = max(1, message.dp)
    # Each has ranks of its own; it also bounds what is kept for each of them here.
    _require(
        len(layout.shards) % dp == 0,
        "hello.capacity.dp",
        dp,
        f"a divisor of the layout's {len(layout.shards)} ranks is needed",
    )
    _require(
        message.blocks % dp == 0,
        "hello.capacity.blocks",
        message.blocks,
        f"as many for each of {dp} dp ranks are needed",
    )
    _require(
        not message.colocated or (role is Role.DECODE and message.local_prefill_tokens > 0),
        "hello.capacity.colocated",
        f"a {role.value} instance with local_prefill_tokens {message.local_prefill_tokens}",
        "a decode instance that computes prompts is needed",
    )
    return Capacity(
        blocks=message.blocks,
        block_size=message.block_size,
        max_sequences=message.max_sequences,
        max_sequence_tokens=message.max_sequence_tokens,
        cp=_cp(layout),
        dp=dp,
        expected_output_tokens=message.expected_output_tokens,
        token_bytes=_token_bytes(layout),
        local_prefill_tokens=message.local_prefill_tokens,
        colocated=message.colocated,
    )


def _token_bytes(layout: kv_pb2.KvLayout) -> int:
    """Returns the bytes of a token that is far from the end; states are of sequences."""
    shapes = [group.shape for group in (layout, *layout.more_groups)]
    return sum(
        shape.layers
        * (shape.planes or 2)
        * shape.kv_heads
        * shape.head_size
        * _ELEMENT_BYTES.get(shape.dtype, 0)
        for shape in shapes
        if not shape.state and not shape.window
    )


def _layout(hello: worker_pb2.InstanceHello, role: Role) -> Layout:
    message, shape = hello.layout, hello.layout.shape
    for name in ("layers", "kv_heads", "head_size"):
        value = getattr(shape, name)
        _require(value > 0, f"hello.layout.shape.{name}", value, "a number above 0 is needed")
    _require_dtype("hello.layout.shape.dtype", shape.dtype)
    shards = message.shards
    _require(
        1 <= len(shards) <= _MAX_SHARDS,
        "hello.layout.shards",
        f"{len(shards)} shards",
        f"1 to {_MAX_SHARDS} are allowed",
    )
    _require(
        hello.ep <= len(shards),
        "hello.ep",
        hello.ep,
        f"at most the layout's {len(shards)} ranks are needed",
    )
    for index, shard in enumerate(shards):
        _require(
            shard.cp_size <= len(shards),
            f"hello.layout.shards[{index}].cp_size",
            shard.cp_size,
            f"there are {len(shards)} shards",
        )
        listens = bool(shard.data_host) and shard.data_port > 0
        _require(
            role is Role.PREFILL or listens,
            f"hello.layout.shards[{index}].data_host",
            f"{shard.data_host!r}, port {shard.data_port}",
            "each decode rank needs the address its transfer agent listens on",
        )
    return Layout(
        shape=(shape.layers, shape.kv_heads, shape.head_size, shape.dtype),
        summary=_summary(message, max(1, hello.capacity.dp), hello.ep),
        wire=message.SerializeToString(),
        cp=_cp(message),
    )


def _cp(message: kv_pb2.KvLayout) -> int:
    return max([1, *(shard.cp_size for shard in message.shards)])


def _summary(message: kv_pb2.KvLayout, dp: int, ep: int) -> str:
    """Returns the short form that people read, "cp4 tp2"; parts of one are left out, but tp."""
    cp = _cp(message)
    pp = len({(shard.layers.begin, shard.layers.end) for shard in message.shards})
    tp = max(1, len(message.shards) // (cp * pp * dp))
    parts = [f"{name}{size}" for name, size in (("dp", dp), ("cp", cp), ("pp", pp)) if size > 1]
    parts += [f"tp{tp}"] if tp > 1 or not parts else []
    return " ".join([*parts, *([f"ep{ep}"] if ep > 1 else [])])


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    _require(
        bool(host) and port.isdigit() and 0 < int(port) < 65536 and "/" not in host,
        "hello.address",
        repr(address[:_MAX_NAME_CHARS]),
        "host:port of the instance's gRPC server is needed",
    )


def _require_dtype(field: str, dtype: str) -> None:
    _require(dtype in _DTYPES, field, repr(dtype[:32]), f"one of {', '.join(_DTYPES)} is needed")


def _require(condition: bool, field: str, found: object, hint: str) -> None:
    if not condition:
        raise InvalidRequest(field, found, hint)
