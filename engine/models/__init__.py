"""Which class computes which architecture, one line for a model; and how one gets its weights."""

from collections.abc import Callable, Mapping
from pathlib import Path

from engine.config import ModelConfig
from engine.layers.layer import Placement
from engine.models.decoder import Decoder
from engine.models.dense import Dense
from engine.models.sparse import Sparse
from engine.weights import Fill, Progress, load_weights

MODELS: Mapping[str, Callable[[ModelConfig, Placement], Decoder]] = {
    "DeepseekV2ForCausalLM": Sparse,
    "DeepseekV3ForCausalLM": Sparse,
    "LlamaForCausalLM": Dense,
    "MistralForCausalLM": Dense,
    "Qwen2ForCausalLM": Dense,
    "Qwen3ForCausalLM": Dense,
    "Qwen3MoeForCausalLM": Sparse,
}


def load_model(
    config: ModelConfig,
    placement: Placement,
    folder: Path | None,
    fill: Fill | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Return a rank's part of a model, with the folder's weights, or those that `fill` gives."""
    model = MODELS[config.architecture](config, placement)
    slots = list(model.slots())
    if fill is None:
        assert folder is not None, "weights come from a folder, or from `fill`"
        load_weights(folder, slots, ignored=model.ignores, progress=progress)
    else:
        fill(slots)
    model.prepare()
    return model
