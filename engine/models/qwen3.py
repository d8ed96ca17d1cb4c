"""Qwen3, the dense models. Source: Qwen3 technical report, arXiv 2505.09388."""

from engine.config import ModelConfig
from engine.layers.layer import Placement
from engine.layers.mlp import DenseMLP
from engine.models.decoder import Decoder


class Qwen3(Decoder):
    """Dense MLPs in every layer."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        def make_mlp(_layer: int, name: str) -> DenseMLP:
            return DenseMLP(config.hidden_size, config.intermediate_size, name, placement)

        super().__init__(config, make_mlp, placement)
