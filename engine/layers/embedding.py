"""Token ids to vectors, and vectors to logits; each rank has the rows of a part of the vocabulary.

Legend: T tokens, S rows, V vocabulary (W: this rank's part of it), D hidden size.
"""

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from engine.kernels import Product
from engine.layers.layer import Placement
from engine.weights import WeightSlot


class Embedding:
    """A vector for each token; also the matrix of a tied head."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, placement: Placement) -> None:
        self._name = name
        self._shape = (vocab_size, hidden_size)
        self._part = part = placement.layout.ragged_part(vocab_size)
        self._is_whole = part.stop - part.start == vocab_size
        self._add_up = placement.stream.add_up
        self.weight_WD = placement.empty(part.stop - part.start, hidden_size)

    def slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(
            name=f"{self._name}.weight",
            shape=self._shape,
            part=(self._part,),
            target=self.weight_WD,
        )

    def prepare(self) -> None:
        pass

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        """Return the tokens' vectors in fp32, the start of the residual stream."""
        if self._is_whole:
            return F.embedding(token_ids_T, self.weight_WD).float()
        rows_T = token_ids_T - self._part.start
        is_other_T = (rows_T < 0) | (rows_T >= len(self.weight_WD))
        x_TD = F.embedding(rows_T.masked_fill_(is_other_T, 0), self.weight_WD)
        # Every vector is one rank's, and zero elsewhere: the sum rounds nothing.
        return self._add_up(x_TD.masked_fill_(is_other_T[:, None], 0)).float()


class TiedHead:
    """The product with an embedding's matrix.

    Where products pack their weight this is a second copy of the matrix: every step reads all
    of it, and for a small model it is the largest there is.
    """

    def __init__(self, embedding: Embedding, placement: Placement) -> None:
        self._embedding = embedding
        self._make_product = placement.make_product
        self.product: Product

    def slots(self) -> Iterator[WeightSlot]:
        return iter(())

    def prepare(self) -> None:
        self.product = self._make_product(self._embedding.weight_WD)

    def __call__(self, x_SD: Tensor) -> Tensor:
        return self.product(x_SD)
