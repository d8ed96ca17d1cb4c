"""Values that are made of files and made anew once a file changes, without a restart.

Owns when to look and what stays in use where the new content is broken.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from service.errors import StartError

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

# Between two looks at the files: calls come by the thousand a second, changes a few times a year.
LOOK_S = 1.0


class Reloaded(Generic[_T]):
    """What `load` makes of some files, as they are now; for any thread.

    Raises the StartError of `load` when it is made. Later, a file that is broken, half written or
    gone leaves the last good value in use, and is logged once.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        load: Callable[[], _T],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._load = load
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = self._look()
        self._value = load()
        self._version = 0
        self._look_at = clock() + LOOK_S

    def get(self) -> _T:
        """Returns the value; looks at the files at most once in `LOOK_S` seconds."""
        return self.get_with_version()[0]

    def get_with_version(self) -> tuple[_T, int]:
        """Returns the value and a number that is another one for each new value."""
        with self._lock:
            now = self._clock()
            if now >= self._look_at:
                self._look_at = now + LOOK_S
                self._refresh()
            return self._value, self._version

    def _refresh(self) -> None:
        # Looked at before they are read: what changes while they are read is seen the next time.
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._value = self._load()
        except StartError as exc:
            _log.error("a changed file cannot be used, the old content stays: %s", exc)
            return
        self._version += 1
        _log.info("read anew: %s", ", ".join(path.name for path in self._paths))

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_signature(path) for path in self._paths)


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_file(path: Path, flag: str) -> bytes:
    """Returns a file's content; `StartError` names the flag that it was given with."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise StartError(
            f"{flag}: cannot read {path}: {exc.strerror}; give a file that this user may read"
        ) from exc
