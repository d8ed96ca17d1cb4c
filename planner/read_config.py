"""Reads a Hugging Face config.json into a `ModelShape`. Owns the field names of each family.

Takes more architectures than the engine runs, so that a model can be sized before it is supported.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.config import ARCHITECTURES as RUN_HERE
from planner.errors import ShapeError
from planner.shape import Experts, Latent, ModelShape

CONFIG_FILE = "config.json"
_LEAST_BITS = 16  # of a weight that this project computes with
_DTYPE_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}


class _Fields:
    """The content of one config.json, with errors that name the file and the field."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self.content = content

    def integer(self, *names: str, default: int | None = None) -> int:
        """Return the first of the named fields that is there."""
        for name in names:
            value = self.content.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise self.error(name, f"is {value!r}; it must be a whole number from 0")
            return value
        if default is None:
            raise self.error(names[0], "is missing; it must be a whole number from 0")
        return default

    def size(self, *names: str, default: int | None = None) -> int:
        """As `integer`, but at least 1."""
        value = self.integer(*names, default=default)
        if value < 1:
            raise self.error(names[0], f"is {value}; it must be at least 1")
        return value

    def error(self, name: str, what: str) -> ShapeError:
        return ShapeError(f"{self.path}: {name} {what}")


def read_config(path: Path, weight_bits: float | None = None) -> ModelShape:
    """Return the shape that a config.json describes; `weight_bits` in place of what it says.

    Raises ShapeError naming the file, the field, what was found and what to do.
    """
    fields = _Fields(path, _read_json(path))
    architecture = _architecture(fields)
    layers = fields.size("num_hidden_layers", "n_layer")
    hidden = fields.size("hidden_size", "n_embed")
    heads = fields.size("num_attention_heads", "n_head")
    kv_heads = (
        heads if architecture == _BLOOM else fields.size("num_key_value_heads", default=heads)
    )
    if heads % kv_heads:
        raise fields.error(
            "num_key_value_heads", f"is {kv_heads}; it must divide num_attention_heads, {heads}"
        )
    bloom = architecture == _BLOOM
    bits = _weight_bits(fields) if weight_bits is None else weight_bits
    return ModelShape(
        name=path.parent.name or architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=fields.size("head_dim", default=_default_head_size(architecture, hidden, heads)),
        inner=fields.size("intermediate_size", default=4 * hidden if bloom else None),
        vocab=fields.size("vocab_size"),
        mlp_matrices=2 if bloom else 3,
        tied=bool(fields.content.get("tie_word_embeddings", bloom)),
        experts=_EXPERTS[architecture](fields, layers),
        latent=_latent(fields) if architecture in _LATENT else None,
        weight_bits=bits,
        kv_bits=_DTYPE_BITS.get(_dtype(fields), 16),
        runs_here=architecture in RUN_HERE and bits >= _LEAST_BITS,
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ShapeError(f"{path}: cannot be read as JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise ShapeError(f"{path}: holds a {type(content).__name__}; it must hold an object")
    return content


def _architecture(fields: _Fields) -> str:
    names = fields.content.get("architectures")
    for name in names if isinstance(names, list) else ():
        if name in _EXPERTS:
            return str(name)
    raise fields.error("architectures", f"is {names!r}; it must be one of {', '.join(_EXPERTS)}")


def _default_head_size(architecture: str, hidden: int, heads: int) -> int:
    family = RUN_HERE.get(architecture)
    return (family.default_head_size if family else None) or hidden // heads


def _dense(fields: _Fields, layers: int) -> None:
    return None


def _mixtral(fields: _Fields, layers: int) -> Experts:
    return Experts(
        count=fields.size("num_local_experts"),
        top_k=fields.size("num_experts_per_tok"),
        inner=fields.size("intermediate_size"),
        layers=layers,
    )


def _qwen3_moe(fields: _Fields, layers: int) -> Experts:
    step = fields.size("decoder_sparse_step", default=1)
    dense = set(fields.content.get("mlp_only_layers") or ())
    return Experts(
        count=fields.size("num_local_experts", "num_experts"),
        top_k=fields.size("num_experts_per_tok"),
        inner=fields.size("moe_intermediate_size"),
        layers=sum(at not in dense and (at + 1) % step == 0 for at in range(layers)),
    )


def _deepseek(fields: _Fields, layers: int) -> Experts | None:
    count = fields.integer("n_routed_experts", default=0)
    if not count:
        return None
    inner = fields.size("moe_intermediate_size")
    return Experts(
        count=count,
        top_k=fields.size("num_experts_per_tok"),
        inner=inner,
        layers=layers - fields.integer("first_k_dense_replace", default=0),
        shared_inner=inner * fields.integer("n_shared_experts", default=0),
    )


def _latent(fields: _Fields) -> Latent:
    return Latent(
        kv_rank=fields.size("kv_lora_rank"),
        q_rank=fields.integer("q_lora_rank", default=0),
        rope_size=fields.size("qk_rope_head_dim"),
        nope_size=fields.size("qk_nope_head_dim"),
        value_size=fields.size("v_head_dim"),
    )


def _dtype(fields: _Fields) -> str:
    return str(fields.content.get("dtype") or fields.content.get("torch_dtype") or "bfloat16")


def _weight_bits(fields: _Fields) -> float:
    """Read the width of a weight; scales and layers that stay wide are left out."""
    quantization = fields.content.get("quantization_config")
    if quantization is None:
        return _DTYPE_BITS.get(_dtype(fields), 16)
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    if isinstance(bits, int | float) and bits > 0:
        return bits
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == "fp8":
        return 8
    raise fields.error(
        "quantization_config", f"has quant_method {method!r} and no bits; give --weight-bits"
    )


_BLOOM = "BloomForCausalLM"
_LATENT = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
_EXPERTS: Mapping[str, Callable[[_Fields, int], Experts | None]] = {
    "LlamaForCausalLM": _dense,
    "MistralForCausalLM": _dense,
    "Qwen2ForCausalLM": _dense,
    "Qwen3ForCausalLM": _dense,
    _BLOOM: _dense,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    **dict.fromkeys(_LATENT, _deepseek),
}
