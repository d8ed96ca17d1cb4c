"""Owns how the router's state looks to operators: models, instances, counts of requests."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from twinpool.v1 import common_pb2, worker_pb2

from router.group import ModelGroup
from router.membership import Member, Model, Pair, Role
from router.wire import speed_to_wire

_ROLES = {Role.PREFILL: common_pb2.ROLE_PREFILL, Role.DECODE: common_pb2.ROLE_DECODE}


def status_to_wire(
    groups: Sequence[ModelGroup],
    *,
    unplaced: Mapping[str, int],
    missing: Iterable[tuple[Role, str]],
    now: float,
) -> worker_pb2.GetStatusResponse:
    """Returns what is known of all models, without what is the router's own.

    `unplaced` are the ends of requests that came to no model, by outcome.
    """
    models = [
        worker_pb2.ModelStatus(
            model=_model(group.model), requests=_requests(group), ready=group.is_whole
        )
        for group in groups
    ]
    return worker_pb2.GetStatusResponse(
        model=models[0].model if len(models) == 1 else None,
        models=models,
        instances=[instance for group in groups for instance in _instances(group, now)],
        requests=_sum([*(one.requests for one in models), _ended(unplaced)]),
        missing=[
            worker_pb2.MissingInstance(role=_ROLES[role], address=address)
            for role, address in missing
        ],
    )


def _requests(group: ModelGroup) -> worker_pb2.RequestCounts:
    counts = _ended(group.metrics.requests.outcomes)
    counts.queued = group.admission.queued
    counts.running = group.metrics.requests.open_requests - counts.queued
    counts.retried = group.metrics.survival.retries
    counts.overcommitted = group.metrics.admission.overcommitted_count
    counts.outgrown = group.metrics.admission.outgrown_count
    return counts


def _ended(outcomes: Mapping[str, int]) -> worker_pb2.RequestCounts:
    shown = ("finished", "refused", "aborted", "failed")
    return worker_pb2.RequestCounts(**{outcome: outcomes[outcome] for outcome in shown})


def _sum(counts: Iterable[worker_pb2.RequestCounts]) -> worker_pb2.RequestCounts:
    total = worker_pb2.RequestCounts()
    for one in counts:
        for field, value in one.ListFields():
            setattr(total, field.name, getattr(total, field.name) + value)
    return total


def _instances(group: ModelGroup, now: float) -> list[worker_pb2.InstanceStatus]:
    risks = group.admission.overcommit_risks()
    return [
        _instance(group, member, now, risks.get(member.instance.key, 0.0))
        for member in group.pools.members.all()
    ]


def _instance(
    group: ModelGroup, member: Member, now: float, risk: float
) -> worker_pb2.InstanceStatus:
    instance, credit = member.instance, member.credit
    return worker_pb2.InstanceStatus(
        name=instance.key.name,
        epoch=instance.key.epoch,
        role=_ROLES[instance.role],
        address=instance.address,
        model=group.name,
        layout=instance.layout.summary,
        capacity=worker_pb2.Capacity(
            blocks=instance.capacity.blocks,
            block_size=instance.capacity.block_size,
            max_sequences=instance.capacity.max_sequences,
            max_sequence_tokens=instance.capacity.max_sequence_tokens,
            dp=instance.capacity.dp,
            expected_output_tokens=instance.capacity.expected_output_tokens,
            colocated=instance.capacity.colocated,
        ),
        blocks=worker_pb2.BlockCounts(**dataclasses.asdict(member.heartbeat.blocks)),
        running=member.heartbeat.running,
        waiting=member.heartbeat.waiting,
        draining=member.draining,
        heartbeat_age_s=now - member.seen_at,
        ledger_reserved=group.ledger.reserved_blocks(instance.key),
        pairs=[_pair(pair) for pair in member.heartbeat.pairs],
        known_prefix_blocks=group.pools.prefixes.known_blocks(instance.key),
        connecting=not group.pools.is_up(instance.key),
        credit_blocks=sum(credit.blocks) if credit is not None else instance.capacity.blocks,
        credit_sequences=(
            credit.sequences if credit is not None else instance.capacity.max_sequences
        ),
        speed=speed_to_wire(member.heartbeat.speed),
        overcommit_risk=risk,
    )


def _pair(pair: Pair) -> worker_pb2.KvPair:
    return worker_pb2.KvPair(
        peer=pair.peer,
        rank=pair.rank,
        transport=pair.transport,
        rtt_s=pair.rtt_s,
        bytes_per_s=pair.bytes_per_s,
        note=pair.note,
    )


def _model(model: Model) -> worker_pb2.ModelDescription:
    return worker_pb2.ModelDescription(
        name=model.name,
        fingerprint=model.fingerprint,
        architecture=model.architecture,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        assets_digest=model.assets_digest,
    )
