"""Owns the table of placement policies, by the names that `--policy` takes."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from router.policies.expected import Expected
from router.policies.least_loaded import LeastLoaded
from router.policies.prefix import PrefixOnly
from router.policies.round_robin import RoundRobin
from router.policy import RoutingPolicy

PolicyName = Literal["expected", "least-loaded", "round-robin", "prefix"]

POLICIES: Mapping[PolicyName, Callable[[], RoutingPolicy]] = MappingProxyType(
    {
        "expected": Expected,
        "least-loaded": LeastLoaded,
        "round-robin": RoundRobin,
        "prefix": PrefixOnly,
    }
)
