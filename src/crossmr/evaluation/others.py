"""Images that another program made of the studies, measured beside a model's: one's own network, a rival's.

They are found by their names, as studies are: the same case, the contrast that each stands for. Their intensities are
those of the true scan, and become [0, 1] as its own do; or they lie on that scale already, as what crossmr writes does,
and a network that learnt from a prepared dataset. Of the two, where all lie within [0, 1], it is the scale by which
their median is nearer to the true one. They are not standardised by themselves,
since that stretches an image that is smoother than the truth.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crossmr.data.head import MEDIAN_OF_HEAD, STD_OF_HEAD
from crossmr.data.naming import find_studies
from crossmr.data.volume import describe_grid, displacement_mm, read_volume, same_grid
from crossmr.errors import ConfigError, StudyError
from crossmr.evaluation.subjects import Array, Subject

FAR = 3.0
"""Robust standard deviations of the truth: images whose median lies farther from the true one have other units."""
PREFIX = "images: "
"""What their name begins with in tables and files."""


@dataclass(frozen=True)
class OtherImages:
    """What another program made of some studies."""

    name: str
    folder: Path
    files: Mapping[str, Mapping[str, Path]]
    """Case → contrast → file."""

    def __iter__(self) -> Iterator[tuple[str, str, Path]]:
        """Case, contrast and file of each image."""
        return ((case, m, path) for case, files in sorted(self.files.items()) for m, path in sorted(files.items()))

    def of(self, subject: Subject, targets: Sequence[str]) -> dict[str, Array]:
        """Its images of one study: target → (Z, Y, X) in [0, 1], as the subject's are, 0 where the truth has no head.

        Raises:
            StudyError: one is on another grid, or has voxels of the head that are no numbers. VolumeError: unreadable.
        """
        files = self.files.get(subject.name, {})
        return {target: self._read(files[target], subject, target) for target in targets if target in files}

    def _read(self, path: Path, subject: Subject, target: str) -> Array:
        volume = read_volume(path)
        where = f"{self.name}: {path.name}"
        if volume.data.shape != subject.grid or (subject.whole is not None and not same_grid(volume, subject.whole)):
            grid = "×".join(map(str, reversed(subject.grid)))
            beside = ""
            if subject.whole is not None:
                grid = describe_grid(subject.whole)
                if volume.data.shape == subject.grid:
                    beside = f" and lies up to {displacement_mm(volume, subject.whole):.3g} mm elsewhere"
            raise StudyError(
                f"{subject.name}: {where} is {describe_grid(volume)}, but the study is {grid}{beside}. Write the "
                "images on the grid of the study's first contrast."
            )
        corner, shape = subject.corner, subject.head.shape
        z, y, x = (slice(start, start + size) for start, size in zip(corner, shape, strict=True))
        data, head = volume.data[z, y, x], subject.head_of(target)
        if not np.isfinite(data[head]).all():
            raise StudyError(f"{subject.name}: {where} has voxels within the head that are NaN or infinite.")
        scales = [subject.normalisation[target].apply(data)]
        if data.min() >= 0 and data.max() <= 1:
            scales.append(data)
        medians = [abs(float(np.median(image[head])) - MEDIAN_OF_HEAD) for image in scales]
        nearest = int(np.argmin(medians))
        image: Array = np.where(head, scales[nearest], np.float32(0))
        if (far := medians[nearest] / STD_OF_HEAD) > FAR:
            raise StudyError(
                f"{subject.name}: {where} has a median within the head that is {far:.1f} robust standard deviations "
                "from the scan's. Write the images in the scan's units, or on crossmr's scale from 0 to 1."
            )
        return image


def find_images(folders: Mapping[str, Path], cases: Collection[str], targets: Collection[str]) -> list[OtherImages]:
    """The images in each folder, by name → folder.

    Raises:
        ConfigError: a folder has none of these cases' targets, or two images of one. NamingError: it has no volume.
    """
    found, own = [], {target: f"*-{target}_synthetic.nii.gz" for target in targets}  # as crossmr calls its own
    for name, folder in folders.items():
        if not name.strip():
            raise ConfigError("--images needs a name: --images unet=FOLDER.")
        studies = {study.case: study for study in find_studies(Path(folder), own)}
        files = {
            case: {m: path for m, path in studies[case].images().items() if m in targets}
            for case in studies
            if case in cases
        }
        if not any(files.values()):
            raise ConfigError(
                f"--images {name}: {folder} has no {' or '.join(targets)} of these studies: it has "
                f"{_some(studies)}, and they are {_some(cases)}. Name the files as the studies are, such as "
                f"{min(cases)}-{min(targets)}.nii.gz."
            )
        found.append(OtherImages(f"{PREFIX}{name}", Path(folder), files))
    return found


def _some(names: Collection[str]) -> str:
    return f"{', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''}"


def say_images(images: Sequence[OtherImages], cases: Collection[str]) -> list[str]:
    """What the numbers of other images do not say: on whom their program was trained, and of whom they are lacking."""
    said = []
    for one in images:
        said.append(f"{one.name}: from which contrasts, and by a training on whom, nobody here knows.")
        if lacking := [case for case in cases if not one.files.get(case)]:
            had = f"{len(cases) - len(lacking)} of {len(cases)} studies"
            said.append(f"{one.name}: there are images of {had}, and its means are over these; {_some(lacking)} lack.")
    return said
