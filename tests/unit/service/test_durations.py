import pytest

from service.durations import seconds


def test_limits_are_written_with_their_unit() -> None:
    assert [seconds(text) for text in ("500ms", "2s", "1.5min", 3.0)] == [0.5, 2.0, 90.0, 3.0]
    for text in ("500", "ms", "-1s", "1h", ""):
        with pytest.raises(ValueError, match="with a unit"):
            seconds(text)
