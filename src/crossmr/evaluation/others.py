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
from crossmr.errors import ConfigError, CrossmrError, StudyError, names_only
from crossmr.evaluation.subjects import Array, Subject

FAR, NARROW = 3.0, 0.15
"""Robust standard deviations of the truth: images whose median lies farther from the true one, or whose own deviation
is smaller, have other units."""
UNLIKE_FAR, UNLIKE_NARROW = 0.75, 0.5
"""The same where they may have."""
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

    def of(self, subject: Subject, target: str) -> tuple[Array, str]:
        """Its image of one study, (Z, Y, X) in [0, 1] as the subject's are, 0 where the truth has no head; and a doubt.

        Raises:
            StudyError: it is on another grid, in other units, or has voxels of the head that are no numbers.
            VolumeError: unreadable.
        """
        path = self.files[subject.name][target]
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
        elif volume.synthetic:
            raise StudyError(
                f"{subject.name}: {where} was written with --scale input, in another scan's units. Write it on "
                "crossmr's scale from 0 to 1 (--scale unit)."
            )
        image = np.zeros(head.shape, np.float32)
        image[head] = min(scales, key=lambda scaled: abs(float(np.median(scaled)) - MEDIAN_OF_HEAD))
        low, middle, high = np.percentile(image[head], (25, 50, 75))
        far, spread = abs(middle - MEDIAN_OF_HEAD) / STD_OF_HEAD, (high - low) / 1.349 / STD_OF_HEAD
        how = (
            f"within the head its median lies {far:.1f} robust standard deviations from the scan's, and its own is "
            f"{spread:.2f} of the scan's. Write the images in the scan's units, or on crossmr's scale from 0 to 1"
        )
        if far > FAR or spread < NARROW:
            raise StudyError(f"{subject.name}: {where} has other units: {how} (--scale unit).")
        unlike = bool(far > UNLIKE_FAR or spread < UNLIKE_NARROW)
        return image, f"{subject.name}: {where} may have other units, and is measured as it is: {how}" * unlike


def read_images(images: Sequence[OtherImages], subject: Subject) -> tuple[dict[str, dict[str, Array]], list[str]]:
    """Name → target → volume of one study, and what is to be said: an image that cannot be measured is left out."""
    made, said = dict[str, dict[str, Array]](), list[str]()
    for one in images:
        for target in one.files.get(subject.name, ()):
            if target not in subject.volumes:
                continue
            try:
                image, doubt = one.of(subject, target)
            except CrossmrError as error:
                said.append(f"not measured: {names_only(str(error), [one.folder])}")
                continue
            made.setdefault(one.name, {})[target] = image
            said += [doubt] if doubt else []
    return made, said


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


def counted(names: Sequence[str], measured: Collection[tuple[str, str]]) -> dict[str, int]:
    """Name → cases of which an image was measured."""
    return {name: sum(one == name for one, _ in measured) for name in names}


def say_images(names: Sequence[str], measured: Collection[tuple[str, str]], cases: Collection[str]) -> list[str]:
    """What the numbers of other images do not say: on whom their program was trained, and of whom they are lacking.

    `measured` are pairs of a name and a case of which an image was measured.
    """
    said = []
    for name in names:
        said.append(f"{name}: from which contrasts, and by a training on whom, nobody here knows.")
        if lacking := [case for case in cases if (name, case) not in measured]:
            had = len(cases) - len(lacking)
            means = f"its means are over these; {_some(lacking)} lack" if had else "so it is in no table"
            said.append(f"{name}: images of {had} of {len(cases)} studies were measured, {means}.")
    return said
