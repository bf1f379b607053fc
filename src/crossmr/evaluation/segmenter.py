"""A segmenter that someone else wrote, run as a command on one study: four contrasts in, labels out.

The command is given a folder named and laid out as BraTS has it, BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz and
t1c, t2w, t2f, and nothing else: no labels, no name of the case. The image that is not real is marked as synthetic in
its header.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crossmr.data.nifti import write_volume
from crossmr.data.study import Study
from crossmr.data.volume import on_grid, read_labels
from crossmr.errors import ConfigError, StudyError, VolumeError
from crossmr.files import temporary_folder

NAME = "BraTS-GLI-00000-000"
"""What every study is called, so that no command can know a case by its name."""
STUDY, LABELS = "{study}", "{labels}"
MAX_LABEL = 4
"""The largest label of BraTS."""
SHOWN = 300
"""Characters of the command's last line that an error shows."""
EXAMPLE = f"--segmenter 'python segment.py {STUDY} {LABELS}'"
Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Segmenter:
    """A command that outlines a tumour."""

    command: str
    """Words as a shell would split them; no shell runs them. Each {study} is the folder, each {labels} the file."""
    seconds: float = 3600.0
    """So long one study may take."""

    def __post_init__(self) -> None:
        words = self.words()
        for place in (STUDY, LABELS):
            if not any(place in word for word in words):
                raise ConfigError(f"--segmenter is '{self.command}': it lacks {place}. Expected such as {EXAMPLE}.")
        if shutil.which(words[0]) is None:
            raise ConfigError(f"--segmenter: there is no program {words[0]}. Give its path, or install it.")

    def words(self) -> list[str]:
        """The program and its arguments.

        Raises:
            ConfigError: a quote is not closed, or there is no word.
        """
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise ConfigError(f"--segmenter is '{self.command}': {error}. Expected such as {EXAMPLE}.") from error
        if not words:
            raise ConfigError(f"--segmenter is empty. Expected such as {EXAMPLE}.")
        return words

    def outline(
        self, study: Study, target: str, images: Mapping[str, Array], others: Sequence[str]
    ) -> Iterator[tuple[str, Labels]]:
        """Outline the tumour of a study once with each image (Z, Y, X) in place of its `target`, then with the target.

        `others` are the real contrasts beside it. Yields predictor and labels (Z, Y, X); '' is the real image.

        Raises:
            StudyError: the command fails, takes too long, or writes no labels, or none that are of BraTS.
        """
        reference = study.reference
        with temporary_folder(f"{study.case}: the segmenter") as folder:
            for m in (*others, target):
                real = on_grid(study.volumes[m].data, reference, description="acquired")
                write_volume(real, folder / "real" / _file(m))
            for number, name in enumerate([*images, ""]):
                place = folder / str(number) / NAME
                place.mkdir(parents=True)
                for m in (*others, *([] if name else [target])):
                    shutil.copyfile(folder / "real" / _file(m), place / _file(m))
                if name:
                    made = on_grid(images[name], reference, description=f"SYNTHETIC {target} by crossmr")
                    write_volume(made, place / _file(target))
                yield name, self._labels(study, place, place.parent / "labels.nii.gz")
                shutil.rmtree(place.parent)

    def _labels(self, study: Study, place: Path, file: Path) -> Labels:
        """Run the command on one folder, and read what it wrote."""
        words = [word.replace(STUDY, str(place)).replace(LABELS, str(file)) for word in self.words()]
        self._run(study.case, words, place.parent / "said.txt")
        if not file.exists():
            raise StudyError(f"{study.case}: the segmenter ended well, but wrote no {LABELS}. See what it writes.")
        try:
            labels: Labels = read_labels(file, study.reference)
        except VolumeError as error:
            raise StudyError(f"{study.case}: the segmenter's labels are not usable: {error}") from error
        if (largest := int(labels.max())) > MAX_LABEL:
            raise StudyError(f"{study.case}: the segmenter gave a label {largest}; BraTS has 0 to {MAX_LABEL}.")
        return labels

    def _run(self, case: str, words: Sequence[str], said: Path) -> None:
        """Run a command to its end; what it started ends with it."""
        with said.open("wb") as output:
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
            except OSError as error:
                raise StudyError(f"{case}: the segmenter could not be run: {error.strerror or error}.") from error
            try:
                code = process.wait(self.seconds)
            except subprocess.TimeoutExpired as error:
                raise StudyError(
                    f"{case}: the segmenter took more than {self.seconds:g} s, and was stopped. Try it by hand."
                ) from error
            finally:
                _end(process)
        if code != 0:
            lines = said.read_text(errors="replace").strip().splitlines()
            last = f": {lines[-1].strip()[:SHOWN]}" if lines else ""
            raise StudyError(f"{case}: the segmenter ended with code {code}{last}. Try it by hand on a study.")


def _file(modality: str) -> str:
    return f"{NAME}-{modality}.nii.gz"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process, and on POSIX all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
