import logging
import os
from pathlib import Path

import pytest

from service.errors import StartError
from service.security.files import LOOK_S, Reloaded, read_file


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += LOOK_S


def _number(path: Path) -> int:
    try:
        return int(read_file(path, "--file"))
    except ValueError as exc:
        raise StartError("no number") from exc


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "number"
    path.write_text("1")
    return path


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def number(path: Path, clock: Clock) -> Reloaded[int]:
    return Reloaded([path], lambda: _number(path), clock=clock)


def test_changed_file_is_read_anew_with_another_version(
    path: Path, clock: Clock, number: Reloaded[int]
) -> None:
    assert number.get_with_version() == (1, 0)
    path.write_text("22")
    assert number.get() == 1  # it has just looked
    clock.tick()
    assert number.get_with_version() == (22, 1)


def test_file_that_is_replaced_by_a_rename_is_read_anew(
    path: Path, clock: Clock, number: Reloaded[int]
) -> None:
    before = path.stat()
    other = path.with_suffix(".new")
    other.write_text("2")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))  # as old, and as long
    other.rename(path)
    clock.tick()
    assert number.get() == 2


def test_broken_and_missing_files_leave_the_old_value_and_are_logged_once(
    path: Path, clock: Clock, number: Reloaded[int], caplog: pytest.LogCaptureFixture
) -> None:
    for spoil in (lambda: path.write_text("broken"), path.unlink):
        caplog.clear()
        spoil()
        for _ in range(3):
            clock.tick()
            assert number.get_with_version() == (1, 0)
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
    path.write_text("3")
    clock.tick()
    assert number.get() == 3


def test_unusable_file_is_an_error_at_the_start(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(StartError, match=r"--file: cannot read .*missing: No such file"):
        Reloaded([missing], lambda: _number(missing))
