"""crossmr completes brain MRI: it synthesises a study's missing contrasts from those that were acquired.

Research use only; not a medical device. Everything it writes is labelled synthetic.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossmr.cohort import complete_cohort
    from crossmr.completion import Completed, Settings, complete
    from crossmr.data.prepare import Split, prepare
    from crossmr.errors import CrossmrError
    from crossmr.evaluation import evaluate
    from crossmr.model import CrossConditionedModel, load_model
    from crossmr.phantom import make_phantom, write_cohort
    from crossmr.recipes import RECIPES, Recipe
    from crossmr.training import train

__version__ = version("crossmr")

_HOMES = {
    "Completed": "completion",
    "CrossConditionedModel": "model",
    "CrossmrError": "errors",
    "RECIPES": "recipes",
    "Recipe": "recipes",
    "Settings": "completion",
    "Split": "data.prepare",
    "complete": "completion",
    "complete_cohort": "cohort",
    "evaluate": "evaluation",
    "load_model": "model",
    "make_phantom": "phantom",
    "prepare": "data.prepare",
    "train": "training",
    "write_cohort": "phantom",
}

__all__ = [
    "RECIPES",
    "Completed",
    "CrossConditionedModel",
    "CrossmrError",
    "Recipe",
    "Settings",
    "Split",
    "complete",
    "complete_cohort",
    "evaluate",
    "load_model",
    "make_phantom",
    "prepare",
    "train",
    "write_cohort",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import crossmr` and the command line start at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'crossmr' has no attribute '{name}'")
    return getattr(import_module(f"crossmr.{_HOMES[name]}"), name)
