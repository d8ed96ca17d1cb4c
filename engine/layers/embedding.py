"""Token ids to vectors, and vectors to logits. Legend: T tokens, S rows, V vocabulary, D hidden."""

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from engine.kernels import Product, product_kernel
from engine.layers.layer import Placement
from engine.weights import WeightSlot


class Embedding:
    """A vector for each token; also the matrix of a tied head."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, placement: Placement) -> None:
        self._name = name
        self.weight_VD = placement.empty(vocab_size, hidden_size)

    def slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(
            name=f"{self._name}.weight",
            shape=tuple(self.weight_VD.shape),
            part=(),
            target=self.weight_VD,
        )

    def prepare(self) -> None:
        pass

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        """Return the tokens' vectors, [T, D], in fp32: the start of the residual stream."""
        return F.embedding(token_ids_T, self.weight_VD).float()


class TiedHead:
    """The product with an embedding's matrix.

    Where products pack their weight this is a second copy of the matrix: every step reads all
    of it, and for a small model it is the largest there is.
    """

    def __init__(self, embedding: Embedding, placement: Placement) -> None:
        self._embedding = embedding
        self._make_product = product_kernel(placement.device)
        self._product: Product

    def slots(self) -> Iterator[WeightSlot]:
        return iter(())

    def prepare(self) -> None:
        self._product = self._make_product(self._embedding.weight_VD)

    def __call__(self, x_SD: Tensor) -> Tensor:
        return self._product(x_SD)
