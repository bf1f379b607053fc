"""Rigid registration of one volume onto another's grid, by SimpleITK: mutual information, coarse to fine.

An extra (`pip install crossmr[register]`). One thread and a regular grid of samples, so that the same input gives the
same output.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from crossmr.data.volume import Volume, describe_grid, same_grid
from crossmr.errors import ConfigError, StudyError

Array = npt.NDArray[np.float32]
RegistrationMode = Literal["never", "if needed", "always"]
"""Which volumes of a study are registered to its first one: none, those on another grid, or all."""
COARSE, FINE = (4, 2.0, 0.25), (1, 0.0, 0.01)
"""Shrink factor, smoothing (mm), fraction of the voxels that is sampled."""
SEED = 1
"""Seed of the sampled voxels' jitter."""
SAMPLED = 0.02
"""Fraction of the voxels from which the mutual information of the results is computed."""
FARTHEST_MM, WIDEST_DEGREES = 80.0, 40.0
"""Largest displacement and rotation that are accepted: no head lies farther from where its header says."""
RULE = 2
"""Counts the rules by which a volume is moved: studies that an earlier one registered are prepared again."""
OVERLAP = 0.6
"""Dice coefficient of the two volumes' voxels above their means, below which a result is refused."""
STILL_MM = 1.5
"""A volume on the same grid that would move by less than this is not resampled."""
BETTER = 1.03
"""The header's position is kept unless another has more mutual information by this factor. Of four people, in 12
registrations whose header was right, the best place had up to 1.025 times as much; where it was wrong by 2 mm, 1.036 to
1.075 times."""
CORNER_MM = 70.0
"""Distance from the middle of the head at which its displacement is measured."""


def registration_mode(given: object) -> RegistrationMode:
    """The mode that a setting gives, as --register does: True is 'always', False 'never'.

    Raises:
        ConfigError: it is none.
    """
    mode = {True: "always", False: "never"}.get(given, given) if isinstance(given, bool) else given
    if mode not in get_args(RegistrationMode):
        raise ConfigError(f"register is {given!r}; expected one of {', '.join(get_args(RegistrationMode))}.")
    return cast(RegistrationMode, mode)


@dataclass(frozen=True)
class Registered:
    """A registered volume, and how far it was moved: not at all where no other place is clearly better."""

    volume: Volume
    """Resampled onto the reference's grid."""
    translation_mm: tuple[float, float, float]
    """(X, Y, Z) RAS+, of the middle of the reference."""
    rotation_degrees: tuple[float, float, float]
    """Rotation vector about these axes: its direction is the axis, its length the angle."""
    displacement_mm: float
    """Largest displacement of eight points `CORNER_MM` from the middle."""
    mutual_information: tuple[float, float]
    """Mutual information of the two volumes (Mattes et al. 2003), where the header says and at the best place found;
    both of the volume interpolated linearly."""
    kept: bool = False
    """Whether it was left where its header says."""
    transform: Any = None
    """ITK's, from the reference to the volume as it was."""

    def move_labels(self, labels: npt.NDArray[np.uint8], drawn_on: Volume) -> npt.NDArray[np.uint8]:
        """Labels (Z, Y, X) that were drawn on the volume as it was, moved as it was: each voxel the nearest one's."""
        itk = _simpleitk()
        target, source = _image(itk, self.volume), _image(itk, replace(drawn_on, data=labels))
        moved = itk.Resample(source, target, self.transform, itk.sitkNearestNeighbor, 0, itk.sitkUInt8)
        return np.ascontiguousarray(itk.GetArrayFromImage(moved), dtype=np.uint8)

    def __str__(self) -> str:
        shift = ", ".join(f"{value:.1f}" for value in self.translation_mm)
        turn = ", ".join(f"{value:.1f}" for value in self.rotation_degrees)
        before, after = self.mutual_information
        if self.kept:
            return f"left where its header says (mutual information {before:.3f}, at best {after:.3f} elsewhere)"
        return f"moved by ({shift}) mm and ({turn})°; mutual information {before:.3f} → {after:.3f}"


