"""What the host offers for moving KV, in words for whoever starts an instance.

Owns what is said about RDMA devices and about GPU memory that UCX cannot move fast.
"""

from collections.abc import Mapping

from kvtransfer.ucx_settings import rdma_devices

_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


class SlowMemory(Exception):
    """Memory that UCX could only copy through the host; the message says what to set."""


def describe_rdma(*, driven: bool) -> str:
    """Return the start-up line about InfiniBand and RoCE; `driven` as Transport.rdma says."""
    names = ", ".join(rdma_devices())
    if not names:
        return (
            "no InfiniBand or RoCE device on this host: KV goes through mapped memory within it "
            "and over TCP to others"
        )
    if driven:
        return f"InfiniBand or RoCE in use for KV, through UCX: {names}"
    return (
        f"InfiniBand or RoCE is here ({names}) but not in use: this build of UCX cannot drive it; "
        "install the system's UCX with its ib transports and set "
        "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true"
    )


def check_device_memory(environment: Mapping[str, str]) -> None:
    """Refuse an allocator whose memory neither CUDA IPC nor GPUDirect can reach.

    Expandable segments are mapped piece by piece into one virtual range, of which no handle can be
    exported; UCX then falls back to copies through the host, hundreds of times slower, and says
    nothing. Raises SlowMemory.
    """
    for name in _ALLOCATOR_SETTINGS:
        for setting in environment.get(name, "").split(","):
            key, _, value = setting.partition(":")
            if key.strip() == "expandable_segments" and value.strip().lower() == "true":
                raise SlowMemory(
                    f"{name} has expandable_segments:True: UCX cannot move such memory between "
                    f"GPUs without copies through the host; set expandable_segments:False"
                )
