"""What is trained, for how long, and where: what a caller of the training decides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from crossmr.config import read_whole
from crossmr.data.naming import modality_names
from crossmr.errors import ConfigError
from crossmr.training.recipes import RECIPES, Recipe


@dataclass(frozen=True)
class TrainingSettings:
    """What is trained, for how long, and where."""

    recipe: Recipe | str | None = None
    """Networks and optimisation, or a name of RECIPES; None for STANDARD, or that of the initial model."""
    sources: Sequence[str] | None = None
    """Modalities to read, one or several, in any usual spelling; None for the published T1 and T2, as far as the set
    has them. A recipe of any subset reads and synthesises sources and targets alike; None for all that the set has."""
    targets: Sequence[str] | None = None
    """Modalities to synthesise, likewise; None for the published T1ce and FLAIR."""
    stages: Sequence[str] | None = None
    """Train this stage, or these, alone; the stages before them must be finished."""
    steps: int | None = None
    """Steps of every stage, instead of the recipe's epochs."""
    minutes: float | None = None
    """Wall time of the whole run, over all of its calls, instead of the recipe's epochs."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."""
    precision: str = "auto"
    """'auto', 'bfloat16' or 'float32'."""
    seed: int = 0
    """Of weights, batches, masks and noise."""

    def __post_init__(self) -> None:
        for name in ("sources", "targets"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, modality_names(given))
        if isinstance(self.recipe, str) and self.recipe not in RECIPES:
            raise ConfigError(f"There is no recipe '{self.recipe}': expected one of {', '.join(RECIPES)}.")
        if not isinstance(self.recipe, Recipe | str | None):
            raise ConfigError(
                f"recipe is {self.recipe!r}; expected one of {', '.join(RECIPES)}, or a Recipe, such as one of RECIPES "
                "with some settings replaced (dataclasses.replace)."
            )
        if isinstance(self.stages, str):
            object.__setattr__(self, "stages", (self.stages,))
        stages: Any = self.stages or ()
        if not isinstance(stages, Sequence) or not all(isinstance(name, str) for name in stages):
            raise ConfigError(f"stages is {stages!r}; expected names of stages, such as ('synthesis',).")
        for name in ("device", "precision"):
            if not isinstance(given := getattr(self, name), str):
                raise ConfigError(f"{name} is {given!r}; expected text, such as 'auto'.")
        minutes: Any = self.minutes
        if isinstance(minutes, bool) or not isinstance(minutes, Real | None):
            raise ConfigError(f"minutes is {minutes!r}; expected a number.")
        read_whole(self, "steps", "seed")
        if self.steps is not None and self.minutes is not None:
            raise ConfigError("Give --steps or --minutes, not both.")
        too_short = self.minutes is not None and not 0 < self.minutes < math.inf  # NaN fails too
        if too_short or (self.steps is not None and self.steps < 1):
            raise ConfigError("--steps and --minutes are positive.")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"--seed is {self.seed}; expected a whole number of at most 64 bits.")

    @property
    def chosen_recipe(self) -> Recipe | None:
        """The recipe, if one was given."""
        return RECIPES[self.recipe] if isinstance(self.recipe, str) else self.recipe
