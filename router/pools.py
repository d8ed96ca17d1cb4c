"""Owns one model's instances as the router works with them: table, links and ledger kept in step.

An instance is in the table while its Register stream lives, and in the ledger while it may be
given work: registered, connected, and not draining when it came. One that failed a request gets
no other before it has answered: its process may be gone, and its streams end one after another. One
that fails too many of them gets nothing for a while (`breaker`).
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from router.admission import Admission
from router.assets import TokenizerStore
from router.breaker import Breakers, State
from router.decode_link import DecodeLink
from router.ledger import DecodeView, InstanceKey, Ledger, PrefillView
from router.membership import Credit, Instance, Member, Members, Model, Role
from router.prefill_link import PrefillLink
from router.prefix_index import PrefixEvents, PrefixIndex
from router.tasks import Tasks
from router.workers import Dial
from service.errors import Unavailable

# Between two questions whether a suspect answers; the first is asked at once.
_SUSPECT_PAUSE_S = 0.1

_log = logging.getLogger(__name__)


class Pools:
    """All instances of a model, and the way to each."""

    def __init__(
        self,
        *,
        router_id: str,
        ledger: Ledger,
        admission: Admission,
        clock: Callable[[], float],
        dial: Dial,
        breakers: Breakers[InstanceKey],
        on_breaker: Callable[[State], None],
    ) -> None:
        self.members = Members()
        self.tokenizers = TokenizerStore()
        self.prefixes = PrefixIndex()
        self.on_decodes_changed: Callable[[], None] = lambda: None
        # Called where instances come or go, or take other work than before.
        self.on_change: Callable[[], None] = lambda: None
        self._router_id = router_id
        self._ledger = ledger
        self._admission = admission
        self._clock = clock
        self._dial = dial
        self._decodes: dict[InstanceKey, DecodeLink] = {}
        self._prefills: dict[InstanceKey, PrefillLink] = {}
        self._breakers = breakers
        self._on_breaker = on_breaker
        self._suspects: set[InstanceKey] = set()
        self._pauses: dict[InstanceKey, asyncio.TimerHandle] = {}
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
            self._set_suspended(key)
            self._tasks.spawn(self._clear(link))

    async def _clear(self, link: PrefillLink | DecodeLink) -> None:
        key = link.instance.key
        # The same life of an instance may come again on another link.
        while link in (self._prefills.get(key), self._decodes.get(key)):
            if await link.answers():
                self._suspects.discard(key)
                self._set_suspended(key)
                return
            await asyncio.sleep(_SUSPECT_PAUSE_S)

    # ---- how requests end at an instance

    def lost_transfer(self, prefill: InstanceKey, decode: InstanceKey) -> None:
        """Takes note that KV did not get from one instance to the other; who is to blame is open.

        Where one of them has gone, it was that.
        """
        if prefill in self._prefills and decode in self._decodes:
            self._breakers.transferred(prefill, decode, self._clock(), is_failure=True)
            self.failed(prefill, partner=decode)
            self.failed(decode, partner=prefill)

    def handed_over(self, prefill: InstanceKey, decode: InstanceKey) -> None:
        """Takes note that prefill has done its part: decode has the KV."""
        if prefill in self._prefills and decode in self._decodes:
            self._breakers.transferred(prefill, decode, self._clock(), is_failure=False)
            self.succeeded(prefill)

    def failed(self, key: InstanceKey, *, partner: InstanceKey | None = None) -> None:
        """Takes note of a request that failed there through no fault of the client's.

        Or else, where `partner` was at the other end of a transfer, through its fault.
        """
        if key not in self._prefills and key not in self._decodes:
            return
        pause_s = self._breakers.failed(
            key, self._clock(), has_others=lambda: self._has_others(key), partner=partner
        )
        if pause_s is not None:
            _log.warning("%s fails too often: it gets nothing for %.1f s", key.name, pause_s)
            self._turned(key, State.OPEN)
            loop = asyncio.get_running_loop()
            self._pauses[key] = loop.call_later(pause_s, self._try_again, key)

    def succeeded(self, key: InstanceKey) -> None:
        """Takes note of a request that went well there."""
        if (key in self._prefills or key in self._decodes) and self._breakers.succeeded(
            key, self._clock()
        ):
            _log.info("%s does its work again", key.name)
            self._turned(key, State.CLOSED)

    def ended(self, key: InstanceKey) -> None:
        """A request is over there, however it ended: one that was to try it may have left."""
        if self._breakers.state(key) is State.HALF_OPEN:
            self._set_suspended(key)

    def _try_again(self, key: InstanceKey) -> None:
        del self._pauses[key]
        if self._breakers.half_open(key):
            self._turned(key, State.HALF_OPEN)

    def _turned(self, key: InstanceKey, state: State) -> None:
        self._on_breaker(state)
        self._set_suspended(key)

    def _set_suspended(self, key: InstanceKey) -> None:
        state = self._breakers.state(key)
        self._ledger.set_suspended(
            key,
            key in self._suspects or state is State.OPEN,
            after_one=state is State.HALF_OPEN,
        )
        self._instances_changed()

    def _has_others(self, key: InstanceKey) -> bool:
        """Whether its role has another instance that may be given work now."""
        return any(view.key != key for view in self._views(key in self._prefills))

    def _views(self, of_prefill: bool) -> Sequence[PrefillView | DecodeView]:
        return self._ledger.prefills() if of_prefill else self._ledger.decodes()

    def _spare_last(self, role: Role) -> None:
        """Closes what is open where no other instance of the role is left."""
        if self._views(role is Role.PREFILL):
            return
        for key in list(self._prefills if role is Role.PREFILL else self._decodes):
            if self._breakers.close(key):
                self._turned(key, State.CLOSED)

    def _forget_breaker(self, key: InstanceKey) -> None:
        self._breakers.forget(key)
        if key in self._pauses:
            self._pauses.pop(key).cancel()

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
        self._warn_of_whole_reservations(instance)
        self._connect(member)
        self._changed(instance.role)
        return member, replaced

    def _warn_of_whole_reservations(self, instance: Instance) -> None:
        overcommits = instance.role is Role.PREFILL or instance.capacity.expected_output_tokens
        if self._admission.learns_lengths and not overcommits:
            _log.warning(
                "%s reserves room for all of max_new_tokens, so --reserve expected has no effect"
                " there: start it with --kv-overcommit",
                instance.key.name,
            )

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
            self._instances_changed()
            self._spare_last(member.instance.role)

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
        self._set_suspended(instance.key)

    def _down(self, instance: Instance) -> None:
        # The end of its stream made the instance release all of this router's reservations.
        self._ledger.remove(instance.key)
        self._instances_changed()
        self._spare_last(instance.role)

    def _disconnect(self, instance: Instance, why: str) -> None:
        _log.warning("%s instance %s leaves: %s", instance.role.value, instance.key.name, why)
        links: dict[InstanceKey, DecodeLink] | dict[InstanceKey, PrefillLink]
        links = self._prefills if instance.role is Role.PREFILL else self._decodes
        self.prefixes.leave(instance.key)
        link = links.pop(instance.key)
        link.lose()
        self._suspects.discard(instance.key)
        self._forget_breaker(instance.key)
        self._down(instance)
        self._tasks.spawn(link.close())

    def _instances_changed(self) -> None:
        self._admission.instances_changed()
        self.on_change()

    def _changed(self, role: Role) -> None:
        self._instances_changed()
        if role is Role.DECODE:
            self.on_decodes_changed()

    def _fail_queue_of_other_model(self, before: Model | None) -> None:
        now = self.members.model
        if before is not None and now is not None and before.fingerprint != now.fingerprint:
            self._admission.fail_all(model_changed)


def model_changed() -> Unavailable:
    return Unavailable("the served model has changed", reason="MODEL_CHANGED")
