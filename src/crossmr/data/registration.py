"""Rigid registration of one volume onto another's grid, by SimpleITK: mutual information, coarse to fine.

An extra (`pip install crossmr[register]`). One thread and a regular grid of samples, so that the same input gives the
same output.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from crossmr.data.volume import Volume, describe_grid, same_grid
from crossmr.errors import ConfigError, StudyError

Array = npt.NDArray[np.float32]
COARSE, FINE = (4, 2.0, 0.25), (1, 0.0, 0.01)
"""Shrink factor, smoothing (mm) and the share of voxels that is looked at."""
SEED = 1
"""Of the jitter of the samples."""
SHARE = 0.02
"""Of the voxels, from which mutual information is told in the end."""
FARTHEST_MM, WIDEST_DEGREES = 80.0, 40.0
"""A head that moved or turned farther was not where its header says; such a result is refused."""
OVERLAP = 0.6
"""Dice of the two volumes' brighter halves, below which they do not lie on one another."""
STILL_MM = 1.5
"""A volume on the same grid that would move less than this is left as it is."""
CORNER_MM = 70.0
"""How far from the middle of the head its displacement is measured."""


@dataclass(frozen=True)
class Moved:
    """What became of a volume."""

    volume: Volume
    """On the reference's grid."""
    translation_mm: tuple[float, float, float]
    """(X, Y, Z), right to left, posterior to anterior, inferior to superior, of the reference's middle."""
    rotation_degrees: tuple[float, float, float]
    """About these axes: their direction the rotation's axis, their length its angle."""
    displacement_mm: float
    """The farthest that any point some 7 cm from the middle moves."""
    mutual_information: tuple[float, float]
    """Of the two volumes (Mattes et al. 2003) before and after."""

    def __str__(self) -> str:
        shift = ", ".join(f"{value:.1f}" for value in self.translation_mm)
        turn = ", ".join(f"{value:.1f}" for value in self.rotation_degrees)
        before, after = self.mutual_information
        return f"moved by ({shift}) mm and ({turn})°; mutual information {before:.3f} → {after:.3f}"


def register(case: str, modality: str, moving: Volume, fixed: Volume) -> Moved:
    """Move a volume rigidly onto the grid of another of the same head, and resample it linearly.

    Raises:
        ConfigError: SimpleITK is not installed.
        StudyError: the two do not come to lie on one another, or only by a movement that no header can excuse.
    """
    itk = _simpleitk()
    threads = itk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    itk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        target, source = _image(itk, fixed), _image(itk, moving)
        starts = [_optimised(itk, target, source, start, COARSE) for start in _starts(itk, target, source)]
        information = [_information(itk, target, source, start) for start in starts]
        transform = _optimised(itk, target, source, starts[int(np.argmax(information))], FINE)
        before, after = (_information(itk, target, source, t) for t in (itk.Euler3DTransform(), transform))
        background = float(np.percentile(moving.data, 0.5))
        made = itk.Resample(source, target, transform, itk.sitkLinear, background, itk.sitkFloat32)
    finally:
        itk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    data = np.ascontiguousarray(itk.GetArrayFromImage(made), dtype=np.float32)
    shift, turn, farthest = _movement(itk, transform, target)
    result = Moved(
        replace(fixed, data=data, name=moving.name, synthetic=moving.synthetic), shift, turn, farthest, (before, after)
    )
    overlap = _dice(data, fixed.data)
    if overlap < OVERLAP or farthest > FARTHEST_MM or max(map(abs, turn)) > WIDEST_DEGREES:
        raise StudyError(
            f"{case}: {modality} ({describe_grid(moving)}) cannot be registered to {fixed.name}: it would be {result}, "
            f"and overlap by {overlap:.2f}. Look at both; are they of one head, and of the whole of it?"
        )
    if same_grid(moving, fixed) and farthest < STILL_MM:
        return replace(result, volume=moving)
    return result


def _simpleitk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise ConfigError("--register needs SimpleITK. Install it with: pip install 'crossmr[register]'") from error
    return SimpleITK


def _image(itk: Any, volume: Volume) -> Any:
    """A volume as ITK has it: its axes point to left, posterior and superior."""
    image = itk.GetImageFromArray(volume.data)
    to_lps = np.diag([-1.0, -1.0, 1.0])
    spacing = np.array(volume.spacing_mm[::-1])
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((to_lps @ volume.affine[:3, 3]).tolist())
    image.SetDirection((to_lps @ (volume.affine[:3, :3] / spacing)).ravel().tolist())
    return image


def _starts(itk: Any, target: Any, source: Any) -> list[Any]:
    """Where the headers put the two, and their centres of mass upon one another."""
    middle = itk.CenteredTransformInitializer(
        target, source, itk.Euler3DTransform(), itk.CenteredTransformInitializerFilter.MOMENTS
    )
    header = itk.Euler3DTransform()
    header.SetCenter(itk.Euler3DTransform(middle).GetCenter())
    return [header, itk.Euler3DTransform(middle)]


def _method(itk: Any, share: float) -> Any:
    method = itk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(48)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(share, SEED)
    method.SetInterpolator(itk.sitkLinear)
    return method


def _optimised(itk: Any, target: Any, source: Any, start: Any, level: tuple[int, float, float]) -> Any:
    """The transform that a start leads to; the start where the two do not overlap at all."""
    shrink, smoothing, share = level
    method = _method(itk, share)
    method.SetShrinkFactorsPerLevel([shrink])
    method.SetSmoothingSigmasPerLevel([smoothing])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-3, 120, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(itk.Euler3DTransform(start), inPlace=True)
    try:
        return itk.Euler3DTransform(method.Execute(target, source))
    except RuntimeError:
        return start


def _information(itk: Any, target: Any, source: Any, transform: Any) -> float:
    """Mutual information under a transform; 0 where the two do not overlap."""
    method = _method(itk, SHARE)
    method.SetInitialTransform(transform)
    try:
        return -float(method.MetricEvaluate(target, source))
    except RuntimeError:
        return 0.0


def _movement(
    itk: Any, transform: Any, target: Any
) -> tuple[tuple[float, float, float], tuple[float, float, float], float]:
    """Translation of the target's middle and rotation, in RAS, and the farthest displacement in the head."""
    middle = np.array(target.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in target.GetSize()]))
    corners = CORNER_MM / np.sqrt(3) * np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    moves = [np.array(transform.TransformPoint(tuple(p))) - p for p in middle + np.vstack([np.zeros(3), corners])]
    flip = np.array([-1.0, -1.0, 1.0])
    x, y, z = (-moves[0] * flip).tolist()
    turn = Rotation.from_matrix(np.array(transform.GetMatrix()).reshape(3, 3)).as_rotvec(degrees=True)
    a, b, c = (-turn * flip).tolist()
    return (x, y, z), (a, b, c), float(max(np.linalg.norm(move) for move in moves))


def _dice(a: Array, b: Array) -> float:
    """Of what is brighter than each volume's mean."""
    one, other = a > a.mean(), b > b.mean()
    return 2 * float((one & other).sum()) / max(1, int(one.sum()) + int(other.sum()))
