"""How experts get into other slots while a model runs: read beside the steps, put in between two.

Owns what has been read and waits for its step. Decides nothing, and knows no other rank: all of
them must switch before the same pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.dispatch import ExpertMap
from engine.kernels.experts import Put
from engine.split_experts import SplitExperts
from engine.weights import Fill


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A layer's next map, and the weights that this rank lacks for it: by slot, with their expert.

    They take the room of as many experts until the switch.
    """

    layer: int
    experts: ExpertMap
    puts: Mapping[int, tuple[int, Put]]


def stage(experts: SplitExperts, ep_rank: int, layer: int, to: ExpertMap, fill: Fill) -> Staged:
    """Read the experts of a layer that `to` has in slots of this rank where others are now.

    From any thread but while `switch` runs; takes as long as `fill` does. There is nothing to read
    where the layer is not of this rank's stage. Raises what `fill` raises.
    """
    held = experts.held(layer)
    wanted: Sequence[int] = to.slots[ep_rank] if held is not None else ()
    with torch.inference_mode():
        puts = {
            slot: (new, experts.stage(layer, new, fill))
            for slot, (old, new) in enumerate(zip(held or (), wanted, strict=True))
            if old != new
        }
    return Staged(layer=layer, experts=to, puts=puts)


def switch(experts: SplitExperts, staged: Staged) -> None:
    """Put in what was read, and route by the new map from the next pass on; the step loop's."""
    for slot, (expert, put) in staged.puts.items():
        experts.put(staged.layer, slot, expert, put)
    experts.place({staged.layer: staged.experts})
