"""How tokens get to the ranks that have their experts, and what these made of them back.

Owns the ways (`Dispatcher`), where each expert is (`ExpertMap`), and which way a step takes
(`Dispatch`). Does not choose experts, and does not compute them.
"""

from engine.dispatch.choose import AUTO, DISPATCHERS, Dispatch, dispatch_for
from engine.dispatch.dispatcher import Choices, Dispatcher, Members, Router
from engine.dispatch.expert_map import ExpertMap

__all__ = [
    "AUTO",
    "DISPATCHERS",
    "Choices",
    "Dispatch",
    "Dispatcher",
    "ExpertMap",
    "Members",
    "Router",
    "dispatch_for",
]
