"""How a configuration has times written: `500ms`, `2s`, `1min`. Owns these words alone."""

import re
from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, Field

_UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|min)")


def seconds(value: object) -> object:
    """Return the seconds of "500ms", "2s" or "1min"; anything but text as it is.

    Raises ValueError for text without a unit, which could mean either of two things.
    """
    if not isinstance(value, str):
        return value
    found = _DURATION.fullmatch(value.strip())
    if found is None:
        raise ValueError("must be a number with a unit, as 500ms, 2s or 1min")
    return float(found[1]) * _UNITS[found[2]]


Seconds: TypeAlias = Annotated[float, BeforeValidator(seconds)]
Limit: TypeAlias = Annotated[float, BeforeValidator(seconds), Field(gt=0)]
