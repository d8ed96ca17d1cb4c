"""Who may join the table, and as whom: hellos, epochs, the one model of all instances."""

from typing import Any

import pytest
from twinpool.v1 import common_pb2, kv_pb2, worker_pb2

from router.hello import instance_from_wire
from router.ledger import InstanceKey
from router.membership import Instance, Members, Role
from service.errors import Incompatible, InvalidRequest
from tests.unit.router.served import layout, model


def hello(**changes: Any) -> worker_pb2.InstanceHello:
    fields: dict[str, Any] = {
        "name": "decode",
        "epoch": 5,
        "role": common_pb2.ROLE_DECODE,
        "address": "127.0.0.1:7000",
        "model": model(),
        "layout": layout(),
        "capacity": worker_pb2.Capacity(
            blocks=10, block_size=16, max_sequences=2, max_sequence_tokens=100
        ),
        "data_token": b"secret",
        "version": "1",
    }
    return worker_pb2.InstanceHello(**(fields | changes))


def instance(**changes: Any) -> Instance:
    return instance_from_wire(hello(**changes))


def joined(*instances: Instance) -> Members:
    members = Members()
    for each in instances:
        members.join(each, now=0.0)
    return members


def test_hello_says_what_the_instance_is() -> None:
    made = instance()
    assert made.key == InstanceKey("decode", 5)
    assert made.role is Role.DECODE
    assert made.layout.shape == (2, 2, 8, "float32")
    assert kv_pb2.KvLayout.FromString(made.layout.wire) == layout()
    assert "secret" not in repr(made)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ""}, "hello.name"),
        ({"name": "a\nb"}, "hello.name"),
        ({"epoch": 0}, "hello.epoch"),
        ({"prefix_seed": bytes(257)}, "hello.prefix_seed"),
        ({"role": common_pb2.ROLE_UNSPECIFIED}, "hello.role"),
        ({"address": "nowhere"}, "hello.address"),
        ({"address": "unix:///tmp/x:1"}, "hello.address"),
        ({"data_token": b""}, "hello.data_token"),
        ({"model": model(name="")}, "hello.model.name"),
        ({"model": model(name="a\nb")}, "hello.model.name"),
        ({"model": model(name="a" * 257)}, "hello.model.name"),
        ({"model": model(fingerprint="")}, "hello.model.fingerprint"),
        ({"model": model(dtype="int8")}, "hello.model.dtype"),
        ({"model": model(vocab_size=0)}, "hello.model.vocab_size"),
        ({"capacity": worker_pb2.Capacity()}, "hello.capacity.blocks"),
        (
            {
                "capacity": worker_pb2.Capacity(
                    blocks=1, block_size=8, max_sequences=1, max_sequence_tokens=1
                )
            },
            "hello.capacity.block_size",
        ),
        (
            {
                "capacity": worker_pb2.Capacity(
                    blocks=1 << 30,
                    block_size=16,
                    max_sequences=1,
                    max_sequence_tokens=1,
                    dp=1 << 30,
                )
            },
            "hello.capacity.dp",
        ),
        ({"layout": kv_pb2.KvLayout()}, "hello.layout.shape.layers"),
        (
            {"layout": kv_pb2.KvLayout(shape=layout().shape, block_size=16)},
            "hello.layout.shards",
        ),
        (
            {
                "layout": kv_pb2.KvLayout(
                    shape=layout().shape, block_size=16, shards=[kv_pb2.KvShard()]
                )
            },
            "hello.layout.shards[0].data_host",
        ),
        (
            {
                "layout": kv_pb2.KvLayout(
                    shape=layout().shape, block_size=16, shards=[kv_pb2.KvShard(cp_size=1 << 31)]
                )
            },
            "hello.layout.shards[0].cp_size",
        ),
        ({"ep": 1 << 31}, "hello.ep"),
    ],
)
def test_hello_that_makes_no_sense_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        instance(**changes)
    # A capacity that does not go with the layout is found where the layout is empty, too.
    assert caught.value.field in (field, "hello.capacity.block_size")


