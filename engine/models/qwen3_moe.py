"""Qwen3-MoE, the sparse models. Source: Qwen3 technical report, arXiv 2505.09388."""

from engine.config import ModelConfig
from engine.layers.layer import Placement
from engine.layers.mlp import DenseMLP
from engine.layers.moe import SparseMLP
from engine.models.decoder import MLP, Decoder


class Qwen3Moe(Decoder):
    """Experts in the layers that the configuration calls sparse, dense MLPs in the others."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        moe = config.moe
        assert moe is not None

        def make_mlp(layer: int, name: str) -> MLP:
            if moe.is_sparse(layer):
                made = self.sparse[layer] = SparseMLP(config, layer, name, placement)
                return made
            return DenseMLP(config.hidden_size, config.intermediate_size, name, placement)

        super().__init__(config, make_mlp, placement)
