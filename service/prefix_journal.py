"""What routers are to hear of the prefix cache: its keys, and which of them have changed since.

Owns its own copy of the keys, so that nobody else has to ask the cache, which belongs to others.
Each router has a reader of its own, since each hears of them at its own pace. Knows no stream:
`service.registration` sends what the readers give.
"""

import threading
from collections.abc import Sequence
from itertools import islice

from twinpool.v1.worker_pb2 import PrefixEvents

from service.prefix_keys import short_key

# Of one message: 128 KiB. A few such a second are more than any instance computes.
MAX_KEYS = 16_384


class PrefixJournal:
    """The keys of a cache, and what its readers are told of them."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        """`max_keys` is what one message carries at most."""
        self.max_keys = max_keys
        self.lock = threading.Lock()
        # Parents before their children: a beginning is of use before the rest of it is told.
        self.keys: dict[int, None] = {}
        self._readers: list[PrefixReader] = []

    def reader(self) -> "PrefixReader":
        """A new reader, to be closed by whoever asked for it."""
        reader = PrefixReader(self)
        with self.lock:
            self._readers.append(reader)
        return reader

    def drop(self, reader: "PrefixReader") -> None:
        """Collect nothing for a reader any more."""
        with self.lock:
            if reader in self._readers:
                self._readers.remove(reader)

    # ---- whoever calls the cache

    def stored(self, keys: Sequence[bytes]) -> None:
        """Note keys of blocks that the cache has taken in."""
        short = [short_key(key) for key in keys]
        with self.lock:
            self.keys.update(dict.fromkeys(short))
            for reader in self._readers:
                reader.note(short, True)

    def removed(self, keys: Sequence[bytes]) -> None:
        """Note keys of blocks that the cache has given up."""
        short = [short_key(key) for key in keys]
        with self.lock:
            for key in short:
                self.keys.pop(key, None)
            for reader in self._readers:
                reader.note(short, False)


class PrefixReader:
    """Collects changes until they are sent; what it holds is bounded by the cache and a message.

    Only the last change of a key counts, and a receiver may take the keys of a message in any
    order. Nothing is collected before the first `restart`.
    """

    def __init__(self, journal: PrefixJournal) -> None:
        self._journal = journal
        self._changed: dict[int, bool] = {}  # whether the key is there now
        self._is_heard = False
        self._resets = False
        self._sequence = 0

    def note(self, keys: Sequence[int], is_there: bool) -> None:
        """Keys have come or gone; with the journal's lock held."""
        if not self._is_heard:
            return
        self._changed.update(dict.fromkeys(keys, is_there))
        # With so much to take back, as when nobody has listened for long, all of it is less.
        if len(self._changed) > len(self._journal.keys) + self._journal.max_keys:
            self._start_over()

    # ---- the event loop's thread

    def restart(self) -> None:
        """Begin with the whole set again: whoever hears the next message has heard nothing."""
        with self._journal.lock:
            self._is_heard = True
            self._sequence = 0
            self._start_over()

    def next_events(self) -> PrefixEvents | None:
        """Return the next message, or None where there is nothing to tell."""
        with self._journal.lock:
            if not self._changed and not self._resets:
                return None
            self._sequence += 1
            events = PrefixEvents(sequence=self._sequence, reset=self._resets)
            self._resets = False
            told = list(islice(self._changed.items(), self._journal.max_keys))
            for key, _ in told:
                del self._changed[key]
        events.stored.extend(key for key, is_there in told if is_there)
        events.removed.extend(key for key, is_there in told if not is_there)
        return events

    def close(self) -> None:
        """Nobody listens any more."""
        self._journal.drop(self)

    def _start_over(self) -> None:
        self._resets = True
        self._changed = dict.fromkeys(self._journal.keys, True)
