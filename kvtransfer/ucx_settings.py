"""What UCX itself must be told before its context is made.

Owns the environment variables that UCX reads; values that the operator has set stay as they are.
"""

import os
from dataclasses import dataclass
from pathlib import Path

_DEVICES = Path("/sys/class/infiniband")
_DRIVER = "libuct_ib"


@dataclass(frozen=True, kw_only=True)
class UcxSettings:
    """UCX's part of the settings. `tls` and `net_devices` None leave the choice to UCX."""

    tls: str | None = None
    net_devices: str | None = None
    tcp_segment_kib: int = 256
    keepalive_s: float = 2.0
    spin_s: float = 20e-6

    def __post_init__(self) -> None:
        if not 8 <= self.tcp_segment_kib <= 4096:
            raise ValueError(f"tcp_segment_kib must be 8 to 4096, found {self.tcp_segment_kib}")
        if self.keepalive_s <= 0 or self.spin_s < 0:
            raise ValueError("keepalive_s must be above 0; spin_s not below")


def environment(settings: UcxSettings) -> dict[str, str]:
    """Return the variables that these settings stand for."""
    segment = f"{settings.tcp_segment_kib}k"
    variables = {
        # With error handling (which must be on) UCX silently drops shared memory unless told that
        # posix may be used with it; tcp alone is several times slower on one host.
        "UCX_POSIX_ERROR_HANDLING": "y",
        "UCX_TCP_TX_SEG_SIZE": segment,
        "UCX_TCP_RX_SEG_SIZE": segment,
        "UCX_KEEPALIVE_INTERVAL": f"{settings.keepalive_s:g}s",
        # ucxx would set 8 KiB; UCX's own choice by transport measured faster for slots.
        "UCX_RNDV_THRESH": "auto",
        # Which of these are read depends on the transports that this build of UCX has.
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        # Standard output belongs to whoever runs this process.
        "UCX_LOG_FILE": "stderr",
        # It warns of every request that was under way on a link that is given up.
        "UCX_LOG_LEVEL": "error",
    }
    if settings.tls is not None:
        variables["UCX_TLS"] = settings.tls
    if settings.net_devices is not None:
        variables["UCX_NET_DEVICES"] = settings.net_devices
    return variables


def apply(settings: UcxSettings) -> None:
    """Put the variables into this process's environment; must precede the first UCX context."""
    for name, value in environment(settings).items():
        os.environ.setdefault(name, value)


def rdma_devices() -> list[str]:
    """Return the names of the host's InfiniBand and RoCE devices."""
    return sorted(path.name for path in _DEVICES.iterdir()) if _DEVICES.is_dir() else []


def drives_rdma() -> bool:
    """Whether the UCX in this process (once its context is made) has loaded what drives them.

    The wheels of UCX carry no such part: a node's own UCX does
    (RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true).
    """
    return _DRIVER in Path("/proc/self/maps").read_text()
