"""Owns how lists of addresses are written in settings: host:port, again or after a comma."""

from collections.abc import Iterable


def split_list(given: object) -> object:
    """Returns texts that hold several addresses as one tuple of them; anything else as it is."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return given
    return tuple(address.strip() for text in texts for address in text.split(","))


def is_address(text: str) -> bool:
    """Whether a text is host:port."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536


def check_distinct(addresses: Iterable[str], what: str) -> None:
    """Raises ValueError where one is named twice; `what` they are is for the message."""
    addresses = list(addresses)
    if len(set(addresses)) < len(addresses):
        raise ValueError(f"must name each {what} once")
