"""Which class computes which architecture: one line for a model."""

from collections.abc import Callable, Mapping

from engine.config import ModelConfig
from engine.layers.layer import Placement
from engine.models.decoder import Decoder
from engine.models.dense import Dense
from engine.models.qwen3_moe import Qwen3Moe

MODELS: Mapping[str, Callable[[ModelConfig, Placement], Decoder]] = {
    "LlamaForCausalLM": Dense,
    "MistralForCausalLM": Dense,
    "Qwen3ForCausalLM": Dense,
    "Qwen3MoeForCausalLM": Qwen3Moe,
}
