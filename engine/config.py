"""What a model folder says about its model: config.json and generation_config.json.

Owns reading and checking them. Refuses, by name, whatever the models here do not compute.
Knows nothing of weights or torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What differs between the architectures' config files."""

    moe: bool
    default_head_size: int | None  # None: hidden_size / num_attention_heads


ARCHITECTURES: Mapping[str, _Family] = {
    "Qwen3ForCausalLM": _Family(moe=False, default_head_size=128),
    "Qwen3MoeForCausalLM": _Family(moe=True, default_head_size=None),
}


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The sparse layers: how many experts there are, how tokens choose, which layers have them."""

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_sparse(self, layer: int) -> bool:
        """Tell whether `layer` (from 0) has experts rather than a dense MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and constants of one model. `dtype` is the checkpoint's own."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    moe: MoeConfig | None = None

    @property
    def has_dense_mlp(self) -> bool:
        """Whether some layer has a dense MLP."""
        moe = self.moe
        return moe is None or not all(moe.is_sparse(layer) for layer in range(self.num_layers))


def load_config(folder: Path) -> ModelConfig:
    """Read the model folder's configuration.

    Raises ConfigError naming the file, the field, what was found and what to do.
    """
    if not folder.is_dir():
        raise ConfigError(folder, "no such model folder; give the path of a downloaded checkpoint")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(path, "no such file; is this the folder of a Hugging Face checkpoint?")
    fields = _Fields(path, _read_json(path))
    architecture = _architecture(fields)
    family = ARCHITECTURES[architecture]
    _refuse_unsupported(fields)

    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"a divisor of num_attention_heads, which is {num_heads}"
        )
    return ModelConfig(
        architecture=architecture,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=fields.integer("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=_head_size(fields, family, num_heads),
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=_rope_theta(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        dtype=_dtype(fields),
        eos_token_ids=_eos_token_ids(folder, fields),
        moe=_moe(fields) if family.moe else None,
    )


class _Fields:
    """The content of one JSON file, read field by field with checks."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self.content = content

    def error(self, name: str, expected: str) -> ConfigError:
        found = repr(self.content[name]) if name in self.content else "missing"
        return ConfigError(self.path, f"{name} is {found}; it must be {expected}")

    def get(self, name: str) -> Any:
        return self.content.get(name)

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer of at least 1; without a default it must be there."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, "an integer of at least 1")
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Return an integer or a list of them as a tuple; missing and null are empty."""
        value = self.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if any(not isinstance(item, int) or isinstance(item, bool) or item < 0 for item in values):
            raise self.error(name, "an integer from 0, or a list of them")
        return tuple(values)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(path, f"cannot be read as JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise ConfigError(path, f"holds a {type(content).__name__}; it must hold an object")
    return content


def _architecture(fields: _Fields) -> str:
    names = fields.get("architectures")
    if isinstance(names, list):
        for name in names:
            if name in ARCHITECTURES:
                return str(name)
    raise fields.error("architectures", "one of the supported: " + ", ".join(ARCHITECTURES))


def _refuse_unsupported(fields: _Fields) -> None:
    if fields.flag("attention_bias", default=False):
        raise fields.error("attention_bias", "false; biases in attention are not supported")
    if fields.flag("use_sliding_window", default=False):
        raise fields.error("use_sliding_window", "false; sliding windows are not supported")
    if any(kind != "full_attention" for kind in fields.get("layer_types") or ()):
        raise fields.error("layer_types", "full_attention for every layer")
    if fields.get("hidden_act") not in (None, "silu"):
        raise fields.error("hidden_act", "silu")
    if fields.get("quantization_config") is not None:
        raise fields.error(
            "quantization_config", "absent; use a checkpoint in bfloat16, float16 or float32"
        )


def _head_size(fields: _Fields, family: _Family, num_heads: int) -> int:
    if fields.get("head_dim") is not None:
        size = fields.integer("head_dim")
    elif family.default_head_size is not None:
        size = family.default_head_size
    else:
        size = fields.integer("hidden_size") // num_heads
    if size % 2 or size == 0:
        raise fields.error("head_dim", "even, as rotary embedding turns pairs of elements")
    return size


def _rope_theta(fields: _Fields) -> float:
    """Read the rotary base from `rope_parameters` (transformers 5) or `rope_theta` (before)."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise fields.error(name, "an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise fields.error(name, "of rope_type default over the whole head; no scaling yet")
        if "rope_theta" in rope:
            return _Fields(fields.path, rope).number("rope_theta")
    return fields.number("rope_theta")


def _dtype(fields: _Fields) -> str:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is None:
        return "float32"
    if value not in DTYPES:
        raise fields.error(name, "one of " + ", ".join(DTYPES))
    return str(value)


def _eos_token_ids(folder: Path, fields: _Fields) -> tuple[int, ...]:
    """Prefer generation_config.json: chat models name the end of a turn only there."""
    path = folder / GENERATION_FILE
    if path.is_file():
        generation = _Fields(path, _read_json(path))
        if generation.get("eos_token_id") is not None:
            return generation.integers("eos_token_id")
    return fields.integers("eos_token_id")


def _moe(fields: _Fields) -> MoeConfig:
    # transformers 5 writes num_local_experts, published checkpoints num_experts.
    name = "num_local_experts" if fields.get("num_local_experts") is not None else "num_experts"
    num_experts = fields.integer(name)
    top_k = fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise fields.error("num_experts_per_tok", f"at most {name}, which is {num_experts}")
    return MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=fields.integer("moe_intermediate_size"),
        norm_topk_prob=fields.flag("norm_topk_prob", default=False),
        decoder_sparse_step=fields.integer("decoder_sparse_step", default=1),
        mlp_only_layers=fields.integers("mlp_only_layers"),
    )
