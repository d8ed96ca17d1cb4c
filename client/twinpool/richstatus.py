"""Reads the details that a gRPC error carries besides its code and message.

Owns the few messages of google.rpc that matter here, by their published field numbers, so that
the client needs no package for them; they live in a pool of their own and clash with nobody's.
"""

from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

DOMAIN = "twinpool"

# Messages of google/rpc/status.proto and error_details.proto, with google.protobuf's Any and
# Duration: field names in the order of their numbers, from 1. A type with * is repeated.
_MESSAGES = {
    "Status": {"code": "int32", "message": "string", "details": "*Any"},
    "Any": {"type_url": "string", "value": "bytes"},
    "ErrorInfo": {"reason": "string", "domain": "string", "metadata": "*Entry"},
    "Entry": {"key": "string", "value": "string"},
    "RetryInfo": {"retry_delay": "Duration"},
    "Duration": {"seconds": "int64", "nanos": "int32"},
    "BadRequest": {"field_violations": "*FieldViolation"},
    "FieldViolation": {"field": "string", "description": "string"},
}


@dataclass(frozen=True, kw_only=True)
class RichStatus:
    """What an error's details say; empty where they say nothing.

    `violations` are (field, description) pairs; `ours` tells that Twinpool itself answered.
    """

    ours: bool = False
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None
    violations: tuple[tuple[str, str], ...] = ()


def read_rich_status(data: bytes) -> RichStatus:
    """Read the value of grpc-status-details-bin; details that cannot be read are left out."""
    ours, reason, retry_after_s = False, "", None
    metadata: dict[str, str] = {}
    violations: list[tuple[str, str]] = []
    for kind, detail in _details(data):
        if kind == "ErrorInfo" and detail.domain == DOMAIN:
            ours, reason = True, detail.reason
            metadata = {entry.key: entry.value for entry in detail.metadata}
        elif kind == "RetryInfo":
            retry_after_s = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
        elif kind == "BadRequest":
            violations += [(v.field, v.description) for v in detail.field_violations]
    return RichStatus(
        ours=ours,
        reason=reason,
        metadata=metadata,
        retry_after_s=retry_after_s,
        violations=tuple(violations),
    )


def _details(data: bytes) -> list[tuple[str, Any]]:
    details = []
    try:
        for packed in _CLASSES["Status"].FromString(data).details:
            package, _, kind = packed.type_url.rpartition("/")[2].rpartition(".")
            if package == "google.rpc" and kind in _CLASSES:
                details.append((kind, _CLASSES[kind].FromString(packed.value)))
    except DecodeError:
        return details
    return details


def _classes() -> dict[str, Any]:
    file = FileDescriptorProto(
        name="twinpool/richstatus.proto", package="twinpool.richstatus", syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field_name, kind) in enumerate(fields.items(), start=1):
            described = message.field.add(name=field_name, number=number)
            described.label = FieldDescriptorProto.LABEL_OPTIONAL
            if kind.startswith("*"):
                described.label = FieldDescriptorProto.LABEL_REPEATED
            kind = kind.removeprefix("*")
            if kind in _MESSAGES:
                described.type = FieldDescriptorProto.TYPE_MESSAGE
                described.type_name = f".{file.package}.{kind}"
            else:
                described.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    pool = DescriptorPool()
    pool.Add(file)
    return {
        name: GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}"))
        for name in _MESSAGES
    }


_CLASSES = _classes()
