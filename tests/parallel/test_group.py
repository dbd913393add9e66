"""What workers are started with."""

import pytest
from skein.parallel import group

OLD, NEW = group.ALLOCATOR


@pytest.mark.parametrize(
    ("system", "given", "workers"),
    [
        ("6.8.0-generic", {}, {OLD: group.SEGMENTS, NEW: group.SEGMENTS}),
        ("6.8.0-generic", {OLD: "backend:cudaMallocAsync"}, {OLD: group.SEGMENTS, NEW: group.SEGMENTS}),
        ("6.8.0-generic", {NEW: "max_split_size_mb:512"}, {NEW: "max_split_size_mb:512"}),
        ("5.15.167.4-microsoft-standard-WSL2", {OLD: "backend:cudaMallocAsync"}, {}),
    ],
)
def test_the_allocator(system, given, workers, monkeypatch):
    monkeypatch.setattr("platform.release", lambda: system)
    environment = {"HOME": "/root", **given}
    group._choose_allocator(environment)
    assert environment == {"HOME": "/root", **workers}
