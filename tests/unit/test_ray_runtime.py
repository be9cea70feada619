"""What is said where Ray cannot be used; without starting it."""

import importlib.metadata

import pytest

from outrider.cluster import ray_runtime
from outrider.speculation.errors import ClusterError


@pytest.mark.parametrize("version", ["2.9.3", "1.13.0", "2.40.0rc1"])
def test_an_old_ray_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    oldest = ".".join(map(str, ray_runtime.OLDEST_RAY))
    with pytest.raises(ClusterError, match=f"^ray {version} is too old; a cluster needs {oldest} or newer$"):
        ray_runtime.require_ray()


def test_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ClusterError, match=r"^Ray is not installed; a cluster needs ray "):
        ray_runtime.require_ray()


@pytest.mark.parametrize("version", ["3.0.0", "2.60.0"])
def test_this_and_newer_ones_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: asked.append(name) or version)
    ray_runtime.require_ray()
    assert asked == ["ray"]
