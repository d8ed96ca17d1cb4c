"""Which experts are where: pure data, which a balancer may change between steps.

A logical expert, a number in the checkpoint, lies in one or more physical slots of the ep ranks.
Knows nothing of weights.

Legend: E logical experts, R replicas that an expert may have, T tokens, K experts of a token.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import UnsupportedError
from engine.parallel import Layout


@dataclass(frozen=True)
class ExpertMap:
    """The logical experts in each ep rank's slots, for one layer.

    An expert with several slots is replicated: its tokens take turns. Raises UnsupportedError
    where one of `num_experts` has no slot, or several on a rank, or does not exist, and for a rank
    without any.
    """

    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for rank, held in enumerate(self.slots):
            wrong = [e for e in held if not 0 <= e < self.num_experts or held.count(e) > 1]
            if wrong or not held:
                raise UnsupportedError(
                    f"ep rank {rank} needs some of {self.num_experts} experts, each once; "
                    f"found {list(held)}"
                )
        missing = set(range(self.num_experts)).difference(*self.slots)
        if missing:
            raise UnsupportedError(f"no ep rank has the experts {sorted(missing)}")

    @classmethod
    def even(cls, num_experts: int, layout: Layout, redundant: int = 0) -> "ExpertMap":
        """Return the map of neighbours on each rank; `redundant` more slots have those that follow.

        Raises UnsupportedError where a rank would have more slots than there are experts.
        """
        parts = [layout.expert_part(num_experts, rank) for rank in range(layout.ep)]
        most = num_experts - max(map(len, parts))
        if redundant > most:
            raise UnsupportedError(
                f"{redundant} redundant experts on each of {layout.ep} ep ranks, beside their part "
                f"of {num_experts}: a rank has none twice; use 0 to {most}"
            )
        wider = (range(part.start, part.stop + redundant) for part in parts)
        return cls(num_experts, tuple(tuple(e % num_experts for e in part) for part in wider))

    @property
    def width(self) -> int:
        """Slots that each rank has in the numbering: as many as the rank with the most."""
        return max(map(len, self.slots))

    def tables(self, device: torch.device) -> "SlotTables":
        """Return the map as tensors."""
        found: defaultdict[int, list[int]] = defaultdict(list)
        for rank, held in enumerate(self.slots):
            for place, expert in enumerate(held):
                found[expert].append(rank * self.width + place)
        each = [found[expert] for expert in range(self.num_experts)]
        most = max(map(len, each))
        rows = [(slots * most)[:most] for slots in each]
        return SlotTables(
            slots_ER=torch.tensor(rows, device=device),
            replicas_E=torch.tensor(list(map(len, each)), device=device),
            width=self.width,
        )


@dataclass(frozen=True, kw_only=True)
class SlotTables:
    """An `ExpertMap` to look up: each expert's slots, as far as `replicas_E` says."""

    slots_ER: Tensor
    replicas_E: Tensor
    width: int

    def look_up(self, experts_TK: Tensor, first: int) -> Tensor:
        """Return a slot of each expert; of replicas the one whose turn the token's position is.

        The first token's position is `first`: all ranks that ask for the same get the same.
        """
        if self.slots_ER.shape[1] == 1:
            return self.slots_ER[:, 0][experts_TK]
        positions_T1 = torch.arange(first, first + len(experts_TK), device=experts_TK.device)
        turns_TK = positions_T1[:, None] % self.replicas_E[experts_TK]
        return self.slots_ER[experts_TK, turns_TK]
