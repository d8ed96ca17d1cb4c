"""Owns the access log: one JSON line for each request at its end, for operators and their tools.

Has no prompt, text, token id or secret in it. Lines are written by a thread of its own, so that a
slow disk delays no request; where it cannot follow, lines are lost and counted.
"""

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import IO, Any

from service.errors import StartError

STDOUT = "-"
# Lines that may wait for the disk: seconds of a busy router, a few megabytes.
_MOST_WAITING = 8192
_CLOSE_TIMEOUT_S = 5.0


@dataclass(kw_only=True)
class AccessEntry:
    """One request as its line shows it; filled in on its way. Times are in seconds.

    `time` is when it ended, since the epoch. `resumed_tokens` of the output are another router's.
    `ttft_s` is from arrival to first token, `inter_token_s` the mean time between tokens after it.
    What the request did not come to is 0 or empty.
    """

    time: float = 0.0
    method: str = ""
    request_id: str = ""
    trace_id: str = ""
    tenant: str = ""
    token: str = ""
    model: str = ""
    priority: int = 0
    outcome: str = ""
    reason: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    resumed_tokens: int = 0
    prefill_instance: str = ""
    decode_instance: str = ""
    queue_s: float = 0.0
    reserve_s: float = 0.0
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    handoff_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    inter_token_s: float = 0.0
    total_s: float = 0.0
    retries: int = 0
    moves: int = 0


class AccessLog:
    """A log in a file, or on stdout for "-"; `on_lost` is told of each line that was not written.

    The file is opened anew when it was moved or deleted, as log rotation does. Raises StartError
    where it cannot be opened at first.
    """

    def __init__(self, path: str, *, on_lost: Callable[[], None]) -> None:
        self._path = path
        self._on_lost = on_lost
        self._file: IO[str] | None = None
        self._entries: queue.Queue[AccessEntry | None] = queue.Queue(_MOST_WAITING)
        try:
            self._open()
        except OSError as exc:
            raise StartError(
                f"cannot write --access-log {path}: {exc.strerror}; give another file"
            ) from exc
        self._thread = threading.Thread(target=self._write_all, name="access-log", daemon=True)
        self._thread.start()

    def put(self, entry: AccessEntry) -> None:
        """Has a line written soon; never waits."""
        try:
            self._entries.put_nowait(entry)
        except queue.Full:
            self._on_lost()

    def close(self) -> None:
        """Writes what is left, within a few seconds."""
        try:
            self._entries.put(None, timeout=_CLOSE_TIMEOUT_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_TIMEOUT_S)

    # ---- in the thread

    def _write_all(self) -> None:
        while (entry := self._entries.get()) is not None:
            try:
                self._write(line_of(entry), more=not self._entries.empty())
            except OSError:
                self._on_lost()
        if self._file is not None and self._path != STDOUT:
            self._file.close()

    def _write(self, line: str, *, more: bool) -> None:
        self._follow()
        assert self._file is not None
        self._file.write(line + "\n")
        if not more:
            self._file.flush()

    def _follow(self) -> None:
        """Turns to a new file where the one under our name is not the one that is open."""
        if self._file is None:
            self._open()
        elif self._path != STDOUT and not _is_at(self._file, self._path):
            old, self._file = self._file, None
            old.close()
            self._open()

    def _open(self) -> None:
        if self._path == STDOUT:
            self._file = sys.stdout
            return
        # Whose requests there were is not for everybody to read.
        self._file = open(  # noqa: SIM115
            self._path, "a", encoding="utf-8", opener=lambda p, flags: os.open(p, flags, 0o640)
        )


def line_of(entry: AccessEntry) -> str:
    """Returns an entry's line: numbers as short as they are exact to a microsecond."""
    fields: dict[str, Any] = {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in asdict(entry).items()
    }
    return json.dumps(fields, ensure_ascii=True)


def _is_at(file: IO[str], path: str) -> bool:
    opened = os.fstat(file.fileno())
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return (opened.st_dev, opened.st_ino) == (found.st_dev, found.st_ino)
