"""Forms in torch's operators whose result for a row depends on that row alone, bit for bit.

torch's products choose their kernel, and with it the order of a sum, by how many rows there are;
its elementwise functions compute the elements that fill no register by another formula. Here every
product has one of a few numbers of rows, which have been found to sum alike, and every function
that is not exact sees a row at the same place of a register. The rest is additions,
multiplications and square roots, each rounded on its own as IEEE 754 has it.

Holds for a fixed number of threads, as torch had when a product was made. Legend: as
engine.kernels.rows; R rows of a tile.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.experts import ProductExperts
from engine.kernels.rows import NormWeight, Routes, RowFunctions, TorchRows

# Rows of a tile: those that the others are compared with first, and from few to many.
_COMPARED = 16
_TILES = (1, 2, 4, 8, 16, 32, 64, 128)
# Elements below which torch's elementwise functions never share out work to threads.
_ALONE = 1 << 15
# Elements that fill whole registers, of any size and unrolled as torch does.
_REGISTERS = 64
_FOUND: dict[tuple[object, ...], tuple[int, ...]] = {}
_LINE = 64  # bytes: BLAS may choose a kernel by how its operands are aligned


class FixedProduct:
    """A product in tiles of rows, whose numbers of rows are `tiles`.

    These are found by comparing the results of random rows: those numbers that give the same bits
    as 16 rows do, at every place of a tile; else rows go one by one. What a BLAS chooses its kernel
    by is the same for all weights of a shape, and so they are compared once for each.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], weight_OI: Tensor) -> None:
        self._product = product
        kind = type(product), weight_OI.shape, weight_OI.dtype, weight_OI.data_ptr() % _LINE
        key = (*kind, torch.get_num_threads())
        if key not in _FOUND:
            _FOUND[key] = self._find(weight_OI)
        self.tiles = _FOUND[key]

    def __call__(self, x_TI: Tensor) -> Tensor:
        rows = len(x_TI)
        if not rows:
            return self._product(x_TI)
        parts, begin = [], 0
        while begin < rows:
            tile = self._tile(rows - begin)
            parts.append(self._tiled(x_TI[begin : begin + tile], tile))
            begin += tile
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tile(self, rows: int) -> int:
        """Return how many rows the next tile has: no more than there are, unless none is so few."""
        fitting = [tile for tile in self.tiles if tile <= rows]
        # One tile with some zeros instead of several small ones.
        padded = next((tile for tile in self.tiles if tile >= rows), None)
        if padded is not None and padded <= max(2 * _COMPARED, rows):
            return padded
        return fitting[-1] if fitting else self.tiles[0]

    def _tiled(self, x_RI: Tensor, tile: int) -> Tensor:
        """Return the product of rows, made with zeros up to a tile, in memory that is aligned."""
        rows = len(x_RI)
        if rows < tile:
            x_RI = F.pad(x_RI, (0, 0, 0, tile - rows))
        elif not x_RI.is_contiguous() or x_RI.data_ptr() % _LINE:
            x_RI = x_RI.clone(memory_format=torch.contiguous_format)
        return self._product(x_RI)[:rows]

    def _find(self, weight_OI: Tensor) -> tuple[int, ...]:
        random = torch.Generator().manual_seed(0)
        x_RI = torch.randn(_TILES[-1], weight_OI.shape[1], generator=random).to(weight_OI)
        wanted_RO = self._by_tiles(x_RI, _COMPARED)
        like = tuple(rows for rows in _TILES if self._is_like(x_RI, wanted_RO, rows))
        return like if _COMPARED in like else (1,)

    def _by_tiles(self, x_RI: Tensor, tile: int) -> Tensor:
        return torch.cat([self._tiled(part, tile) for part in torch.split(x_RI, tile)])

    def _is_like(self, x_RI: Tensor, wanted_RO: Tensor, tile: int) -> bool:
        """Tell whether tiles of so many rows give what is wanted, each row at every place."""
        rows = max(tile, _COMPARED)
        if not torch.equal(self._by_tiles(x_RI[:rows], tile), wanted_RO[:rows]):
            return False
        same_RO = self._tiled(x_RI[:1].expand(tile, -1), tile)
        return torch.equal(same_RO, wanted_RO[:1].expand_as(same_RO))


class FixedRows(TorchRows):
    """What every device can do, in any dtype; see the module."""

    def norm(self, x_TD: Tensor, more_TD: Tensor | None, norm: NormWeight) -> Tensor:
        """See `RowKernels`."""
        if more_TD is not None:
            x_TD += more_TD
        return x_TD.div(_length(x_TD, norm)).mul_(norm.weight).to(self._dtype)

    def norm_rotate(
        self, x_TMH: Tensor, norm: NormWeight, cos_T1H: Tensor, sin_T1H: Tensor
    ) -> None:
        """See `RowKernels`."""
        fp32_TMH = x_TMH.to(torch.float32, copy=True)
        if norm.normalises:
            fp32_TMH.div_(_length(fp32_TMH, norm))
        fp32_TMH.mul_(norm.weight)
        swapped_TMH = fp32_TMH.roll(fp32_TMH.shape[-1] // 2, dims=-1)
        # Rounded apart: a fused form is used in registers only.
        x_TMH.copy_(fp32_TMH.mul_(cos_T1H).add_(swapped_TMH.mul_(sin_T1H)))

    def gated(self, gate_up: Tensor) -> Tensor:
        """See `RowKernels`."""
        gate, up = gate_up.chunk(2, dim=-1)
        # Rows are gone through one by one where they are parts of wider ones.
        rows = max(1, (_ALONE - 1) // gate.shape[-1])
        parts = [F.silu(part) for part in torch.split(gate, rows)]
        return torch.cat(parts).mul_(up)

    def choose(self, logits_TE: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """See `RowKernels`."""
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(top_k, dim=-1)
        if normalise:
            weights_TK /= _add_up(weights_TK)[:, None]
        return weights_TK, experts_TK


class FixedExperts(ProductExperts):
    """Experts whose products are `FixedProduct`s, each always by itself."""

    def __call__(self, x_TD: Tensor, routes: Routes) -> Tensor:
        """See `Experts`."""
        y_PD = torch.cat(
            list(self._through_chosen(x_TD, routes.pairs.tokens_P, routes.pairs.loads))
        )
        first, *more = self._weighted(y_PD, routes)
        for part in more:
            first += part
        return first

    def _weighted(self, y_PD: Tensor, routes: Routes) -> Iterator[Tensor]:
        choices = zip(routes.pairs.place_TK.unbind(1), routes.weights_TK.unbind(1), strict=True)
        for place_T, weight_T in choices:
            yield y_PD.index_select(0, place_T).float().mul_(weight_T[:, None])


def _length(x: Tensor, norm: NormWeight) -> Tensor:
    """Return the root of a row's squares and the norm's floor, by what goes row by row."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    both = torch.stack((length, norm.floor.expand_as(length)), dim=-1)
    found: Tensor = torch.linalg.vector_norm(both, dim=-1)
    return found


def _add_up(x: Tensor) -> Tensor:
    first, *more = x.unbind(-1)
    total = first.clone()
    for each in more:
        total += each
    return total


def _sigmoid(x_TE: Tensor) -> Tensor:
    """Return it of rows that begin at the same place of a register."""
    size = x_TE.shape[1]
    padded_TE = F.pad(x_TE, (0, -size % _REGISTERS))
    rows = max(1, (_ALONE - 1) // padded_TE.shape[1])
    return torch.cat([part.sigmoid() for part in torch.split(padded_TE, rows)])[:, :size]


FIXED = RowFunctions(_sigmoid, _add_up)
