"""The report as one HTML file that needs no other. Its form is `page.html.j2`."""

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2

from bench.report import Row, commit, machine

_VERSIONS = ("twinpool-server", "twinpool", "grpcio", "numpy", "matplotlib")


def write(
    path: Path,
    *,
    title: str,
    verdict: Sequence[str],
    served: Mapping[str, Any],
    settings: Mapping[str, Any],
    tables: Mapping[str, Sequence[Row]],
    warnings: Sequence[str],
    drawings: Mapping[str, str],
) -> None:
    """Write the report; `drawings` are SVG of our own, all else is shown as the text it is."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("page.html.j2").render(
        title=title,
        verdict=verdict,
        around={
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "system": platform.platform(),
            "commit": commit(),
            "Python": platform.python_version(),
            **_versions(),
            **served,
        },
        settings=settings,
        tables=tables,
        warnings=warnings,
        drawings=drawings,
    )
    path.write_text(page, encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
