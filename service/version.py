"""Which Twinpool this is."""

from importlib.metadata import PackageNotFoundError, version


def server_version() -> str:
    """The installed version, or "source" when run from a tree that is not installed."""
    try:
        return version("twinpool-server")
    except PackageNotFoundError:
        return "source"
