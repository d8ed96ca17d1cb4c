"""Which class computes which architecture: one line for a model."""

from collections.abc import Callable, Mapping

from engine.config import ModelConfig
from engine.layers.layer import Placement
from engine.models.decoder import Decoder
from engine.models.qwen3 import Qwen3
from engine.models.qwen3_moe import Qwen3Moe

MODELS: Mapping[str, Callable[[ModelConfig, Placement], Decoder]] = {
    "Qwen3ForCausalLM": Qwen3,
    "Qwen3MoeForCausalLM": Qwen3Moe,
}
