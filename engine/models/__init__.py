"""Which class computes which architecture: one line for a model."""

from collections.abc import Callable, Mapping

from engine.config import ModelConfig
from engine.layers.layer import Placement
from engine.models.decoder import Decoder
from engine.models.dense import Dense
from engine.models.sparse import Sparse

MODELS: Mapping[str, Callable[[ModelConfig, Placement], Decoder]] = {
    "DeepseekV2ForCausalLM": Sparse,
    "DeepseekV3ForCausalLM": Sparse,
    "LlamaForCausalLM": Dense,
    "MistralForCausalLM": Dense,
    "Qwen2ForCausalLM": Dense,
    "Qwen3ForCausalLM": Dense,
    "Qwen3MoeForCausalLM": Sparse,
}
