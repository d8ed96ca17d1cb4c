"""Owns why `Admission` does not do now what it was asked for."""

from decode.sequence import Transfer


class StillOpen(Exception):
    """The sequence's transfer may still write; `transfer.over` says when it no longer does."""

    def __init__(self, transfer: Transfer) -> None:
        super().__init__(f"transfer {transfer.transfer_id:016x} is still open")
        self.transfer = transfer


class NoRoom(Exception):
    """The reservation does not fit now."""

    def __init__(self, reason: str, *, needed: int, free: int) -> None:
        super().__init__(f"{reason}: needs {needed}, {free} free")
        self.reason = reason
        self.needed = needed
        self.free = free
