"""What the ranks of an instance do about experts, and what they say of them. Pure data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.dispatch.balance import Slots

Loads = Mapping[int, Sequence[int]]  # how many tokens chose each expert, by layer


@dataclass(frozen=True, kw_only=True)
class Order:
    """What all ranks do before a step, the same one: it comes with the step.

    Attributes:
        take_loads: Say how many tokens have chosen each expert since that was asked last.
        switch: Number of the placing that is put in force; 0 for none.
    """

    take_loads: bool = False
    switch: int = 0


NOTHING = Order()


@dataclass(frozen=True, kw_only=True)
class Placing:
    """Which experts a layer's slots are to hold; numbered from 1. One is under way at a time."""

    number: int
    layer: int
    slots: Slots
