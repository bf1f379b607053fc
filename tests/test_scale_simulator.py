"""The simulator of docs/scale.md: no study is lost or done twice, and without failures it is the closed form."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("scale", Path(__file__).parents[1] / "benchmarks" / "scale.py")
scale = importlib.util.module_from_spec(_spec)
sys.modules["scale"] = scale
_spec.loader.exec_module(scale)

FREE = scale.Disk("free", operations=math.inf, megabytes=math.inf, latency=0.0)
EVEN = replace(scale.CPU, spread=0.0)


@pytest.mark.parametrize(("studies", "workers"), [(1, 1), (1000, 7), (50, 100), (100_000, 10)])
def test_without_failures_it_is_the_closed_form(studies, workers):
    costs = scale.Costs()
    found = scale.Run(studies, workers, EVEN, FREE, costs, scale.Failures()).go()
    seconds = EVEN.start + math.ceil(studies / workers) * EVEN.seconds + studies * (costs.listing + costs.finish)
    assert found.hours == pytest.approx(seconds / 3600)
    assert (found.done, found.deaths, found.redone) == (studies, 0, 0)


@pytest.mark.parametrize(("studies", "per_hour"), [(97, 200.0), (100_000, 20.0)])
def test_workers_that_die_lose_no_study_and_finish_none_twice(studies, per_hour):
    run = scale.Run(studies, 8, scale.CPU, scale.NFS, scale.Costs(), scale.Failures(per_hour))
    found = run.go()
    assert found.deaths > 0
    assert found.parts == [len(range(k, studies, 8)) for k in range(8)]
    alone = scale.Run(studies, 8, scale.CPU, scale.NFS, scale.Costs(), scale.Failures()).go()
    assert found.hours > alone.hours
    assert found.redone <= 2 * found.deaths


def test_a_slow_disk_sets_the_time():
    disk = scale.Disk("slow", operations=scale.Costs().operations, megabytes=math.inf, latency=0.0)  # a study a second
    found = scale.Run(2000, 50, scale.CPU, disk, scale.Costs(), scale.Failures()).go()
    assert found.limit == "disk"
    assert found.hours == pytest.approx(2000 / 3600, rel=0.05)
