"""The router of a sparse layer: which experts a token goes through, and how much of each.

Legend: T tokens, D hidden size, E experts of the layer, K experts of a token, Q groups of experts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.config import MoeConfig
from engine.config_deepseek import Gate
from engine.kernels import Product, router_kernel
from engine.kernels.fixed import FIXED
from engine.kernels.rows import USUAL, Routes, RowFunctions
from engine.kernels.step import RouterWeights
from engine.layers.layer import Placement
from engine.weights import WeightSlot

_LEAST = 1e-20


class ExpertRouter:
    """Scores all experts and chooses some; `name` is its place, "model.layers.0.mlp.gate"."""

    def __init__(self, moe: MoeConfig, hidden: int, name: str, placement: Placement) -> None:
        self._name = name
        self._num_experts = moe.num_experts
        self._how = moe.top_k, moe.norm_topk_prob
        self._gate = moe.gate
        # Small, and it decides discretely: fp32 whatever the model's dtype.
        self._weight_ED = torch.empty(moe.num_experts, hidden, device=placement.device)
        self._functions = FIXED if placement.deterministic else USUAL
        self._bias_E: Tensor | None = None
        if moe.gate is not None and moe.gate.biased:
            self._bias_E = torch.empty(moe.num_experts, device=placement.device)
        self._rows = placement.rows
        self._make_scores = router_kernel(
            placement.device, placement.dtype, deterministic=placement.deterministic
        )
        self._scores: Product

    def slots(self) -> Iterator[WeightSlot]:
        named = {"weight": self._weight_ED}
        if self._bias_E is not None:
            named["e_score_correction_bias"] = self._bias_E
        for name, target in named.items():
            shape = tuple(target.shape)
            yield WeightSlot(name=f"{self._name}.{name}", shape=shape, part=(), target=target)

    def prepare(self) -> None:
        self._scores = self._make_scores(self._weight_ED)

    def weights(self) -> RouterWeights | None:
        """Return what a step through all layers needs; None where it chooses otherwise."""
        if self._gate is not None:
            return None
        top_k, normalise = self._how
        return RouterWeights(weight_ED=self._weight_ED, top_k=top_k, normalise=normalise)

    def route(self, x_TD: Tensor) -> Routes:
        """Return the experts of each row, sorted by expert where that costs nothing."""
        if self._gate is None:
            return self._rows.route(self._scores(x_TD), *self._how)
        return Routes(*self.choose(x_TD), self._num_experts)

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights [T, K] and the experts [T, K] of rows. Waits for nothing."""
        logits_TE = self._scores(x_TD)
        if self._gate is None:
            return self._rows.choose(logits_TE, *self._how)
        return choose(logits_TE, self._bias_E, *self._how, self._gate, self._functions)


def choose(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    normalise: bool,
    gate: Gate,
    functions: RowFunctions = USUAL,
) -> tuple[Tensor, Tensor]:
    """Return the weights [T, K] and the experts [T, K] of fp32 scores; see Gate.

    With `normalise` a token's weights sum to the gate's scale.
    """
    scores_TE = functions.sigmoid(logits_TE) if gate.sigmoid else logits_TE.softmax(-1)
    ranked_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if gate.groups > 1:
        tokens, experts = ranked_TE.shape
        ranked_TQE = ranked_TE.view(tokens, gate.groups, experts // gate.groups)
        best_TQ = functions.add_up(ranked_TQE.topk(gate.best_of_group, dim=-1).values)
        chosen = best_TQ.topk(gate.chosen_groups, dim=-1).indices
        out_TQ = torch.ones_like(best_TQ, dtype=torch.bool).scatter_(1, chosen, False)
        ranked_TE = ranked_TQE.masked_fill(out_TQ[:, :, None], -torch.inf).flatten(1)
    experts_TK = ranked_TE.topk(top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalise:
        weights_TK = weights_TK / (functions.add_up(weights_TK)[:, None] + _LEAST)
    return weights_TK * gate.scale, experts_TK
