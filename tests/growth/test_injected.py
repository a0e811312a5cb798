"""An exception at any line of an update, an end, a load, a construction: all or nothing, and the run goes on.

A small sample; benchmarks/injected.py has thousands.
"""

import pytest

from injecting import draw, expected, verdict


@pytest.mark.parametrize(
    ("case", "action"),
    [
        ("two optimizers", "update"),
        ("followers", "finish"),
        ("sgd", "load"),
        ("layers", "update"),
        ("sgd", "construct"),
        ("meta", "construct"),
    ],
)
def test_an_exception_at_any_line_leaves_all_or_nothing(case: str, action: str) -> None:
    """What is left is bit for bit the state before or after, and ends as the unbroken run; after "before", repeated."""
    whole = expected(case, action)
    found = [verdict(whole, line) for line in draw(whole, 5, seed=0)]
    assert [one for one in found if one["verdict"] not in ("before", "after", "unreached")] == []
    assert sum(one["verdict"] == "unreached" for one in found) <= 1  # garbage collection differs from run to run
