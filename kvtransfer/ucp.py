"""Three calls into libucp itself, by ctypes, for what ucxx does not offer.

Owns their C declarations. Handles come from ucxx objects' `.handle`.
"""

import ctypes
import functools

_FIELD_TRANSPORTS = 1 << 3
_MAX_TRANSPORTS = 16


class _Entry(ctypes.Structure):
    _fields_ = (("transport", ctypes.c_char_p), ("device", ctypes.c_char_p))


class _Transports(ctypes.Structure):
    _fields_ = (
        ("entries", ctypes.POINTER(_Entry)),
        ("count", ctypes.c_uint),
        ("entry_bytes", ctypes.c_size_t),
    )


class _EndpointAttributes(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_address", ctypes.c_uint64 * 16),
        ("remote_address", ctypes.c_uint64 * 16),
        ("transports", _Transports),
        ("user_data", ctypes.c_void_p),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the libucp that ucxx has loaded (found by its soname); raises OSError without one."""
    library = ctypes.CDLL("libucp.so.0")
    library.ucp_ep_query.argtypes = (ctypes.c_void_p, ctypes.POINTER(_EndpointAttributes))
    library.ucp_ep_query.restype = ctypes.c_int8
    library.ucp_worker_destroy.argtypes = (ctypes.c_void_p,)
    library.ucp_worker_destroy.restype = None
    library.ucp_cleanup.argtypes = (ctypes.c_void_p,)
    library.ucp_cleanup.restype = None
    return library


def transports(endpoint: int) -> list[str]:
    """Return the transport names of a live endpoint's lanes, without repeats; [] if unknown."""
    entries = (_Entry * _MAX_TRANSPORTS)()
    attributes = _EndpointAttributes(field_mask=_FIELD_TRANSPORTS)
    attributes.transports.entries = ctypes.cast(entries, ctypes.POINTER(_Entry))
    attributes.transports.count = _MAX_TRANSPORTS
    attributes.transports.entry_bytes = ctypes.sizeof(_Entry)
    if _library().ucp_ep_query(endpoint, ctypes.byref(attributes)) != 0:
        return []
    names = [entries[i].transport.decode() for i in range(attributes.transports.count)]
    return list(dict.fromkeys(names))


def destroy_worker(worker: int) -> None:
    """Destroy a worker with all its endpoints and requests; no callback runs for them."""
    _library().ucp_worker_destroy(worker)


def destroy_context(context: int) -> None:
    """Destroy a context whose workers are gone."""
    _library().ucp_cleanup(context)
