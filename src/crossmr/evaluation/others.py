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

from crossmr.data.head import DARKEST, MEDIAN_OF_HEAD, STD_OF_HEAD
from crossmr.data.naming import find_studies
from crossmr.data.volume import describe_grid, read_volume, said_displacement, same_grid, voxels_sha256
from crossmr.display import Display
from crossmr.errors import ConfigError, CrossmrError, StudyError
from crossmr.evaluation.subjects import Array, Subject

FAR, NARROW = 3.0, 0.15
"""Robust standard deviations of the truth: images whose median lies farther from the true one, or whose own deviation
is smaller, have other units."""
SLACK = 0.02
"""So far beyond 0 and 1 may images on crossmr's scale lie, but for a twentieth of their voxels at each end."""
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
        there = [target for target in targets if target in files and target in subject.volumes]
        return {target: self._read(files[target], subject, target) for target in there}

    def _read(self, path: Path, subject: Subject, target: str) -> Array:
        volume = read_volume(path)
        where = f"{self.name}: {path.name}"
        if volume.data.shape != subject.grid or (subject.whole is not None and not same_grid(volume, subject.whole)):
            grid = "×".join(map(str, reversed(subject.grid)))
            if subject.whole is not None:
                grid = f"{describe_grid(subject.whole)}{said_displacement(volume, subject.whole)}"
            raise StudyError(
                f"{subject.name}: {where} is {describe_grid(volume)}, but the study is {grid}. Write the images on the "
                "grid of the study's first contrast."
            )
        corner, shape = subject.corner, subject.head.shape
        z, y, x = (slice(start, start + size) for start, size in zip(corner, shape, strict=True))
        data, head = volume.data[z, y, x], subject.head_of(target)
        inside = data[head]
        if not np.isfinite(inside).all():
            raise StudyError(f"{subject.name}: {where} has voxels within the head that are NaN or infinite.")
        if voxels_sha256(volume) in subject.scans:
            raise StudyError(f"{subject.name}: {where} is the true scan. Name a folder that holds what was made alone.")
        scales = [subject.normalisation[target].apply(inside)]
        least, most = np.percentile(inside, (5, 95))
        if least >= -SLACK and most <= 1 + SLACK:
            scales.append(np.clip(inside, DARKEST, 1))
        image = np.zeros(head.shape, np.float32)
        image[head] = min(scales, key=lambda scaled: abs(float(np.median(scaled)) - MEDIAN_OF_HEAD))
        low, middle, high = np.percentile(image[head], (25, 50, 75))
        far, spread = abs(middle - MEDIAN_OF_HEAD) / STD_OF_HEAD, (high - low) / 1.349 / STD_OF_HEAD
        if far > FAR or spread < NARROW:
            raise StudyError(
                f"{subject.name}: {where} has other units: within the head its median lies {far:.1f} robust standard "
                f"deviations from the scan's, and its own is {spread:.2f} of the scan's. Write the images in the "
                "scan's units, or on crossmr's scale from 0 to 1 (--scale unit)."
            )
        return image


def read_images(images: Sequence[OtherImages], subject: Subject, display: Display) -> dict[str, dict[str, Array]]:
    """Name → target → volume of one study; one that cannot be measured is left out, with a word."""
    made: dict[str, dict[str, Array]] = {}
    for one in images:
        for target in one.files.get(subject.name, ()):
            try:
                made.setdefault(one.name, {}).update(one.of(subject, [target]))
            except CrossmrError as error:
                display.say(f"warning: not measured: {error}")
    return made


def find_images(folders: Mapping[str, Path], cases: Collection[str], targets: Collection[str]) -> list[OtherImages]:
    """The images in each folder, by name → folder.

    Raises:
        ConfigError: a folder has none of these cases' targets, or two images of one. NamingError: it has no volume.
    """
    found = []
    by_name = {m: f"*-{m}.nii.gz|*-{m}.nii|*-{m}_synthetic.nii.gz" for m in targets}  # as they are asked for
    for name, folder in folders.items():
        if not name.strip():
            raise ConfigError("--images needs a name: --images unet=FOLDER.")
        studies = {study.case: study for study in find_studies(Path(folder), by_name)}
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
