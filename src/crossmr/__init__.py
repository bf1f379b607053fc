"""crossmr completes brain MRI: it synthesises a study's missing contrasts from those that were acquired.

Research use only; not a medical device. Everything it writes is labelled synthetic.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossmr.completion.cohort import complete_cohort
    from crossmr.completion.study import Completed, complete
    from crossmr.data.prepare import Split, prepare
    from crossmr.errors import CrossmrError
    from crossmr.evaluation.evaluate import evaluate
    from crossmr.networks.inference import Settings
    from crossmr.networks.model import CrossConditionedModel, load_model
    from crossmr.phantom import make_phantom, write_cohort
    from crossmr.training.recipes import RECIPES, Recipe
    from crossmr.training.run import train

__version__ = version("crossmr")

_MODULES = {
    "Completed": "completion.study",
    "CrossConditionedModel": "networks.model",
    "CrossmrError": "errors",
    "RECIPES": "training.recipes",
    "Recipe": "training.recipes",
    "Settings": "networks.inference",
    "Split": "data.prepare",
    "complete": "completion.study",
    "complete_cohort": "completion.cohort",
    "evaluate": "evaluation.evaluate",
    "load_model": "networks.model",
    "make_phantom": "phantom",
    "prepare": "data.prepare",
    "train": "training.run",
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
    if name not in _MODULES:
        raise AttributeError(f"module 'crossmr' has no attribute '{name}'")
    return getattr(import_module(f"crossmr.{_MODULES[name]}"), name)