@pytest.mark.parametrize(
    ("cp", "heads", "layers", "ep", "summary"),
    [
        (1, 1, 1, 0, "tp1"),
        (4, 2, 1, 1, "cp4 tp2"),
        (1, 4, 1, 1, "tp4"),
        (2, 1, 1, 1, "cp2"),
        (1, 2, 2, 1, "pp2 tp2"),
        (1, 4, 1, 4, "tp4 ep4"),
    ],
)
def test_layout_has_a_short_form(cp: int, heads: int, layers: int, ep: int, summary: str) -> None:
    message = layout()
    del message.shards[:]
    for c in range(cp):
        for h in range(heads):
            for p in range(layers):
                message.shards.add(
                    layers=kv_pb2.Range(begin=p, end=p + 1),
                    heads=kv_pb2.Range(begin=h, end=h + 1),
                    cp_rank=c,
                    cp_size=cp,
                    data_host="h",
                    data_port=1,
                )
    assert instance(layout=message, ep=ep).layout.summary == summary


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": model(architecture="Other")}, "architecture"),
        ({"model": model(dtype="bfloat16")}, "dtype"),
        ({"model": model(vocab_size=5)}, "vocab_size"),
        ({"model": model(fingerprint="beef")}, "fingerprint"),
        ({"model": model(assets_digest="beef")}, "assets_digest"),
        ({"layout": layout(layers=3)}, "KV layers"),
        ({"layout": layout(kv_heads=3)}, "KV heads"),
        ({"layout": layout(head_size=16)}, "KV head size"),
        ({"layout": layout(dtype="bfloat16")}, "KV dtype"),
    ],
)
@pytest.mark.parametrize("role", [common_pb2.ROLE_PREFILL, common_pb2.ROLE_DECODE])
def test_other_model_is_refused_by_what_differs(
    role: common_pb2.Role, changes: dict[str, Any], what: str
) -> None:
    members = joined(instance(name="first"))
    with pytest.raises(Incompatible, match=f"^{what} of instance 'second'"):
        members.join(instance(name="second", role=role, **changes), now=0.0)
    assert [m.instance.key.name for m in members.all()] == ["first"]


def test_higher_epoch_replaces_and_may_bring_another_model_when_alone() -> None:
    members = joined(instance(epoch=5))
    member, replaced = members.join(instance(epoch=6, model=model(fingerprint="beef")), now=0.0)
    assert replaced is not None
    assert replaced.instance.key.epoch == 5
    assert members.all() == [member]
    assert members.model is not None
    assert members.model.fingerprint == "beef"
    assert not members.leave(replaced)
    assert members.leave(member)


def test_lower_epoch_is_refused_even_after_the_higher_one_has_gone() -> None:
    members = joined(instance(epoch=5))
    members.leave(members.all()[0])
    with pytest.raises(Incompatible, match="epoch 4") as caught:
        members.join(instance(epoch=4), now=0.0)
    assert caught.value.reason == "STALE_EPOCH"


def test_equal_epoch_is_the_same_process_or_refused() -> None:
    members = joined(instance())
    with pytest.raises(Incompatible, match="name of its own"):
        members.join(instance(data_token=b"other"), now=0.0)
    member, replaced = members.join(instance(), now=0.0)
    assert replaced is not None
    assert members.all() == [member]


def test_model_is_remembered_while_nobody_is_there() -> None:
    members = joined(instance())
    members.leave(members.all()[0])
    assert members.model is not None
    assert members.max_model_len == 4096


def test_shortest_context_of_all_counts() -> None:
    other = instance(name="other", model=model(max_model_len=1000))
    assert joined(instance(), other).max_model_len == 1000


ALONE = worker_pb2.Capacity(
    blocks=10,
    block_size=16,
    max_sequences=2,
    max_sequence_tokens=100,
    local_prefill_tokens=32,
    colocated=True,
)


def test_colocated_instances_share_a_router_with_their_like_alone() -> None:
    alone = joined(instance(name="a", capacity=ALONE), instance(name="b", capacity=ALONE))
    for role, name in ((common_pb2.ROLE_PREFILL, "prefill"), (common_pb2.ROLE_DECODE, "decode")):
        other = instance(name="c", role=role)
        with pytest.raises(Incompatible, match=f"{name} instance 'c' came to .* colocated inst"):
            alone.join(other, now=0.0)
        with pytest.raises(Incompatible, match=f"colocated instance 'a' .* {name} instance 'c'"):
            joined(other).join(instance(name="a", capacity=ALONE), now=0.0)


@pytest.mark.parametrize("change", ["role", "tokens"])
def test_instance_that_cannot_be_colocated_is_refused(change: str) -> None:
    capacity = worker_pb2.Capacity()
    capacity.CopyFrom(ALONE)
    role = common_pb2.ROLE_PREFILL if change == "role" else common_pb2.ROLE_DECODE
    if change == "tokens":
        capacity.local_prefill_tokens = 0
    with pytest.raises(InvalidRequest, match=r"hello\.capacity\.colocated"):
        instance(role=role, capacity=capacity)
