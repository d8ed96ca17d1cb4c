"""The experts of a sparse layer on a CPU: experts_cpu.cpp for bf16 where it can be used, else
a product for each of them.

Owns the packed weights it makes. Legend: as engine.kernels.experts; P panels of 64 columns.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import linear_cpu, rows_cpu
from engine.kernels.experts import Experts, ProductExperts, Put
from engine.kernels.fixed import FixedExperts
from engine.kernels.rows import Routes
from native import OPENMP, load_if_possible

_SOURCE = Path(__file__).with_name("experts_cpu.cpp")
_CPU_FLAGS = frozenset(("avx512f", "avx512bw", "avx512vl", "avx512_bf16"))
_PANEL = 64  # as in experts_cpu.cpp
# Multiplications below which waking another thread costs more than it brings.
_THREADED = 1 << 20
_OTHERWISE = "each expert is a product of torch's operators"


@dataclass(frozen=True)
class Foreign:
    """The functions of experts_cpu.cpp."""

    experts: Callable[..., Any]
    pairs: Callable[..., Any]


class NativeExperts:
    """experts_cpu.cpp: all of a layer's experts in one parallel region.

    On 2 cores of an EPYC without AMX, 2,048 tokens to 4 of 32 experts of 512 x 256, it took three
    quarters of the time of oneDNN's products, each of which wakes a thread that slept.

    Attributes:
        gate_up: [E, P, D / 2, 64, 2], a panel's first 32 columns gate, the others up.
        down: [E, P, I / 2, 64, 2].
    """

    def __init__(self, foreign: Foreign, gate_up: Tensor, down: Tensor) -> None:
        self._run, self._run_pairs = foreign.experts, foreign.pairs
        self._hidden, self.inner = down.shape[1:]
        self.gate_up = _gate_up_panels(gate_up)
        self.down = _panels(down)

    def __call__(self, x_TD: Tensor, routes: Routes) -> Tensor:
        """See `Experts`."""
        assert x_TD.is_contiguous()
        assert x_TD.shape[1] == self._hidden
        pairs = routes.pairs
        tokens, top_k = pairs.place_TK.shape
        experts = len(pairs.loads)
        y_PD = x_TD.new_empty(tokens * top_k, self._hidden)
        sum_TD = torch.empty_like(x_TD, dtype=torch.float32)
        work = len(y_PD) * 3 * self._hidden * self.inner
        self._run(
            *(x_TD.data_ptr(), self.gate_up.data_ptr(), self.down.data_ptr()),
            (ctypes.c_int64 * experts)(*pairs.loads),
            *(pairs.tokens_P.data_ptr(), pairs.place_TK.data_ptr()),
            *(routes.weights_TK.data_ptr(), y_PD.data_ptr(), sum_TD.data_ptr()),
            *(tokens, experts, top_k, self._hidden, self.inner),
            torch.get_num_threads() if work >= _THREADED else 1,
        )
        return sum_TD

    def pairs(self, x_TD: Tensor, tokens_P: Tensor, experts_P: Tensor) -> Tensor:
        """See `Experts`; raises IndexError for an expert that is none of these."""
        x_TD, tokens_P, experts_P = x_TD.contiguous(), tokens_P.contiguous(), experts_P.contiguous()
        assert x_TD.shape[1] == self._hidden
        assert tokens_P.dtype == experts_P.dtype == torch.int64
        pairs, experts = len(tokens_P), len(self.down)
        y_PD = x_TD.new_empty(pairs, self._hidden)
        work = pairs * 3 * self._hidden * self.inner
        wrong = self._run_pairs(
            *(x_TD.data_ptr(), self.gate_up.data_ptr(), self.down.data_ptr()),
            *(tokens_P.data_ptr(), experts_P.data_ptr(), y_PD.data_ptr()),
            *(pairs, experts, self._hidden, self.inner),
            torch.get_num_threads() if work >= _THREADED else 1,
        )
        if wrong:
            raise IndexError(f"{wrong} pairs name an expert that is none of the {experts}")
        return y_PD

    def stage(self, gate_up: Tensor, down: Tensor) -> Put:
        """See `Experts`."""
        panels = _gate_up_panels(gate_up[None])[0], _panels(down[None])[0]

        def put(expert: int) -> None:
            # In place: the whole step's kernel has these addresses.
            self.gate_up[expert], self.down[expert] = panels

        return put


def experts(gate_up: Tensor, down: Tensor, *, deterministic: bool = False) -> Experts:
    """Return the fastest form of experts with these weights; see `ExpertsKernel`.

    With `deterministic` of those that give a row the same whatever other rows there are.
    """
    foreign = _native() if gate_up.dtype == torch.bfloat16 else None
    hidden, inner = down.shape[1:]
    # Inner dimensions are multiplied in pairs.
    if foreign is not None and hidden % 2 == 0 and inner % 2 == 0:
        return NativeExperts(foreign, gate_up, down)
    rows = rows_cpu.rows(gate_up.dtype, deterministic=deterministic)
    form = FixedExperts if deterministic else ProductExperts
    return form(gate_up, down, partial(linear_cpu.product, deterministic=deterministic), rows)


def _native() -> Foreign | None:
    compiled = load_if_possible(_SOURCE, _CPU_FLAGS, OPENMP, _OTHERWISE)
    if compiled is None:
        return None
    run, pairs = compiled.twinpool_experts, compiled.twinpool_expert_pairs
    run.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 5 + [ctypes.c_int]
    run.restype = None
    pairs.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 4 + [ctypes.c_int]
    pairs.restype = ctypes.c_int64
    return Foreign(run, pairs)


def _panels(weight_EOI: Tensor) -> Tensor:
    """Return [E, P, I / 2, 64, 2], with zeros for the outputs that fill up the last panel."""
    experts, outputs, inner = weight_EOI.shape
    whole = F.pad(weight_EOI, (0, 0, 0, -outputs % _PANEL))
    return whole.view(experts, -1, _PANEL, inner // 2, 2).transpose(2, 3).contiguous()


def _gate_up_panels(gate_up: Tensor) -> Tensor:
    """Return panels of which the first half of the columns is gate, the second up."""
    experts, both, hidden = gate_up.shape
    half = _PANEL // 2
    halves = F.pad(gate_up.view(experts, 2, both // 2, hidden), (0, 0, 0, -(both // 2) % half))
    columns = halves.view(experts, 2, -1, half, hidden).transpose(1, 2)
    return _panels(columns.reshape(experts, -1, hidden))
