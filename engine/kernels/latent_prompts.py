"""A prompt's attention over latents, with its keys and values made first.

Each head's key and value of a token are smaller together than the latent that is both when a query
takes in the matrices, so many queries multiply a third of what they would otherwise; few gain less
than making keys and values costs (engine.config_deepseek). Owns no memory but what it makes, which
is some heads' at a time.

Legend: Q queries of one sequence, its last tokens, L all of its tokens, N heads, n those of a part,
C latent size, E size of a key's part that is made, R of the part that is cached beside the latent,
K = E + R, V <= K size of a value.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.batch import Batch, PrefillSpan
from engine.config_deepseek import LatentConfig

# Of queries [Q, n, K], and keys and then values [L, 2n, K]: attention, [Q, n, K]. Behind the first
# V elements of values, and of what comes out, is anything.
AttendHeads = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LatentWeights:
    """What makes keys [N, E, C] and values [N, C, V] of latents; keys are multiplied by `scale`."""

    keys_NEC: Tensor
    values_NCV: Tensor
    scale: float


def split(batch: Batch, latent: LatentConfig | None) -> tuple[Batch, tuple[PrefillSpan, ...]]:
    """Return a pass without the prompts whose keys and values are worth making, and those."""
    if latent is None:
        return batch, ()
    rest: list[PrefillSpan] = []
    made: list[PrefillSpan] = []
    for span in batch.prefill:
        new = span.end - span.begin
        (made if latent.makes_keys(new, span.start + new) else rest).append(span)
    return (replace(batch, prefill=tuple(rest)), tuple(made)) if made else (batch, ())


def attend(
    q_QNK: Tensor,
    cells_LX: Tensor,
    weights: LatentWeights,
    attend_heads: AttendHeads,
    most_bytes: int,
) -> Tensor:
    """Return attention, [Q, N, V]; keys and values take about `most_bytes` at a time."""
    queries, heads, size = q_QNK.shape
    tokens = len(cells_LX)
    _, made, rank = weights.keys_NEC.shape
    value_size = weights.values_NCV.shape[2]
    latents_LC, rest_L1R = cells_LX[:, :rank], cells_LX[:, None, rank:]
    out_QNV = q_QNK.new_empty(queries, heads, value_size)
    most = max(1, most_bytes // (2 * tokens * size * cells_LX.element_size()))
    for begin in range(0, heads, most):
        part = slice(begin, min(heads, begin + most))
        count = part.stop - begin
        keys_CI = weights.keys_NEC[part].flatten(0, 1).T
        values_CI = weights.values_NCV[part].transpose(0, 1).flatten(1)
        # The scale before the product is rounded, not after.
        keys_LI = torch.addmm(
            cells_LX.new_empty(1), latents_LC, keys_CI, beta=0, alpha=weights.scale
        )
        both_LXK = cells_LX.new_empty(tokens, 2 * count, size)
        both_LXK[:, :count, :made] = keys_LI.view(tokens, count, made)
        both_LXK[:, :count, made:] = rest_L1R
        both_LXK[:, count:, :value_size] = (latents_LC @ values_CI).view(tokens, count, value_size)
        out_QNV[:, part] = attend_heads(q_QNK[:, part], both_LXK)[:, :, :value_size]
    return out_QNV
