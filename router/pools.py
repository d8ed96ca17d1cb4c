"""Owns the instances as the router works with them: table, links and ledger kept in step.

An instance is in the table while its Register stream lives, and in the ledger while it may be
given work: registered, connected, and not draining when it came. One that failed a request gets
no other before it has answered: its process may be gone, and its streams end one after another.
"""

import asyncio
import logging
from collections.abc import Callable

from router.admission import Admission
from router.assets import TokenizerStore
from router.decode_link import DecodeLink
from router.ledger import InstanceKey, Ledger
from router.membership import Credit, Instance, Member, Members, Model, Role
from router.prefill_link import PrefillLink
from router.prefix_index import PrefixEvents, PrefixIndex
from router.tasks import Tasks
from router.workers import Dial
from service.errors import NotFound, Unavailable

# Between two questions whether a suspect answers; the first is asked at once.
_SUSPECT_PAUSE_S = 0.1

_log = logging.getLogger(__name__)


class Pools:
    """All instances, and the way to each."""

    def __init__(
        self,
        *,
        router_id: str,
        ledger: Ledger,
        admission: Admission,
        clock: Callable[[], float],
        dial: Dial,
    ) -> None:
        self.members = Members()
        self.tokenizers = TokenizerStore()
        self.prefixes = PrefixIndex()
        self.on_decodes_changed: Callable[[], None] = lambda: None
        self._router_id = router_id
        self._ledger = ledger
        self._admission = admission
        self._clock = clock
        self._dial = dial
        self._decodes: dict[InstanceKey, DecodeLink] = {}
        self._prefills: dict[InstanceKey, PrefillLink] = {}
        self._suspects: set[InstanceKey] = set()
        self._links = 0
        self._tasks = Tasks()

    # ---- the way to an instance

    def decode(self, key: InstanceKey) -> DecodeLink:
        """Raises Unavailable where the instance has gone."""
        if key not in self._decodes:
            raise Unavailable(f"decode instance {key.name!r} is lost", reason="INSTANCE_LOST")
        return self._decodes[key]

    def prefill(self, key: InstanceKey) -> PrefillLink:
        """Raises Unavailable where the instance has gone."""
        if key not in self._prefills:
            raise Unavailable(f"prefill instance {key.name!r} is lost", reason="INSTANCE_LOST")
        return self._prefills[key]

    def is_up(self, key: InstanceKey) -> bool:
        """Whether the instance is connected, and so may be given work."""
        known = {view.key for view in self._ledger.prefills()}
        return key in known | {view.key for view in self._ledger.decodes()}

    def suspect(self, key: InstanceKey) -> None:
        """Gives the instance nothing new until it has answered."""
        link = self._prefills.get(key) or self._decodes.get(key)
        if link is not None and key not in self._suspects:
            self._suspects.add(key)
            self._ledger.set_suspended(key, True)
            self._admission.instances_changed()
            self._tasks.spawn(self._clear(link))

    async def _clear(self, link: PrefillLink | DecodeLink) -> None:
        key = link.instance.key
        while key in self._prefills or key in self._decodes:
            if await link.answers():
                break
            await asyncio.sleep(_SUSPECT_PAUSE_S)
        self._suspects.discard(key)
        self._ledger.set_suspended(key, False)
        self._admission.instances_changed()

    def drains(self, key: InstanceKey) -> bool:
        """Whether the instance, as far as is known, ends what it has and takes nothing new."""
        member = self.members.get(key.name)
        return member is not None and member.instance.key == key and member.draining

    def note_drain(self, key: InstanceKey) -> None:
        """Takes note that an instance drains from what it says of a request.

        Its heartbeat may come later, and all retries be spent on it until then.
        """
        member = self.members.get(key.name)
        if member is not None and member.instance.key == key:
            self.drain(member)

    # ---- coming and going

    def join(self, instance: Instance) -> tuple[Member, Member | None]:
        """Takes an instance in; returns its member and the one it replaces.

        Raises Incompatible for a stale epoch and for another model.
        """
        before = self.members.model
        member, replaced = self.members.join(instance, self._clock())
        if instance.credits:
            # Nothing is to be promised before the instance has said how much.
            member.credit = Credit(blocks=(0,) * instance.capacity.dp)
        if replaced is not None:
            self._disconnect(replaced.instance, "replaced by a newer start")
        self._fail_queue_of_other_model(before)
        _log.info(
            "%s instance %s registered: %s, %s, %d blocks of %d",
            instance.role.value,
            instance.key.name,
            instance.address,
            instance.layout.summary,
            instance.capacity.blocks,
            instance.capacity.block_size,
        )
        self._connect(member)
        self._changed(instance.role)
        return member, replaced

    def leave(self, member: Member, why: str) -> None:
        """Takes an instance out; everything that runs there is told at once. Repeats do nothing."""
        if self.members.leave(member):
            self._disconnect(member.instance, why)
            self._changed(member.instance.role)

    def drain(self, member: Member) -> None:
        """Gives the instance nothing new."""
        if not member.draining:
            member.draining = True
            self._ledger.set_draining(member.instance.key)
            _log.info("instance %s drains", member.instance.key.name)
            self._admission.instances_changed()

    def take_prefixes(self, member: Member, events: PrefixEvents) -> None:
        """Takes in what an instance tells of its prefix cache; one that was replaced says nothing.

        Its new stream, which may be the same process's, tells everything from the start.
        """
        key = member.instance.key
        if self.members.get(key.name) is member and not self.prefixes.take(key, events):
            _log.warning("news of the prefix cache of %s are missing: it is not used", key.name)

    def take_credit(self, member: Member, credit: Credit) -> None:
        """Takes in how much of an instance this router may promise from now on."""
        member.credit = credit
        key = member.instance.key
        if self.members.get(key.name) is not member:
            return  # it was replaced
        if self._ledger.set_credit(key, credit.blocks, credit.sequences):
            self._admission.room_came_back()

    def named(self, name: str) -> Member:
        """Raises NotFound."""
        member = self.members.get(name)
        if member is None:
            raise NotFound(f"no instance is registered as {name!r}")
        return member

    async def close(self) -> None:
        """Lets go of all instances; what they hold for this router ends with the streams."""
        for member in self.members.all():
            self.leave(member, "the router stops")
        await self._tasks.wait()

    # ---- keeping links and ledger in step

    def _connect(self, member: Member) -> None:
        instance = member.instance
        key = instance.key
        self._links += 1
        self.prefixes.join(instance)
        if instance.role is Role.PREFILL:
            self._prefills[key] = PrefillLink(
                instance, dial=self._dial, on_up=lambda: self._up(member)
            )
        else:
            self._decodes[key] = DecodeLink(
                instance,
                dial=self._dial,
                router_id=f"{self._router_id}.{self._links}",
                on_up=lambda: self._up(member),
                on_down=lambda: self._down(instance),
            )

    def _up(self, member: Member) -> None:
        instance = member.instance
        if instance.role is Role.PREFILL:
            self._ledger.add_prefill(instance.key, instance.capacity)
        else:
            self._ledger.add_decode(instance.key, instance.capacity)
            if member.credit is not None:
                credit = member.credit
                self._ledger.set_credit(instance.key, credit.blocks, credit.sequences)
        if member.draining:
            self._ledger.set_draining(instance.key)
        self._admission.instances_changed()

    def _down(self, instance: Instance) -> None:
        # The end of its stream made the instance release all of this router's reservations.
        self._ledger.remove(instance.key)
        self._admission.instances_changed()

    def _disconnect(self, instance: Instance, why: str) -> None:
        _log.warning("%s instance %s leaves: %s", instance.role.value, instance.key.name, why)
        links: dict[InstanceKey, DecodeLink] | dict[InstanceKey, PrefillLink]
        links = self._prefills if instance.role is Role.PREFILL else self._decodes
        self.prefixes.leave(instance.key)
        link = links.pop(instance.key)
        link.lose()
        self._down(instance)
        self._tasks.spawn(link.close())

    def _changed(self, role: Role) -> None:
        self._admission.instances_changed()
        if role is Role.DECODE:
            self.on_decodes_changed()

    def _fail_queue_of_other_model(self, before: Model | None) -> None:
        now = self.members.model
        if before is not None and now is not None and before.fingerprint != now.fingerprint:
            self._admission.fail_all(model_changed)


def model_changed() -> Unavailable:
    return Unavailable("the served model has changed", reason="MODEL_CHANGED")