def register_rigidly(case: str, modality: str, moving: Volume, fixed: Volume) -> Registered:
    """Move a volume rigidly onto the grid of another of the same head, and resample it linearly.

    It stays where its header says unless another place is clearly better, by `BETTER`.

    Raises:
        ConfigError: SimpleITK is not installed.
        StudyError: the result does not overlap the reference, or was moved farther than is plausible.
    """
    itk = _simpleitk()
    threads = itk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    itk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        target, source = _image(itk, fixed), _image(itk, moving)
        starts = [_optimised(itk, target, source, start, COARSE) for start in _starts(itk, target, source)]
        information = [_information(itk, target, source, start) for start in starts]
        transform = _optimised(itk, target, source, starts[int(np.argmax(information))], FINE)
        header = itk.Euler3DTransform()
        before, after = (_information(itk, target, source, t) for t in (header, transform))
        background = float(np.percentile(moving.data, 0.5))

        def resampled(transform: Any) -> Array:
            image = itk.Resample(source, target, transform, itk.sitkLinear, background, itk.sitkFloat32)
            return np.ascontiguousarray(itk.GetArrayFromImage(image), dtype=np.float32)

        kept = after < BETTER * before and _dice(resampled(header), fixed.data) >= OVERLAP
        transform = header if kept else transform
        data = resampled(transform)
    finally:
        itk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    shift, turn, farthest = _movement(itk, transform, target)
    result = Registered(
        volume=replace(fixed, data=data, name=moving.name, synthetic=moving.synthetic),
        translation_mm=shift,
        rotation_degrees=turn,
        displacement_mm=farthest,
        mutual_information=(before, after),
        kept=kept,
        transform=transform,
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
    """A volume as an ITK image, in LPS coordinates."""
    image = itk.GetImageFromArray(volume.data)
    to_lps = np.diag([-1.0, -1.0, 1.0])
    spacing = np.array(volume.spacing_mm[::-1])
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((to_lps @ volume.affine[:3, 3]).tolist())
    image.SetDirection((to_lps @ (volume.affine[:3, :3] / spacing)).ravel().tolist())
    return image


def _starts(itk: Any, target: Any, source: Any) -> list[Any]:
    """Initial transforms: the headers' positions, and equal centres of mass."""
    middle = itk.CenteredTransformInitializer(
        target, source, itk.Euler3DTransform(), itk.CenteredTransformInitializerFilter.MOMENTS
    )
    header = itk.Euler3DTransform()
    header.SetCenter(itk.Euler3DTransform(middle).GetCenter())
    return [header, itk.Euler3DTransform(middle)]


def _method(itk: Any, sampled: float) -> Any:
    method = itk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(48)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(sampled, SEED)
    method.SetInterpolator(itk.sitkLinear)
    return method


def _optimised(itk: Any, target: Any, source: Any, initial: Any, level: tuple[int, float, float]) -> Any:
    """Optimise a transform; the initial one is returned where the two do not overlap."""
    shrink, smoothing, sampled = level
    method = _method(itk, sampled)
    method.SetShrinkFactorsPerLevel([shrink])
    method.SetSmoothingSigmasPerLevel([smoothing])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-3, 120, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(itk.Euler3DTransform(initial), inPlace=True)
    try:
        return itk.Euler3DTransform(method.Execute(target, source))
    except RuntimeError:
        return initial


def _information(itk: Any, target: Any, source: Any, transform: Any) -> float:
    """Mutual information under a transform; 0 where the volumes do not overlap."""
    method = _method(itk, SAMPLED)
    method.SetInitialTransform(transform)
    try:
        return -float(method.MetricEvaluate(target, source))
    except RuntimeError:
        return 0.0


def _movement(
    itk: Any, transform: Any, target: Any
) -> tuple[tuple[float, float, float], tuple[float, float, float], float]:
    """Translation of the target's middle, rotation vector, both in RAS+, and the largest displacement."""
    middle = np.array(target.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in target.GetSize()]))
    corners = CORNER_MM / np.sqrt(3) * np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    moves = [np.array(transform.TransformPoint(tuple(p))) - p for p in middle + np.vstack([np.zeros(3), corners])]
    flip = np.array([-1.0, -1.0, 1.0])
    x, y, z = (-moves[0] * flip).tolist()
    turn = Rotation.from_matrix(np.array(transform.GetMatrix()).reshape(3, 3)).as_rotvec(degrees=True)
    a, b, c = (-turn * flip).tolist()
    return (x, y, z), (a, b, c), float(max(np.linalg.norm(move) for move in moves))


def _dice(a: Array, b: Array) -> float:
    """Dice coefficient of the voxels above each volume's mean."""
    one, other = a > a.mean(), b > b.mean()
    return 2 * float((one & other).sum()) / max(1, int(one.sum()) + int(other.sum()))
