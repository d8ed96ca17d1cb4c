"""Calls decode_cpu.cpp: bf16 attention of decoding sequences, over the cache's blocks as they lie.

Owns what the compiled code may take for granted. Legend: S sequences, N query heads, G KV heads,
H head size.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from engine.decode_rows import DecodeRows
from engine.kernels.attention_native import CPU_FLAGS
from native import OPENMP, load_if_possible

_SOURCE = Path(__file__).with_name("decode_cpu.cpp")
# Bytes of keys and values that one thread reads in about the time that it takes to wake another.
_THREADED = 1 << 18
_PART, _LANES = 512, 16  # as in decode.h
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class Problem(ctypes.Structure):
    """TwinpoolDecode of decode.h."""

    _fields_ = (
        ("q", _POINTER),
        ("q_stride", _SIZE),
        ("keys", _POINTER),
        ("values", _POINTER),
        ("block_tokens", _SIZE),
        ("tables", _POINTER),
        ("begins", _POINTER),
        ("lengths", _POINTER),
        ("sequences", _SIZE),
        ("heads", _SIZE),
        ("kv_heads", _SIZE),
        ("head_size", _SIZE),
        ("out", _POINTER),
        ("partial", _POINTER),
    )


class NativeDecode:
    """The compiled kernel. It computes with as many threads as torch, which are torch's own."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = library.twinpool_decode
        self._attend.argtypes, self._attend.restype = (_POINTER, ctypes.c_int), None

    def __call__(
        self, q_SNH: Tensor, cache_runs: Tensor, rows: DecodeRows, out_SNH: Tensor
    ) -> None:
        """Attend the rows, of which there are some and whose queries `attention_native.fits`.

        `out_SNH` is contiguous. What a sequence gets depends on nothing else in the batch.
        """
        heads, head_size = q_SNH.shape[1:]
        assert cache_runs.is_contiguous()
        assert out_SNH.is_contiguous()
        partial = torch.empty(room(rows, heads, head_size), dtype=torch.float32)
        described = problem(
            rows,
            q=(q_SNH.data_ptr(), q_SNH.stride(0)),
            heads=heads,
            head_size=head_size,
            out=out_SNH.data_ptr(),
            partial=partial.data_ptr(),
        )
        described.keys = cache_runs.data_ptr()
        described.values = described.keys + cache_runs.nbytes // 2
        read = 4 * int(rows.lengths_S.sum()) * rows.cache.num_heads * head_size
        threads = torch.get_num_threads() if read > _THREADED else 1
        self._attend(ctypes.addressof(described), threads)


def room(rows: DecodeRows, heads: int, head_size: int) -> int:
    """Return how many fp32 numbers the partial results of long sequences take."""
    parts_S = -(-rows.lengths_S // _PART)
    return int(parts_S[parts_S > 1].sum()) * heads * (head_size + _LANES)


def problem(
    rows: DecodeRows, *, q: tuple[int, int], heads: int, head_size: int, out: int, partial: int
) -> Problem:
    """Describe rows, which must outlive it, but for where a layer's keys and values are.

    `q` is an address and the elements from row to row; `out` and `partial` are addresses.
    """
    return Problem(
        q=q[0],
        q_stride=q[1],
        block_tokens=rows.cache.block_size,
        tables=rows.blocks.ctypes.data,
        begins=rows.begins_S.ctypes.data,
        lengths=rows.lengths_S.ctypes.data,
        sequences=len(rows),
        heads=heads,
        kv_heads=rows.cache.num_heads,
        head_size=head_size,
        out=out,
        partial=partial,
    )


@cache
def attention() -> NativeDecode | None:
    """Return the kernel, compiled if it has to be, or None where there can be none."""
    otherwise = "attention of decoding sequences is computed with torch's operators"
    compiled = load_if_possible(_SOURCE, CPU_FLAGS, OPENMP, otherwise)
    return None if compiled is None else NativeDecode(compiled)
