"""Routers' scores on a CPU. Owns no weights.

Legend: T tokens, D hidden size, E experts.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import linear_cpu, rows_cpu
from engine.kernels.step import Product


def router(router_ED: Tensor, dtype: torch.dtype, *, deterministic: bool = False) -> Product:
    """Return what makes fp32 scores [T, E] of rows of `dtype`; the weight, fp32, must outlive it.

    With `deterministic` a row's are the same whatever other rows there are, in any pass.
    """
    if not deterministic:
        return lambda x_TD: F.linear(x_TD.float(), router_ED)
    rows = rows_cpu.rows(dtype, deterministic=True)
    if isinstance(rows, rows_cpu.NativeRows):
        return partial(_scores, rows, router_ED)
    product = linear_cpu.product(router_ED, deterministic=True)
    return lambda x_TD: product(x_TD.float())


def _scores(rows: rows_cpu.NativeRows, router_ED: Tensor, x_TD: Tensor) -> Tensor:
    return rows.scores(x_TD.contiguous(), router_ED)
