"""Owns which models the router serves: whose group a request or an instance goes to.

A model is known by its name. What happens in a group is the group's own.
"""

import logging
from collections.abc import Callable

from router.group import ModelGroup
from router.membership import Instance, Member
from router.metrics.models import ModelMetrics
from service.errors import Incompatible, InvalidRequest, NotFound, ServiceError, Unavailable

_RETRY_AFTER_S = 1.0
# A router that starts again knows no model before instances come back, which takes half a second.
_RETURN_S = 2.0
_MOST_SHOWN_CHARS = 256

_log = logging.getLogger(__name__)


class Groups:
    """The groups of all models that instances have come with; `most` is their number at most.

    Where one more comes, the group that has been left the longest is given up for it.
    """

    def __init__(
        self,
        *,
        build: Callable[[str], ModelGroup],
        most: int,
        shown: ModelMetrics,
        clock: Callable[[], float],
    ) -> None:
        # Called where instances come or go, or take other work than before.
        self.on_change: Callable[[], None] = lambda: None
        # Called with the name of a model that has other decode instances than before.
        self.on_decodes_changed: Callable[[str], None] = lambda _: None
        self._build = build
        self._most = most
        self._shown = shown
        self._clock = clock
        self._began_at = clock()
        # In the order in which an instance came to each last.
        self._groups: dict[str, ModelGroup] = {}

    def all(self) -> list[ModelGroup]:
        """Returns them by name."""
        return sorted(self._groups.values(), key=lambda group: group.name)

    def get(self, name: str) -> ModelGroup | None:
        return self._groups.get(name)

    def members(self) -> list[Member]:
        """Returns all instances, whatever their model."""
        return [member for group in self.all() for member in group.pools.members.all()]

    # ---- requests

    def for_request(self, model: str) -> ModelGroup:
        """Returns the group of a model; without a name that of the only one there is.

        Raises Unavailable where no instance has come yet, NotFound for a model that none has come
        with, and InvalidRequest where it must be named.
        """
        if not self._groups:
            raise _no_instance("no instance is registered with this router")
        if model:
            group = self._groups.get(model)
            if group is None:
                raise self._unknown(model)
            return group
        # One that all instances have left is meant only where there is no other.
        served = [group for group in self.all() if group.has_instances] or self.all()
        if len(served) > 1:
            raise InvalidRequest("model", "nothing", f"name one of {_names(served)}")
        return served[0]

    def _unknown(self, model: str) -> ServiceError:
        there_are = f"this router serves {_names(self.all())}"
        model = model[:_MOST_SHOWN_CHARS]
        if self._clock() - self._began_at < _RETURN_S:
            return _no_instance(f"no instance of model {model!r} has come yet: {there_are}")
        return NotFound(f"there is no model {model!r} here: {there_are}", reason="UNKNOWN_MODEL")

    # ---- instances

    def named(self, name: str) -> tuple[ModelGroup, Member]:
        """Returns an instance and where it is. Raises NotFound."""
        for group in self._groups.values():
            member = group.pools.members.get(name)
            if member is not None:
                return group, member
        raise NotFound(f"no instance is registered as {name!r}")

    def join(self, instance: Instance) -> tuple[ModelGroup, Member, Member | None]:
        """Takes an instance in; returns its group, its member and the one it replaces.

        Raises Incompatible where it does not fit its model's other instances, another one has its
        name, or there are as many models as there may be.
        """
        left = self._leave_other_model(instance)
        name = instance.model.name
        group = self._groups.pop(name, None) or self._open(instance)
        self._groups[name] = group
        member, replaced = group.pools.join(instance)
        return group, member, replaced or left

    def _leave_other_model(self, instance: Instance) -> Member | None:
        """Takes an earlier start of the instance out of the group that it served another model in.

        Raises Incompatible where that is no earlier one.
        """
        name, epoch = instance.key
        for group in self._groups.values():
            member = group.pools.members.get(name)
            if member is None or group.name == instance.model.name:
                continue
            if epoch <= member.instance.key.epoch:
                raise Incompatible(
                    f"instance {name!r} is registered already, for model {group.name!r}: "
                    "give each instance a name of its own",
                    reason="NAME_TAKEN",
                )
            group.pools.leave(member, f"it serves {instance.model.name} now")
            return member
        return None

    # ---- models

    def _open(self, instance: Instance) -> ModelGroup:
        """Opens the group of a model that is new. Raises Incompatible where there are enough."""
        name, fingerprint = instance.model.name, instance.model.fingerprint
        if len(self._groups) >= self._most:
            self._give_one_up(name)
        for other in self._groups.values():
            if other.model.fingerprint == fingerprint:
                _log.warning(
                    "models %s and %s are the same: instances that are to serve together need the"
                    " same --served-model-name",
                    other.name,
                    name,
                )
        group = self._build(name)
        group.pools.on_change = lambda: self.on_change()
        group.pools.on_decodes_changed = lambda: self.on_decodes_changed(name)
        self._shown.add(name, group.registry)
        _log.info("model %s has its first instance", name)
        return group

    def _give_one_up(self, newcomer: str) -> None:
        left = next((group for group in self._groups.values() if group.is_idle), None)
        if left is None:
            raise Incompatible(
                f"model {newcomer!r} is one too many: this router serves {_names(self.all())}, and"
                f" at most {self._most}; start it with a larger --max-models, or correct"
                " --served-model-name",
                reason="TOO_MANY_MODELS",
            )
        _log.info("model %s is forgotten: no instance of it is left", left.name)
        del self._groups[left.name]
        self._shown.remove(left.name)
        left.end()

    async def close(self) -> None:
        """Lets go of all instances. To be called when no request is open any more."""
        for group in self.all():
            await group.close()


def _names(groups: list[ModelGroup]) -> str:
    return ", ".join(repr(group.name) for group in groups)


def _no_instance(message: str) -> Unavailable:
    return Unavailable(message, reason="NO_INSTANCE", retry_after_s=_RETRY_AFTER_S)
