"""The public names, one per line: the only list of them. `__init__.py` and every type checker read it."""

from crossmr.completion.cohort import CohortSettings as CohortSettings
from crossmr.completion.cohort import CohortSummary as CohortSummary
from crossmr.completion.cohort import complete_cohort as complete_cohort
from crossmr.completion.study import Completed as Completed
from crossmr.completion.study import complete as complete
from crossmr.data.dataset import PreparedDataset as PreparedDataset
from crossmr.data.prepare import PrepareSettings as PrepareSettings
from crossmr.data.prepare import prepare as prepare
from crossmr.data.split import Split as Split
from crossmr.errors import CrossmrError as CrossmrError
from crossmr.evaluation.evaluate import EvaluationSettings as EvaluationSettings
from crossmr.evaluation.evaluate import evaluate as evaluate
from crossmr.networks.c_unet import CUNet as CUNet
from crossmr.networks.distribution import DistributionNetwork as DistributionNetwork
from crossmr.networks.inference import InferenceSettings as InferenceSettings
from crossmr.networks.masked_autoencoder import MaskedAutoencoder as MaskedAutoencoder
from crossmr.networks.model import CrossConditionedModel as CrossConditionedModel
from crossmr.phantom import make_phantom as make_phantom
from crossmr.phantom import write_cohort as write_cohort
from crossmr.registry import load_model as load_model
from crossmr.training.recipes import RECIPES as RECIPES
from crossmr.training.recipes import Recipe as Recipe
from crossmr.training.run import train as train
from crossmr.training.settings import TrainingSettings as TrainingSettings

__version__: str
