"""Where this user's processes keep what took time to make.

Owns the place, and the check that nobody else can have written what is about to be run.
"""

import os
import stat
from pathlib import Path

from native.errors import NativeError


def cache_folder(name: str) -> Path:
    """Return the folder for one kind of things, which need not be there yet.

    Raises NativeError for a user without a home.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as exc:
        raise NativeError(str(exc)) from exc
    return Path(root) / "twinpool" / name


def own_folder(name: str) -> Path:
    """Return the folder, made where it is missing; raises NativeError unless it is the user's."""
    folder = cache_folder(name)
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_own(each)
    return folder


def check_own(path: Path) -> None:
    """Raise NativeError unless only this user can have written it: it is about to be run."""
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeError(f"{path} belongs to another user or can be written to by others")
