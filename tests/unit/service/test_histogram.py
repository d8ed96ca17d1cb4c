"""A histogram without a lock shows as any other does."""

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service.histogram import LoopHistogram

BUCKETS = (0.1, 0.5, 1.0)


def test_shows_the_same_as_prometheus_own() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    fast = LoopHistogram("x_seconds", "What.", buckets=BUCKETS, registry=ours)
    usual = Histogram("x_seconds", "What.", buckets=BUCKETS, registry=theirs)
    for value, times in ((0.1, 1), (0.25, 3), (1.0, 1), (7.0, 2)):
        fast.observe(value, times)
        for _ in range(times):
            usual.observe(value)
    usually = generate_latest(theirs).decode().splitlines()
    shown = generate_latest(ours).decode().splitlines()
    assert shown == [line for line in usually if "created" not in line]
