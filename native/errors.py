"""The one error of this package."""


class NativeError(Exception):
    """Something cannot be compiled, kept or loaded here; the message says why."""
