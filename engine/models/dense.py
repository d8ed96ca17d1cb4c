"""Models with a dense MLP in every layer: Llama, Mistral, Qwen2 and Qwen3.

They differ in what the configuration says: whether heads are normalised or have a bias, and how
the rotary embedding is stretched. Sources: "The Llama 3 Herd of Models", arXiv 2407.21783;
"Mistral 7B", arXiv 2310.06825; Qwen2 technical report, arXiv 2407.10671; Qwen3 technical report,
arXiv 2505.09388.
"""

from engine.config import ModelConfig
from engine.layers.layer import Placement
from engine.layers.mlp import DenseMLP
from engine.models.decoder import Decoder


class Dense(Decoder):
    """Dense MLPs in every layer."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        def make_mlp(_layer: int, name: str) -> DenseMLP:
            return DenseMLP(config.hidden_size, config.intermediate_size, name, placement)

        super().__init__(config, make_mlp, placement)
