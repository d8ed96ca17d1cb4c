"""What the transfer benchmark moves."""

from bench.movers.works import CARRIERS, MIB, WORKS, Work, choice

SMALL = Work(name="small", slices=50, slice_bytes=64)


def test_a_round_picks_each_slice_once_from_the_whole_pool() -> None:
    sources, targets = choice(SMALL, 3)
    for picked in (sources, targets):
        assert len(set(picked)) == SMALL.slices
        assert set(picked) <= set(range(SMALL.pool_slices))
    assert max(sources) >= SMALL.slices


def test_rounds_differ_and_can_be_repeated() -> None:
    assert choice(SMALL, 1) == choice(SMALL, 1)
    assert choice(SMALL, 1) != choice(SMALL, 2)
    assert choice(SMALL, 1)[0] != choice(SMALL, 1)[1]


def test_a_request_of_4096_tokens_is_256_mib_however_it_is_cut() -> None:
    requests = [work for work in WORKS if work.request]
    assert len(requests) == 4
    assert {work.bytes for work in requests} == {256 * MIB}


def test_a_reshard_by_heads_halves_what_lies_together() -> None:
    same, *resharded = [work for work in WORKS if work.request]
    assert {work.slice_bytes * 2 for work in resharded} == {same.slice_bytes}
    assert {work.same_layout for work in resharded} == {same.name}


def test_carriers_differ_in_the_transports_that_ucx_may_use_and_in_nothing_else() -> None:
    tcp, shm = (carrier.environment() for carrier in CARRIERS)
    assert "shm" in shm.pop("UCX_TLS").split(",")
    assert tcp.pop("UCX_TLS").split(",") == ["tcp", "self"]
    assert tcp == shm
