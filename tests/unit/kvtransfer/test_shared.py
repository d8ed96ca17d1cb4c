"""Memory files: what a reader sees, what it is refused, and what leases tell it."""

import fcntl
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvtransfer.shared import MappedRegion, NotMappable, SharedRegion


@pytest.fixture
def region() -> SharedRegion:
    return SharedRegion()


def test_a_reader_sees_what_the_owner_writes_and_cannot_write(region: SharedRegion) -> None:
    first = region.allocate((2, 3), torch.int16)
    second = region.allocate((4,), torch.bfloat16)
    mapped = MappedRegion(region.handle)
    seen = mapped.array(region.offset_of(first), (2, 3), np.int16)
    assert not seen.any()
    first[1, 2] = 7
    second.fill_(1.0)
    assert seen[1, 2] == 7
    bits = mapped.array(region.offset_of(second), (4,), np.int16)
    assert (bits == torch.ones(4, dtype=torch.bfloat16).view(torch.int16).numpy()).all()
    with pytest.raises(ValueError, match="read-only"):
        seen[0, 0] = 1


def test_tensors_are_page_aligned_and_apart(region: SharedRegion) -> None:
    tensors = [region.allocate((5,), torch.float32) for _ in range(3)]
    assert all(tensor.data_ptr() % 4096 == 0 for tensor in tensors)
    assert len({region.offset_of(tensor) for tensor in tensors}) == 3
    with pytest.raises(ValueError, match="not allocated"):
        region.offset_of(torch.zeros(1))


def test_nothing_is_allocated_after_the_handle_was_given(region: SharedRegion) -> None:
    _ = region.handle
    with pytest.raises(ValueError, match="handed out"):
        region.allocate((1,), torch.int16)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"boot_id": bytes(16)}, "another host"),
        ({"name": "twinpool-kv-" + "0" * 32}, "process namespace"),
        ({"name": "passwords"}, "no name"),
        ({"descriptor": 9999}, "cannot be opened"),
        ({"size": 1 << 40}, "size"),
        ({"size": 0}, "no name or size"),
    ],
)
def test_a_wrong_handle_is_refused(
    region: SharedRegion, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(NotMappable, match=reason):
        MappedRegion(replace(region.handle, **changes))  # type: ignore[arg-type]


def test_a_file_that_could_shrink_is_refused(region: SharedRegion) -> None:
    handle = region.handle
    loose = os.memfd_create(handle.name, os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, handle.size)
    with pytest.raises(NotMappable, match="not sealed"):
        MappedRegion(replace(handle, descriptor=loose))
    os.close(loose)


def test_a_shared_file_cannot_shrink(region: SharedRegion) -> None:
    handle = region.handle
    assert fcntl.fcntl(handle.descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    with pytest.raises(PermissionError):
        os.ftruncate(handle.descriptor, 0)


def test_arrays_beyond_the_file_or_over_the_leases_are_refused(region: SharedRegion) -> None:
    region.allocate((8,), torch.int16)
    mapped = MappedRegion(region.handle)
    for offset, count in ((0, 1), (mapped.size, 1), (mapped.size - 2, 2)):
        with pytest.raises(ValueError, match="beyond"):
            mapped.array(offset, (count,), np.int16)


def test_a_lease_stands_until_it_is_ended_and_never_again(region: SharedRegion) -> None:
    mapped = MappedRegion(region.handle)
    lease = region.lease()
    assert mapped.stands(lease)
    region.end(lease)
    assert not mapped.stands(lease)
    again = region.lease()
    assert again.index == lease.index
    assert mapped.stands(again)
    assert not mapped.stands(lease)
    assert region.leases == 1
