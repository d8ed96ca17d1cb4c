"""Logging of a Twinpool process: plain lines for people or JSON lines for machines, on stderr.

Owns formats and levels. Callers pass `extra={"request_id": ...}` (or use `request_log`) and never
log prompts, tokens or keys.
"""

import json
import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, Literal

from service.trace import current_trace

LogLevel = Literal["debug", "info", "warning", "error"]

_EXTRA_FIELDS = ("rank", "request_id", "trace_id")


def configure_logging(
    *, role: str, instance: str = "", level: LogLevel = "info", as_json: bool = False
) -> None:
    """Sends this process's log to stderr in one format; replaces what was configured before."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormatter if as_json else PlainFormatter
    handler.setFormatter(formatter(role=role, instance=instance))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("grpc", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def about_request(request_id: int, trace_id: str = "") -> dict[str, str]:
    """Returns the `extra` of a line about a request.

    A call's own task need not say its trace; other threads do not know it.
    """
    extra = {"request_id": f"{request_id:016x}"}
    return extra | {"trace_id": trace_id} if trace_id else extra


def request_log(logger: logging.Logger, request_id: str) -> "logging.LoggerAdapter[logging.Logger]":
    """Returns a logger whose lines carry a request's id."""
    return _MergingAdapter(logger, {"request_id": request_id})


class _MergingAdapter(logging.LoggerAdapter[logging.Logger]):
    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(self.extra or {}), **kwargs.get("extra", {})}
        return msg, kwargs


class PlainFormatter(logging.Formatter):
    """One line: time, level, role or instance, message, then the extra fields."""

    def __init__(self, *, role: str, instance: str) -> None:
        super().__init__()
        self._who = instance or role

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={value}" for name, value in _extras(record))
        head = f"{clock}.{int(record.msecs):03d} {record.levelname.lower():7} {self._who}: "
        lines = [head + record.getMessage() + fields]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; `time` is in seconds since the epoch."""

    def __init__(self, *, role: str, instance: str) -> None:
        super().__init__()
        self._fixed = {"role": role, "instance": instance}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            **self._fixed,
            "logger": record.name,
            "message": record.getMessage(),
            **dict(_extras(record)),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _extras(record: logging.LogRecord) -> list[tuple[str, Any]]:
    found = {name: getattr(record, name) for name in _EXTRA_FIELDS if hasattr(record, name)}
    trace = current_trace()
    if trace is not None:
        found.setdefault("trace_id", trace.trace_id)
    return list(found.items())
