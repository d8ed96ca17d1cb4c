"""Owns which instances the operator has named: who may register, and who is missing.

Named or not, instances come by themselves. An address says where an instance is called, not who it
is: that is for certificates and tokens to prove.
"""

from collections.abc import Iterable, Sequence

from router.membership import Instance, Role
from service.errors import Incompatible


class Roster:
    """The addresses of a role's instances; a role for which none is given takes any."""

    def __init__(self, *, prefill: Sequence[str] = (), decode: Sequence[str] = ()) -> None:
        self._named = {Role.PREFILL: prefill, Role.DECODE: decode}

    def check(self, instance: Instance) -> None:
        """Raises Incompatible for an instance that is not among those of its role."""
        role, address = instance.role.value, instance.address
        named = self._named[instance.role]
        if named and address not in named:
            raise Incompatible(
                f"{role} instance {instance.key.name!r} at {address} is none of those that this"
                f" router was given with --{role}: add the address there, or have the instance use"
                " one of them (its --advertise-host or --host, and --port)",
                reason="NOT_NAMED",
            )

    def missing(self, instances: Iterable[Instance]) -> list[tuple[Role, str]]:
        """Returns role and address of those that are not among the registered ones."""
        there = {(instance.role, instance.address) for instance in instances}
        named = ((role, address) for role, some in self._named.items() for address in some)
        return [one for one in named if one not in there]
