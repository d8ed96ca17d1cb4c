"""The most likely token of rows of logits on a CPU, in one pass over each.

Legend: S rows, V vocabulary.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from native import OPENMP, load_if_possible

_SOURCE = Path(__file__).with_name("argmax_cpu.cpp")
# Logits that are gone through in about the time that it takes to wake another thread.
_THREADED = 1 << 18


def finder() -> Callable[[Tensor], list[int]]:
    """Return `argmax`; what it calls is compiled by now, where it can be."""
    _native()
    return argmax


def argmax(logits_SV: Tensor) -> list[int]:
    """Return the token of the greatest fp32 logit of each row: the first of equals, or of NaNs."""
    run = _native()
    if run is None:
        token_ids: list[int] = logits_SV.argmax(-1).tolist()
        return token_ids
    logits_SV = logits_SV.contiguous()
    assert logits_SV.dtype == torch.float32
    rows, size = logits_SV.shape
    found = (ctypes.c_int64 * rows)()
    threads = torch.get_num_threads() if rows * size > _THREADED else 1
    run(logits_SV.data_ptr(), rows, size, found, threads)
    return list(found)


@cache
def _native() -> Callable[..., Any] | None:
    otherwise = "torch looks for the most likely tokens"
    compiled = load_if_possible(_SOURCE, frozenset(), OPENMP, otherwise)
    if compiled is None:
        return None
    run = compiled.twinpool_argmax
    run.argtypes = (ctypes.c_void_p, *[ctypes.c_int64] * 2, ctypes.c_void_p, ctypes.c_int)
    run.restype = None
    return run
