"""Layouts as the control path says them."""

from typing import get_args

import pytest
from twinpool.v1 import kv_pb2

from kvtransfer import KVShape, uniform_cache
from kvtransfer.layout import CpOrder
from service.errors import InvalidRequest
from service.wire import addresses_from_wire, layout_from_wire, layout_to_wire

KV = KVShape(layers=4, kv_heads=2, head_size=8, dtype="bfloat16")
WINDOW = KVShape(name="window", layers=2, kv_heads=2, head_size=8, dtype="bfloat16", window=64)
STATE = KVShape(name="s", layers=2, kv_heads=4, head_size=8, dtype="float32", planes=1, state=True)


@pytest.mark.parametrize("grain", [None, 256])
@pytest.mark.parametrize("order", get_args(CpOrder))
def test_a_layout_comes_out_as_it_went_in(order: CpOrder, grain: int | None) -> None:
    cache = uniform_cache((KV, WINDOW, STATE), 32, tp=2, cp=2, cp_order=order, cp_grain=grain)
    cache = cache.begun_at(1)
    said = layout_to_wire(cache).SerializeToString()
    assert layout_from_wire(kv_pb2.KvLayout.FromString(said)) == cache


def test_orders_differ_on_the_wire() -> None:
    said = {
        layout_to_wire(uniform_cache((KV,), 32, cp=2, cp_order=order)).cp_order
        for order in get_args(CpOrder)
    }
    assert len(said) == len(get_args(CpOrder))
    assert kv_pb2.CP_ORDER_UNSPECIFIED not in said


def test_addresses_stand_beside_the_ranks() -> None:
    message = layout_to_wire(uniform_cache((KV, STATE), 32, tp=2), [("a", 1), ("b", 2)])
    assert addresses_from_wire(message) == [(0, "a", 1), (1, "b", 2)]


@pytest.mark.parametrize("order", [kv_pb2.CP_ORDER_UNSPECIFIED, 99])
def test_an_order_that_this_version_does_not_know_is_refused(
    order: kv_pb2.CpOrder.ValueType,
) -> None:
    message = layout_to_wire(uniform_cache((KV,), 32, cp=2))
    message.cp_order = order
    with pytest.raises(InvalidRequest, match="layout"):
        layout_from_wire(message)
