"""Time and steps: the learning rate follows from the recorded plan, and time from the clock alone."""

import json

import pytest

from crossmr.errors import ModelError
from crossmr.training import plan as planning
from crossmr.training.plan import Budget, Clock, Plan, read_plan, write_plan


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Time:
    made = Time()
    monkeypatch.setattr(planning, "time", made)
    return made


def test_progress_of_one_plan_is_the_fraction_of_its_steps():
    plan = Plan(((0, 8),))
    assert [plan.progress(step) for step in range(9)] == [step / 8 for step in range(9)]
    assert plan.total == 8


def test_progress_stands_still_until_the_first_plan():
    plan = Plan()
    assert plan.total is None
    assert plan.progress(5) == 0
    plan = Plan(((10, 30),))
    assert [plan.progress(step) for step in (0, 10, 20, 30)] == [0, 0, 0.5, 1]


def test_progress_is_continuous_where_a_plan_is_corrected_and_the_past_stays_as_it_was():
    first, second = Plan(((10, 30),)), Plan(((10, 30), (15, 20)))
    assert [first.progress(step) for step in range(16)] == [second.progress(step) for step in range(16)]
    assert second.progress(15) == 0.25
    assert second.progress(16) == pytest.approx(0.25 + 0.75 / 5)
    assert second.progress(20) == pytest.approx(1)
    third = Plan(((10, 30), (15, 20), (17, 40)))
    values = [third.progress(step) for step in range(41)]
    assert values == sorted(values)
    assert values[40] == pytest.approx(1)


@pytest.mark.parametrize("total", [1, 3, 10, 97, 1000])
@pytest.mark.parametrize("times", [0, 1, 4, 10])
def test_what_happens_so_many_times_happens_so_many_times(total, times):
    due = [done for done in range(1, total + 1) if Plan(((0, total),)).due(done, times)]
    assert len(due) == min(times, total)
    assert not times or due[-1] == total


def test_plans_are_kept_by_stage(tmp_path):
    assert read_plan(tmp_path, "synthesis") is None
    plans = {"representation": Plan(((0, 5),)), "synthesis": Plan(((9, 120), (31, 99)), validations=3, until=61.5)}
    for stage, plan in plans.items():
        write_plan(tmp_path, stage, plan)
    assert {stage: read_plan(tmp_path, stage) for stage in plans} == plans
    assert json.loads((tmp_path / "plan.json").read_text())["synthesis"]["segments"] == [[9, 120], [31, 99]]


def test_a_budget_counts_what_earlier_calls_spent(clock):
    budget = Budget(minutes=2)
    clock.now += 30
    assert budget.spent() == 30
    assert budget.until(0.5) == 30 + 45
    budget.before = 60
    assert budget.until(1) == 120
    clock.now += 100  # too late: the stage must be finished at once
    assert budget.until(0.5) == budget.spent() == 190
    assert Budget().until(0.5) is None


def test_a_plan_is_corrected_at_fixed_fractions_each_once(clock):
    budget = Budget(minutes=100)
    measured, plan, corrected = Clock(0, budget), Plan(until=6000.0), []
    for done in range(1, 101):
        clock.now += 1
        if measured.due(plan, done):
            corrected.append(done)
            plan = Plan((*plan.segments, (done, 100)), until=6000.0)
    assert corrected == [10, 25, 50, 75, 90]
    assert measured.pace(100) == pytest.approx(1)


def test_a_resumed_run_follows_the_corrections_that_are_ahead_of_it(clock):
    measured = Clock(12, Budget(minutes=100))
    plan = Plan(((10, 80), (20, 100)), until=6000.0)
    due = [done for done in range(13, 101) if measured.due(plan, done)]
    assert due[0] == 25  # the one at step 20 was made before the stop
    assert not any(Clock(0, Budget()).due(Plan(((0, 9),)), done) for done in range(1, 10))  # no budget, no corrections


def test_slow_steps_are_planned_early(clock):
    measured = Clock(0, Budget(minutes=100))
    clock.now += 11
    assert measured.due(Plan(until=100.0), 1)
    assert measured.pace(1) == pytest.approx(11)
    clock.now += 4
    assert measured.pace(2) == pytest.approx(4)  # the first step warms up
    measured.pause(1)
    assert measured.pace(2) == pytest.approx(3)


def test_a_damaged_plan_is_named(tmp_path):
    write_plan(tmp_path, "synthesis", Plan(segments=((0, 8),)))
    assert read_plan(tmp_path, "synthesis") == Plan(segments=((0, 8),))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"synthesis": {"segmants": [[0, 8]]}}))
    with pytest.raises(ModelError, match=r"plan\.json is damaged: 'segmants' is not a setting of Plan"):
        read_plan(tmp_path, "synthesis")
