"""One JSON file of a model folder, read field by field with checks.

Knows no model: which fields there are and what they mean is its callers'.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError


class Fields:
    """The content of one JSON file, or of the object `within` it, read with checks."""

    def __init__(self, path: Path, content: Mapping[str, Any], within: str = "") -> None:
        self.path = path
        self.content = content
        self._prefix = f"{within}." if within else ""

    def error(self, name: str, expected: str) -> ConfigError:
        found = repr(self.content[name]) if name in self.content else "missing"
        return ConfigError(self.path, f"{self._prefix}{name} is {found}; it must be {expected}")

    def get(self, name: str) -> Any:
        return self.content.get(name)

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer of at least 1; without a default it must be there."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, "an integer of at least 1")
        return value

    def count(self, name: str) -> int:
        """Return an integer of at least 0; 0 where it is missing."""
        return 0 if self.get(name) in (None, 0) else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number above 0; without a default it must be there."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Return an integer or a list of them as a tuple; missing and null are empty."""
        value = self.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if any(not isinstance(item, int) or isinstance(item, bool) or item < 0 for item in values):
            raise self.error(name, "an integer from 0, or a list of them")
        return tuple(values)


def read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(path, f"cannot be read as JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise ConfigError(path, f"holds a {type(content).__name__}; it must hold an object")
    return content
