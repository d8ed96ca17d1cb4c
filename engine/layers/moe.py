"""A router and its experts: each token goes through the K experts with the highest scores.

Without a dispatcher every rank has all experts, and tensor parallelism splits their inner size.
With one, ranks have some of them; see engine.dispatch.

Legend: T tokens, D hidden size, E experts of the layer, K experts of a token, P = T * K pairs, I
inner size.
"""

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.dispatch import Choices, Dispatcher, ExpertMap
from engine.errors import UnsupportedError
from engine.kernels import experts_kernel
from engine.kernels.experts import Experts, Put
from engine.kernels.step import SparseWeights
from engine.layers.expert_router import ExpertRouter
from engine.layers.layer import Placement
from engine.layers.mlp import DenseMLP
from engine.weights import Fill, WeightSlot

_OF_EXPERT = re.compile(r"\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


class SparseMLP:
    """The experts of one layer; `name` is its place in the checkpoint, "model.layers.0.mlp"."""

    def __init__(self, config: ModelConfig, layer: int, name: str, placement: Placement) -> None:
        assert config.moe is not None
        self._name = name
        self._num_experts = config.moe.num_experts
        layout, hidden = placement.layout, config.hidden_size
        self._sizes = (hidden, config.moe.intermediate_size)
        self._inner = layout.expert_inner_part(config.moe.intermediate_size)
        self._add_up = placement.stream.add_up
        self._dispatch = placement.dispatch
        self._ep_rank, self._dp_rank = layout.ep_rank, layout.dp_rank
        experts = placement.expert_maps.get(layer) or ExpertMap.even(
            self._num_experts, layout, placement.redundant_experts
        )
        self._ep = layout.ep
        self._check_size(experts)
        self._held = experts.slots[self._ep_rank]
        self._device = placement.device
        self._tables = experts.tables(placement.device)
        self._loads_E = torch.zeros(self._num_experts, dtype=torch.int64, device=placement.device)
        self._router = ExpertRouter(config.moe, hidden, f"{name}.gate", placement)
        self._shared: DenseMLP | None = None
        if shared_size := config.moe.shared_size:
            self._shared = DenseMLP(hidden, shared_size, f"{name}.shared_experts", placement)
        self._make_experts = experts_kernel(placement.device, deterministic=placement.deterministic)
        self._empty = placement.empty
        self._loading: tuple[Tensor, Tensor] | None = self._room(len(self._held))
        self._experts: Experts

    def _room(self, experts: int) -> tuple[Tensor, Tensor]:
        """Return uninitialised weights of experts, [E, 2I, D] and [E, D, I]."""
        inner, hidden = self._inner.stop - self._inner.start, self._sizes[0]
        return self._empty(experts, 2 * inner, hidden), self._empty(experts, hidden, inner)

    def slots(self) -> Iterator[WeightSlot]:
        yield from self._router.slots()
        if self._shared is not None:
            yield from self._shared.slots()
        assert self._loading is not None
        for expert, gate_up, down in zip(self._held, *self._loading, strict=True):
            yield from self._slots_of(expert, gate_up, down)

    def _slots_of(self, expert: int, gate_up: Tensor, down: Tensor) -> Iterator[WeightSlot]:
        hidden, whole = self._sizes
        inner, rows, columns = down.shape[1], (self._inner,), (slice(None), self._inner)
        name = f"experts.{expert}"
        yield self._slot(f"{name}.gate_proj", (whole, hidden), rows, gate_up[:inner])
        yield self._slot(f"{name}.up_proj", (whole, hidden), rows, gate_up[inner:])
        yield self._slot(f"{name}.down_proj", (hidden, whole), columns, down)

    def _slot(
        self, name: str, shape: tuple[int, ...], part: tuple[slice, ...], target: Tensor
    ) -> WeightSlot:
        name = f"{self._name}.{name}.weight"
        return WeightSlot(name=name, shape=shape, part=part, target=target)

    def ignores(self, tensor_name: str) -> bool:
        """Tell whether this is a tensor of an expert that other ranks have."""
        found = _OF_EXPERT.fullmatch(tensor_name, len(self._name))
        if found is None or not tensor_name.startswith(self._name):
            return False
        expert = int(found[1])
        return expert < self._num_experts and expert not in self._held

    def prepare(self) -> None:
        assert self._loading is not None
        self._experts = self._make_experts(*self._loading)
        self._router.prepare()
        self._loading = None  # the experts have what they need
        if self._shared is not None:
            self._shared.prepare()

    def weights(self) -> SparseWeights | None:
        """Return what a step through all layers needs; None where it computes no such layer.

        That is where ranks share the experts, or there is more than a softmax and its experts.
        """
        router = self._router.weights()
        if self._dispatch is not None or self._shared is not None or router is None:
            return None
        return SparseWeights(router=router, experts=self._experts)

    def __call__(self, x_TD: Tensor, most_rows: int) -> Tensor:
        """Return the experts' weighted sum in fp32, each token's in the order of its choices."""
        routed = self._routed(x_TD, most_rows)
        if self._shared is None:
            return routed
        return routed.add_(self._shared(x_TD, most_rows))

    def _routed(self, x_TD: Tensor, most_rows: int) -> Tensor:
        if self._dispatch is not None:
            return self._dispatch(x_TD, self._choose, self._experts.pairs, most_rows)
        if not len(x_TD):
            return self._add_up(torch.empty_like(x_TD, dtype=torch.float32))
        return self._add_up(self._experts(x_TD, self._router.route(x_TD)))

    @property
    def held(self) -> tuple[int, ...]:
        """The experts in this rank's slots."""
        return self._held

    def place(self, experts: ExpertMap) -> None:
        """Route by another map from the next step on; all ranks call it between the same steps.

        `check` must have found nothing.
        """
        self._tables = experts.tables(self._device)

    def check(self, experts: ExpertMap) -> None:
        """Raise UnsupportedError where this rank's slots do not hold what a map says."""
        self._check_size(experts)
        wanted = experts.slots[self._ep_rank]
        if wanted != self._held:
            raise UnsupportedError(
                f"{self._name}: a map has the experts {list(wanted)} on ep rank {self._ep_rank}, "
                f"whose slots hold {list(self._held)}: `put` them first"
            )

    def _check_size(self, experts: ExpertMap) -> None:
        if (experts.num_experts, len(experts.slots)) != (self._num_experts, self._ep):
            raise UnsupportedError(
                f"{self._name} has {self._num_experts} experts on {self._ep} ep ranks; a map for "
                f"it is of {experts.num_experts} on {len(experts.slots)}"
            )

    def stage(self, expert: int, fill: Fill) -> Put:
        """Have an expert's weights filled, this rank's part; return what gives a slot that expert.

        From any thread.
        """
        (gate_up,), (down,) = self._room(1)
        fill(list(self._slots_of(expert, gate_up, down)))
        return self._experts.stage(gate_up, down)

    def put(self, slot: int, expert: int, staged: Put) -> None:
        """Give a slot of this rank another expert, as it was staged.

        Nothing may be routed to the slot until `place` says what it holds.
        """
        staged(slot)
        self._held = (*self._held[:slot], expert, *self._held[slot + 1 :])

    def take_loads(self) -> Tensor:
        """Return how many tokens chose each expert since the last call, [E], and begin anew.

        Only with a dispatcher. Every token is counted on one of the ranks that share the experts:
        the sum over them is the instance's.
        """
        found = self._loads_E.clone()
        self._loads_E.zero_()
        return found

    def trial(self, dispatcher: Dispatcher, x_TD: Tensor) -> Callable[[], object]:
        """Return a pass of these rows on every dp rank by a dispatcher, to be timed."""

        def run() -> None:
            dispatcher(x_TD, self._choose, self._experts.pairs, len(x_TD))
            if x_TD.device.type == "cuda":
                torch.cuda.synchronize(x_TD.device)

        return run

    def _choose(self, x_TD: Tensor, first: int, counted: slice = slice(None)) -> Choices:
        """See engine.dispatch.Router."""
        weights_TK, experts_TK = self._router.choose(x_TD)
        chosen_P = experts_TK[counted].flatten()
        self._loads_E.scatter_add_(0, chosen_P, torch.ones_like(chosen_P))
        return Choices(
            # Dp ranks with a token each are to take different replicas.
            slots_TK=self._tables.look_up(experts_TK, first + self._dp_rank),
            weights_TK=weights_TK,
            width=self._tables.width,
        )
