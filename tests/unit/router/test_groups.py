"""Which group a request or an instance goes to, and how many groups there may be."""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from router.config import RouterConfig
from router.group import ModelGroup, build_group
from router.groups import Groups
from router.membership import Instance
from router.metrics.models import ModelMetrics
from service.errors import Incompatible, InvalidRequest, NotFound, Unavailable
from tests.unit.router.served import model
from tests.unit.router.test_membership import instance

MakeGroups = Callable[..., Groups]
LONG_S = 3600.0


def of_model(name: str, instance_name: str = "decode", fingerprint: str = "") -> Instance:
    """An instance of a model whose fingerprint is its name, unless told otherwise."""
    described = model(name=name, fingerprint=fingerprint or name)
    return instance(name=instance_name, model=described)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def make(registry: CollectorRegistry) -> AsyncIterator[MakeGroups]:
    made: list[Groups] = []

    def make(*models: str, most: int = 16, age_s: float = LONG_S) -> Groups:
        now = iter((0.0,))
        build = partial(
            build_group,
            config=RouterConfig(),
            router_id="router",
            dial=grpc.aio.insecure_channel,
            clock=time.monotonic,
        )
        groups = Groups(
            build=build,
            most=most,
            shown=ModelMetrics(registry),
            clock=lambda: next(now, age_s),
        )
        for name in models:
            groups.join(of_model(name, f"decode-{name}"))
        made.append(groups)
        return groups

    yield make
    for groups in made:
        await groups.close()


def names(groups: Groups) -> list[str]:
    return [group.name for group in groups.all()]


def empty(group: ModelGroup) -> None:
    for member in group.pools.members.all():
        group.pools.leave(member, "it died")


async def test_request_goes_to_the_model_that_it_names(make: MakeGroups) -> None:
    groups = make("a", "b")
    assert groups.for_request("a").name == "a"
    assert groups.for_request("b").name == "b"


async def test_model_need_not_be_named_where_there_is_one_only(make: MakeGroups) -> None:
    assert make("a").for_request("").name == "a"


async def test_model_must_be_named_where_there_are_several(make: MakeGroups) -> None:
    with pytest.raises(InvalidRequest, match="name one of 'a', 'b'") as caught:
        make("b", "a").for_request("")
    assert caught.value.field == "model"


async def test_unknown_model_is_told_which_there_are(make: MakeGroups) -> None:
    with pytest.raises(NotFound, match="no model 'c' here: this router serves 'a', 'b'") as caught:
        make("a", "b").for_request("c")
    assert caught.value.reason == "UNKNOWN_MODEL"


async def test_model_that_may_still_come_back_after_a_restart_is_unavailable(
    make: MakeGroups,
) -> None:
    with pytest.raises(Unavailable, match="'c' has come yet") as caught:
        make("a", age_s=0.5).for_request("c")
    assert caught.value.reason == "NO_INSTANCE"


async def test_router_without_any_instance_is_unavailable(make: MakeGroups) -> None:
    for name in ("", "a"):
        with pytest.raises(Unavailable, match="no instance is registered"):
            make().for_request(name)


async def test_model_that_all_instances_have_left_stays_known(make: MakeGroups) -> None:
    groups = make("a")
    empty(groups.for_request("a"))
    assert groups.for_request("a").name == "a"
    assert groups.for_request("").name == "a"


async def test_model_that_all_instances_have_left_is_not_meant_without_its_name(
    make: MakeGroups,
) -> None:
    groups = make("a", "b")
    empty(groups.for_request("a"))
    assert groups.for_request("").name == "b"


async def test_instances_of_a_model_must_be_alike_and_those_of_others_need_not(
    make: MakeGroups,
) -> None:
    groups = make("a", "b")
    with pytest.raises(Incompatible, match="fingerprint of instance 'other'") as caught:
        groups.join(of_model("a", "other", fingerprint="else"))
    assert caught.value.reason == "MODEL_MISMATCH"
    groups.join(of_model("b", "other"))
    assert [len(group.pools.members) for group in groups.all()] == [1, 2]


async def test_instance_that_starts_over_with_another_model_leaves_its_group(
    make: MakeGroups,
) -> None:
    groups = make()
    _, old, _ = groups.join(of_model("a"))
    newer = of_model("b")
    newer = replace(newer, key=newer.key._replace(epoch=newer.key.epoch + 1))
    group, member, replaced = groups.join(newer)
    assert replaced is old
    assert group.name == "b"
    assert groups.members() == [member]


async def test_two_instances_of_one_name_are_refused_whatever_their_models(
    make: MakeGroups,
) -> None:
    groups = make()
    groups.join(of_model("a"))
    with pytest.raises(Incompatible, match="registered already, for model 'a'") as caught:
        groups.join(of_model("b"))
    assert caught.value.reason == "NAME_TAKEN"
    assert names(groups) == ["a"]


async def test_there_are_no_more_models_than_may_be(make: MakeGroups) -> None:
    groups = make("a", "b", most=2)
    with pytest.raises(
        Incompatible, match=r"'c' is one too many.*'a', 'b'.*--max-models"
    ) as caught:
        groups.join(of_model("c", "third"))
    assert caught.value.reason == "TOO_MANY_MODELS"
    assert names(groups) == ["a", "b"]


async def test_model_that_was_left_makes_room_for_another(
    make: MakeGroups, registry: CollectorRegistry
) -> None:
    groups = make("a", "b", most=2)
    empty(groups.for_request("a"))
    groups.join(of_model("c", "third"))
    assert names(groups) == ["b", "c"]
    shown = generate_latest(registry).decode()
    assert 'model_name="c"' in shown
    assert 'model_name="a"' not in shown


async def test_model_with_open_requests_does_not_make_room(make: MakeGroups) -> None:
    groups = make("a", most=1)
    group = groups.for_request("a")
    empty(group)
    group.metrics.requests.began()
    with pytest.raises(Incompatible, match="one too many"):
        groups.join(of_model("b"))


async def test_instance_is_found_by_its_name_whatever_its_model(make: MakeGroups) -> None:
    groups = make("a", "b")
    group, member = groups.named("decode-b")
    assert (group.name, member.instance.key.name) == ("b", "decode-b")
    with pytest.raises(NotFound):
        groups.named("decode-c")


async def test_same_weights_under_two_names_are_told_of(
    make: MakeGroups, caplog: pytest.LogCaptureFixture
) -> None:
    make("a").join(of_model("b", "other", fingerprint="a"))
    assert "models a and b are the same" in caplog.text
    assert "--served-model-name" in caplog.text


async def test_each_metric_is_shown_once_with_all_models(
    make: MakeGroups, registry: CollectorRegistry
) -> None:
    make("a", "b")
    lines = generate_latest(registry).decode().splitlines()
    kind = "# TYPE twinpool_router_requests_total counter"
    at = lines.index(kind)
    assert lines.count(kind) == 1
    count = 'twinpool_router_requests_total{{model_name="{}",outcome="finished"}} 0.0'
    family = lines[at + 1 : at + 11]
    assert {count.format("a"), count.format("b")} <= set(family)
