"""What a model folder says about its model: config.json and generation_config.json.

Owns reading and checking them. Refuses, by name, whatever the models here do not compute.
Knows nothing of weights or torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config_deepseek import (
    Gate,
    LatentConfig,
    read_gate_v2,
    read_gate_v3,
    read_latent,
)
from engine.config_fields import Fields, read_json
from engine.errors import ConfigError
from engine.rope import Rope, read_rope

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What differs between the architectures' config files."""

    moe: bool
    qk_norm: bool
    qkv_bias: bool = False
    default_head_size: int | None  # None: hidden_size / num_attention_heads
    default_theta: float | None = None
    has_window: bool = False  # where `sliding_window` is given
    read_gate: Callable[[Fields], Gate | None] | None = None  # DeepSeek's alone


_LLAMA = _Family(moe=False, qk_norm=False, default_head_size=None, default_theta=1e4)
_MISTRAL = replace(_LLAMA, has_window=True)
ARCHITECTURES: Mapping[str, _Family] = {
    "DeepseekV2ForCausalLM": replace(_LLAMA, moe=True, read_gate=read_gate_v2),
    "DeepseekV3ForCausalLM": replace(_LLAMA, moe=True, read_gate=read_gate_v3),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _MISTRAL,
    "Qwen2ForCausalLM": replace(_LLAMA, qkv_bias=True),
    "Qwen3ForCausalLM": _Family(moe=False, qk_norm=True, default_head_size=128),
    "Qwen3MoeForCausalLM": _Family(moe=True, qk_norm=True, default_head_size=None),
}


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The sparse layers: how many experts there are, how tokens choose, which layers have them.

    All tokens go through `shared_experts` as well. Without a `gate` the greatest softmax is chosen.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    shared_experts: int = 0
    gate: Gate | None = None

    @property
    def shared_size(self) -> int:
        """The inner size of all shared experts together."""
        return self.shared_experts * self.intermediate_size

    def is_sparse(self, layer: int) -> bool:
        """Tell whether `layer` (from 0) has experts rather than a dense MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and constants of one model. `dtype` is the checkpoint's own.

    With `qk_norm` the heads of queries and keys are normalised; with `qkv_bias` something is added
    to queries, keys and values. `max_position_embeddings` are the
    tokens of the longest sequence, with what `rope` adds to those that were trained with. Of a
    model with `latent` attention, `num_kv_heads` and `head_size` are those of its cells: one of
    `latent.cell_size`. A checkpoint may hold `more_layers`, which are not computed here.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
    qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    qkv_bias: bool = False
    moe: MoeConfig | None = None
    latent: LatentConfig | None = None
    more_layers: int = 0

    @property
    def kv_planes(self) -> int:
        """How many vectors a head's cell has: a key and a value, or a latent."""
        return 2 if self.latent is None else 1

    @property
    def turned_size(self) -> int:
        """How many elements of a head are turned by their position."""
        return self.head_size if self.latent is None else self.latent.turned_size

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
    fields = Fields(path, read_json(path))
    architecture = _architecture(fields)
    family = ARCHITECTURES[architecture]
    _refuse_unsupported(fields, family)

    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"a divisor of num_attention_heads, which is {num_heads}"
        )
    rope = read_rope(fields, family.default_theta)
    latent = read_latent(fields, rope) if family.read_gate is not None else None
    return ModelConfig(
        architecture=architecture,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=fields.integer("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads if latent is None else 1,
        head_size=_head_size(fields, family, num_heads) if latent is None else latent.cell_size,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope=rope,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        max_position_embeddings=rope.max_tokens(fields.integer("max_position_embeddings")),
        dtype=_dtype(fields),
        eos_token_ids=_eos_token_ids(folder, fields),
        moe=_moe(fields, family) if family.moe else None,
        latent=latent,
        more_layers=0 if latent is None else fields.count("num_nextn_predict_layers"),
    )


def _architecture(fields: Fields) -> str:
    names = fields.get("architectures")
    if isinstance(names, list):
        for name in names:
            if name in ARCHITECTURES:
                return str(name)
    raise fields.error("architectures", "one of the supported: " + ", ".join(ARCHITECTURES))


def _refuse_unsupported(fields: Fields, family: _Family) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name, default=False):
            raise fields.error(name, "false; biases are not supported")
    if family.has_window and fields.get("sliding_window") is not None:
        raise fields.error("sliding_window", "null; sliding windows are not supported")
    if fields.flag("use_sliding_window", default=False):
        raise fields.error("use_sliding_window", "false; sliding windows are not supported")
    if any(kind != "full_attention" for kind in fields.get("layer_types") or ()):
        raise fields.error("layer_types", "full_attention for every layer")
    if fields.get("hidden_act") not in (None, "silu"):
        raise fields.error("hidden_act", "silu")
    quantization = fields.get("quantization_config")
    if quantization is not None and not _is_known_fp8(quantization):
        raise fields.error(
            "quantization_config",
            "absent, or fp8 (e4m3) in blocks of 128 x 128; use a checkpoint in bfloat16, float16, "
            "float32 or such fp8",
        )


def _is_known_fp8(quantization: object) -> bool:
    """Tell whether weights are in the format of engine.quantized."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return False
    blocks = quantization.get("weight_block_size")
    return blocks == [128, 128] and quantization.get("fmt", "e4m3") == "e4m3"


def _head_size(fields: Fields, family: _Family, num_heads: int) -> int:
    if fields.get("head_dim") is not None:
        size = fields.integer("head_dim")
    elif family.default_head_size is not None:
        size = family.default_head_size
    else:
        size = fields.integer("hidden_size") // num_heads
    if size % 2 or size == 0:
        raise fields.error("head_dim", "even, as rotary embedding turns pairs of elements")
    return size


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is None:
        return "float32"
    if value not in DTYPES:
        raise fields.error(name, "one of " + ", ".join(DTYPES))
    return str(value)


def _eos_token_ids(folder: Path, fields: Fields) -> tuple[int, ...]:
    """Prefer generation_config.json: chat models name the end of a turn only there."""
    path = folder / GENERATION_FILE
    if path.is_file():
        generation = Fields(path, read_json(path))
        if generation.get("eos_token_id") is not None:
            return generation.integers("eos_token_id")
    return fields.integers("eos_token_id")


def _moe(fields: Fields, family: _Family) -> MoeConfig:
    if family.read_gate is not None:
        return _deepseek_moe(fields, family.read_gate(fields))
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


def _deepseek_moe(fields: Fields, gate: Gate | None) -> MoeConfig:
    if fields.integer("moe_layer_freq", default=1) != 1:
        raise fields.error("moe_layer_freq", "1")
    return MoeConfig(
        num_experts=fields.integer("n_routed_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("moe_intermediate_size"),
        norm_topk_prob=fields.flag("norm_topk_prob", default=False),
        mlp_only_layers=tuple(range(fields.count("first_k_dense_replace"))),
        shared_experts=fields.count("n_shared_experts"),
        gate=gate,
    )
