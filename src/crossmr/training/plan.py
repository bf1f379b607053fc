"""Time turned into steps: the budget of a run, and the plan of each of its stages.

A run that has a budget starts a stage without knowing how many steps it will have. After the first steps these are
planned from the measured pace, and planned anew at fixed fractions. Each plan is recorded, so the learning rate is a
function of the step and the record alone, and a run that was stopped follows it.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from crossmr.config import from_dict, to_dict
from crossmr.errors import ConfigError, ModelError
from crossmr.files import read_json, write_json

VALIDATIONS = 10
"""Times a stage is validated, its last step included."""
TIMED_STEPS, TIMED_FRACTION = 10, 0.1
"""The first plan is made after so many steps, or after this fraction of the stage's time."""
CORRECTIONS = (0.25, 0.5, 0.75, 0.9)
"""Fractions of the steps after which the rest is planned anew."""
LEAST_APART = 0.05
"""Fraction of the steps between one plan and the next, where a growing total passes a fraction again."""


@dataclass
class Budget:
    """The time for a whole run, over all of its calls."""

    minutes: float | None = None
    """None: steps are planned, not time."""
    before: float = 0.0
    """Seconds spent by earlier calls."""
    begin: float = field(default_factory=lambda: time.monotonic())
    """When this call began."""

    def spent(self) -> float:
        """Seconds since the run began, without those between its calls."""
        return self.before + time.monotonic() - self.begin

    def until(self, fraction: float) -> float | None:
        """When a stage must be finished that may take this fraction of what is left, as `spent` counts."""
        if self.minutes is None:
            return None
        spent = self.spent()
        return spent + fraction * max(0.0, 60 * self.minutes - spent)


@dataclass(frozen=True)
class Plan:
    """How many steps a stage has; with the step's number it decides the learning rate."""

    segments: tuple[tuple[int, int], ...] = ()
    """(first step, total steps): from this step on, so many are planned in all. Empty until a budget's first plan."""
    validations: int = VALIDATIONS
    """Times the stage is validated; 0 where its first step took all of its time."""
    until: float | None = None
    """When it must be finished, in seconds of the run's budget; None: the steps stay as they are."""

    @property
    def total(self) -> int | None:
        """Steps in all; None as long as nobody knows."""
        return self.segments[-1][1] if self.segments else None

    def progress(self, step: int) -> float:
        """From 0 to 1, what is done before this step; continuous where the total was corrected."""
        progress, first, total = 0.0, 0, 0
        for begin, planned in self.segments:
            if step < begin:
                break
            progress += (1 - progress) * (begin - first) / (total - first) if total else 0.0
            first, total = begin, planned
        return progress + (1 - progress) * (step - first) / (total - first) if total > first else progress

    def due(self, done: int, times: int) -> bool:
        """Whether one of `times` evenly spaced events follows step `done`; one always follows the last step."""
        total = self.total or done
        return times > 0 and (done >= total or done * times // total > (done - 1) * times // total)


def read_plan(folder: Path, stage: str) -> Plan | None:
    """The plan of a stage in a run's folder, if it has one.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / "plan.json"
    plans = read_json(path) if path.exists() else {}
    try:
        return from_dict(Plan, plans[stage]) if stage in plans else None
    except ConfigError as error:
        raise ModelError(f"{path} is damaged: {error} Copy it again, or train anew.") from error


def write_plan(folder: Path, stage: str, plan: Plan) -> None:
    """Add a stage's plan, or replace it."""
    path = folder / "plan.json"
    write_json(path, {**(read_json(path) if path.exists() else {}), stage: to_dict(plan)})


class Clock:
    """Times the steps of this call, without validation and without the first step, which warms up."""

    def __init__(self, done: int, budget: Budget):
        self.first, self.budget, self.begin, self.from_step, self.start = done, budget, budget.spent(), done, 0.0

    def due(self, plan: Plan, done: int) -> bool:
        """Whether it is time to plan the rest anew."""
        if self.from_step == self.first:
            self.from_step, self.start = done, time.monotonic()
        if plan.until is None or done == plan.total:
            return False
        if plan.total is None:
            late = self.budget.spent() - self.begin > TIMED_FRACTION * (plan.until - self.begin)
            return done - self.first >= TIMED_STEPS or late
        last = plan.segments[-1][0]  # of a resumed run it may lie ahead
        passed = any(last < fraction * plan.total <= done for fraction in CORRECTIONS)
        return passed and done - last >= LEAST_APART * plan.total

    def pace(self, done: int) -> float:
        """Seconds per step."""
        if done > self.from_step:
            return (time.monotonic() - self.start) / (done - self.from_step)
        return (self.budget.spent() - self.begin) / (done - self.first)

    def pause(self, seconds: float) -> None:
        """Do not count so many seconds."""
        self.start += seconds
