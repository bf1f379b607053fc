"""Everything crossmr refuses, as one small tree.

CrossmrError
├── ConfigError      a recipe, an option or a modality name that makes no sense
├── NamingError      files that cannot be told apart, or that say nothing about their modality
├── VolumeError      one image file that cannot be read, or not as a 3D volume
├── StudyError       one patient whose volumes do not go together
├── SetError         a prepared set that is missing, damaged or unfit for the task
├── ModelError       a model or checkpoint that is missing, damaged or hostile
├── OutputError      results that cannot be written
├── RankLost         a training on several processes, of which another ended
└── Interrupted      a training that was asked to stop, after its state was saved

A message says what, where, got, expected, and the next step, in one line. It may hold paths, and these may name
patients: what is stored of it goes through `names_only`.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

_ABSOLUTE = re.compile(r"(?<![\w./\\])(?:[A-Za-z]:)?[\\/](?:[^\s\\/'\",;()]+[\\/])+([^\s\\/'\",;()]*)")


class CrossmrError(Exception):
    """Base of every error that crossmr raises on purpose; its text is fit for a user's eyes."""


class CrossmrWarning(UserWarning):
    """What does not stop crossmr, but may go wrong; its text is fit for a user's eyes."""


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


class RankLost(CrossmrError):
    """A training on several processes, of which another ended."""


class Interrupted(CrossmrError):
    """A training that was asked to stop, after its state was saved."""


def names_only(text: str, paths: Iterable[Path] = ()) -> str:
    """A message for a file that may be shared: of every path in it no more is left than the name of the file.

    `paths` are the files and folders of which the message may speak, exactly as it may write them: a path with spaces
    is recognised only if it is one of these or lies beside or above one. Folders above a file are called 'its folder'.
    """
    forms = {form for path in paths for form in (path, Path(os.path.abspath(path)), path.resolve())}
    for form in sorted(forms, key=lambda path: len(str(path)), reverse=True):
        text = text.replace(str(form), form.name)
    above = {folder for form in forms for folder in form.parents if folder.name}
    for folder in sorted(above, key=lambda path: len(str(path)), reverse=True):
        text = re.sub(rf"(?<![\w./\\]){re.escape(str(folder))}[\\/]", "", text)
        if folder.is_absolute():
            text = re.sub(rf"{re.escape(str(folder))}(?![\w-])", "its folder", text)
    return _ABSOLUTE.sub(r"\1", text)
