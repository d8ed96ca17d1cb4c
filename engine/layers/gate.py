"""Which experts a token goes through, where that is more than the greatest of a softmax.

Legend: T tokens, E experts, K experts of a token, Q groups of experts.
"""

import torch
from torch import Tensor

from engine.config_deepseek import Gate

_LEAST = 1e-20


def choose(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, normalise: bool, gate: Gate
) -> tuple[Tensor, Tensor]:
    """Return the weights [T, K] and the experts [T, K] of fp32 scores; see Gate.

    With `normalise` a token's weights sum to the gate's scale.
    """
    scores_TE = logits_TE.sigmoid() if gate.sigmoid else logits_TE.softmax(-1)
    ranked_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if gate.groups > 1:
        ranked_TQE = ranked_TE.view(len(ranked_TE), gate.groups, ranked_TE.shape[1] // gate.groups)
        best_TQ = ranked_TQE.topk(gate.best_of_group, dim=-1).values.sum(-1)
        chosen = best_TQ.topk(gate.chosen_groups, dim=-1).indices
        out_TQ = torch.ones_like(best_TQ, dtype=torch.bool).scatter_(1, chosen, False)
        ranked_TE = ranked_TQE.masked_fill(out_TQ[:, :, None], -torch.inf).flatten(1)
    experts_TK = ranked_TE.topk(top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _LEAST)
    return weights_TK * gate.scale, experts_TK
