"""Everything crossmr refuses, as one small tree.

CrossmrError
├── ConfigError      a recipe, an option or a modality name that makes no sense
├── NamingError      files that cannot be told apart, or that say nothing about their modality
├── VolumeError      one image file that cannot be read, or not as a 3D volume
├── StudyError       one patient whose volumes do not go together
├── SetError         a prepared set that is missing, damaged or unfit for the task
├── ModelError       a model or checkpoint that is missing, damaged or hostile
├── OutputError      results that cannot be written
└── Interrupted      a training that was asked to stop, after its state was saved

A message says what, where, got, wanted, and the next step, in one line.
"""


class CrossmrError(Exception):
    """Base of every error that crossmr raises on purpose; its text is fit for a user's eyes."""


class ConfigError(CrossmrError):
    """A recipe, an option or a modality name that makes no sense."""


class NamingError(CrossmrError):
    """Files that cannot be told apart, or that say nothing about their modality."""


class VolumeError(CrossmrError):
    """One image file that cannot be read, or not as a 3D volume."""


class StudyError(CrossmrError):
    """One patient whose volumes do not go together."""


class SetError(CrossmrError):
    """A prepared set that is missing, damaged or unfit for the task."""


class ModelError(CrossmrError):
    """A model or checkpoint that is missing, damaged or hostile."""


class OutputError(CrossmrError):
    """Results that cannot be written."""


class Interrupted(CrossmrError):
    """A training that was asked to stop, after its state was saved."""
