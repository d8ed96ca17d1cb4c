"""Models with experts: Qwen3-MoE, DeepSeek-V2 and DeepSeek-V3.

Sources: Qwen3 technical report, arXiv 2505.09388; DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv
2412.19437, of which the layers that predict further tokens are not computed.
"""

from engine.config import ModelConfig
from engine.layers.layer import Placement
from engine.layers.mlp import DenseMLP
from engine.layers.moe import SparseMLP
from engine.models.decoder import MLP, Decoder


class Sparse(Decoder):
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
