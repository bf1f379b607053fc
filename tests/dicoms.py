"""DICOM series made of volumes, with the habits of several scanners and archives."""

import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from conftest import make_head
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID
from pydicom.valuerep import DSfloat
from scipy.spatial.transform import Rotation

from crossmr.data.volume import read_volume

MR, ENHANCED = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
TIMING = {
    "t1n": {"ScanningSequence": "SE", "SequenceVariant": "SK", "RepetitionTime": 550, "EchoTime": 12},
    "t1c": {"ScanningSequence": "SE", "SequenceVariant": "SK", "RepetitionTime": 550, "EchoTime": 12}
    | {"ContrastBolusAgent": "Gadavist"},
    "t2w": {"ScanningSequence": "SE", "SequenceVariant": "SK", "RepetitionTime": 4500, "EchoTime": 95},
    "t2f": {"ScanningSequence": ["SE", "IR"], "SequenceVariant": "SK", "RepetitionTime": 9000, "EchoTime": 120}
    | {"InversionTime": 2500},
}


@dataclass
class Habit:
    """How a scanner or an archive writes."""

    syntax: str = "explicit"
    """explicit, implicit, bigendian, deflated, rle, jpegls, j2k, jpeglossless."""
    name: str = "IM{0:04d}.dcm"
    slope: float | None = None
    intercept: float = 0.0
    shuffled: bool = False
    """Instance numbers and file names say nothing of the order."""
    preamble: bool = True
    missing: tuple[str, ...] = ()
    enhanced: bool = False
    extra: dict = field(default_factory=dict)


HABITS = {
    "plain": Habit(),
    "implicit, no suffix, shuffled": Habit("implicit", name="{0:08X}", shuffled=True),
    "without preamble": Habit("implicit", preamble=False),
    "big-endian": Habit("bigendian"),
    "deflated": Habit("deflated"),
    "run lengths": Habit("rle"),
    "JPEG-LS": Habit("jpegls"),
    "JPEG 2000": Habit("j2k"),
    "JPEG lossless": Habit("jpeglossless"),
    "rescaled": Habit(slope=0.5, intercept=-20.0),
    "thickness and numbers missing": Habit(missing=("SliceThickness", "InstanceNumber", "ImageType", "PatientID")),
    "enhanced": Habit(enhanced=True),
    "enhanced, implicit": Habit("implicit", enhanced=True),
}
SYNTAXES = {
    "explicit": pydicom.uid.ExplicitVRLittleEndian,
    "implicit": pydicom.uid.ImplicitVRLittleEndian,
    "bigendian": pydicom.uid.ExplicitVRBigEndian,
    "deflated": pydicom.uid.DeflatedExplicitVRLittleEndian,
    "rle": pydicom.uid.RLELossless,
    "jpegls": pydicom.uid.JPEGLSLossless,
    "j2k": pydicom.uid.JPEG2000Lossless,
    "jpeglossless": UID("1.2.840.10008.1.2.4.70"),
}


DCMTK = {"bigendian": ["dcmconv", "+tb"], "jpeglossless": ["dcmcjpeg"]}
"""What pydicom does not write, Debian's dcmtk does."""


def uid(*parts) -> str:
    """A UID that its parts always lead to."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, '/'.join(map(str, parts))).int}"


def write_series(
    folder: Path,
    voxels: np.ndarray,
    affine: np.ndarray,
    modality: str = "t1n",
    *,
    number: int = 1,
    patient: str = "MRN-0042",
    date: str = "20240131",
    habit: Habit | str = "plain",
    description: str = "",
    **tags,
) -> list[Path]:
    """Write whole numbers (X, Y, Z) on a NIfTI affine as slices along Z; `tags` replace what the modality's are."""
    habit = HABITS[habit] if isinstance(habit, str) else habit
    folder.mkdir(parents=True, exist_ok=True)
    study = uid(patient, date)
    common = Dataset()
    common.SOPClassUID = ENHANCED if habit.enhanced else MR
    common.StudyInstanceUID, common.SeriesInstanceUID = study, uid(study, number)
    common.FrameOfReferenceUID = uid(study, "frame")
    common.PatientName, common.PatientID, common.PatientBirthDate, common.PatientSex = (
        "Doe^Jane",
        patient,
        "19700101",
        "F",
    )
    common.StudyDate, common.StudyTime, common.StudyID, common.AccessionNumber = date, "101500", "7", "A123"
    common.ReferringPhysicianName, common.Modality, common.Manufacturer = "Roe^Richard", "MR", "ACME"
    common.SeriesNumber, common.SeriesDescription = number, description
    common.AcquisitionTime = f"10{number % 60:02d}00"
    common.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    common.SliceThickness = 1.0
    common.PatientPosition, common.PositionReferenceIndicator = "HFS", ""
    common.Rows, common.Columns = voxels.shape[1], voxels.shape[0]
    common.SamplesPerPixel, common.PhotometricInterpretation = 1, "MONOCHROME2"
    common.BitsAllocated, common.BitsStored, common.HighBit, common.PixelRepresentation = 16, 16, 15, 0
    if habit.slope is not None:
        common.RescaleSlope, common.RescaleIntercept, common.RescaleType = habit.slope, habit.intercept, "US"
    timing = TIMING.get(modality, {}) | tags
    if not habit.enhanced:
        for keyword, value in (timing | habit.extra).items():
            setattr(common, keyword, value)
    if habit.slope is not None:  # stored × slope + intercept gives the voxels
        voxels = (voxels - habit.intercept) / habit.slope
    stored = np.rint(voxels).astype("<u2")
    assert np.array_equal(stored, voxels), "whole numbers that fit uint16"

    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    row, down = lps[:3, 0], -lps[:3, 1]
    spacing = [float(np.linalg.norm(down)), float(np.linalg.norm(row))]
    orientation = [float(v) for v in [*(row / spacing[1]), *(down / spacing[0])]]
    corner = lps[:3, 3] + lps[:3, 1] * (voxels.shape[1] - 1)
    count = voxels.shape[2]
    places = [[float(v) for v in corner + lps[:3, 2] * k] for k in range(count)]
    order = np.random.default_rng(number).permutation(count) if habit.shuffled else np.arange(count)

    if habit.enhanced:
        return [_write_enhanced(folder, common, stored, spacing, orientation, places, timing, habit, number)]
    paths = []
    for k in range(count):
        image = FileDataset(None, {}, preamble=bytes(128))
        image.update(common)
        image.SOPInstanceUID = uid(study, number, k)
        image.InstanceNumber = int(order[k]) + 1
        image.ImageOrientationPatient = _decimals(orientation)
        image.ImagePositionPatient = _decimals(places[k])
        image.PixelSpacing = _decimals(spacing)
        for keyword in habit.missing:
            if keyword in image:
                delattr(image, keyword)
        plane = stored[:, ::-1, k].T
        paths.append(_save(folder / habit.name.format(int(order[k]) + 1000 * number), image, plane, habit))
    return paths


def _write_enhanced(folder, common, stored, spacing, orientation, places, timing, habit, number):
    image = FileDataset(None, {}, preamble=bytes(128))
    image.update(common)
    image.SOPInstanceUID, image.InstanceNumber = uid(common.SeriesInstanceUID, "all"), 1
    image.NumberOfFrames = len(places)
    image.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    families = np.atleast_1d(timing.get("ScanningSequence", "SE")).tolist()
    image.EchoPulseSequence = "GRADIENT" if "GR" in families else "SPIN"
    image.AcquisitionContrast = timing.get("AcquisitionContrast", "UNKNOWN")
    if timing.get("ContrastBolusAgent"):
        image.ContrastBolusAgentSequence = [Dataset()]
    shared, measures, times, echo, modifier = (Dataset() for _ in range(5))
    measures.PixelSpacing, measures.SliceThickness = _decimals(spacing), 1.0
    shared.PixelMeasuresSequence = [measures]
    direction = Dataset()
    direction.ImageOrientationPatient = _decimals(orientation)
    shared.PlaneOrientationSequence = [direction]
    times.RepetitionTime = timing.get("RepetitionTime")
    echo.EffectiveEchoTime = float(timing.get("EchoTime"))
    shared.MRTimingAndRelatedParametersSequence, shared.MREchoSequence = [times], [echo]
    modifier.InversionRecovery = "YES" if "InversionTime" in timing else "NO"
    if "InversionTime" in timing:
        modifier.InversionTimes = float(timing["InversionTime"])
    shared.MRModifierSequence = [modifier]
    scale = Dataset()
    scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = habit.slope or 1.0, habit.intercept, "US"
    shared.PixelValueTransformationSequence = [scale]
    image.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k, place in enumerate(places):
        frame, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = _decimals(place)
        content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", k + 1, [1, k + 1]
        frame.PlanePositionSequence, frame.FrameContentSequence = [position], [content]
        frames.append(frame)
    image.PerFrameFunctionalGroupsSequence = frames
    organisation, stack, place = Dataset(), Dataset(), Dataset()
    organisation.DimensionOrganizationUID = uid(image.SOPInstanceUID, "dimensions")
    image.DimensionOrganizationSequence = [organisation]
    for index, pointer in ((stack, 0x00209056), (place, 0x00209057)):
        index.DimensionOrganizationUID = organisation.DimensionOrganizationUID
        index.DimensionIndexPointer, index.FunctionalGroupPointer = pointer, 0x00209111
    image.DimensionIndexSequence = [stack, place]
    return _save(folder / habit.name.format(1000 * number), image, stored[:, ::-1].T, habit)


def _save(path: Path, image: FileDataset, pixels: np.ndarray, habit: Habit) -> Path:
    syntax = SYNTAXES[habit.syntax]
    pixels = np.ascontiguousarray(pixels)
    image.file_meta = FileMetaDataset()
    plain = syntax.is_compressed or habit.syntax in DCMTK
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian if plain else syntax
    image.PixelData = pixels.tobytes()
    image["PixelData"].VR = "OW"
    if habit.syntax in ("rle", "jpegls", "j2k"):
        image.compress(syntax)
    if habit.syntax == "deflated":
        image.file_meta.TransferSyntaxUID = syntax
    if not habit.preamble:
        meta = image.file_meta
        bare = Dataset()
        bare.update(image)
        assert meta.TransferSyntaxUID == pydicom.uid.ImplicitVRLittleEndian
        bare.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
        return path
    image.save_as(path, enforce_file_format=True)
    if habit.syntax in DCMTK:
        subprocess.run([*DCMTK[habit.syntax], path, path], check=True)
    return path


def _decimals(values) -> list:
    return [DSfloat(value, auto_format=True) for value in values]


SHAPE = (36, 40, 24)
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", [12, -7, 20], degrees=True).as_matrix() @ np.diag([-6.0, 5.0, 7.0])
OBLIQUE[:3, 3] = [80.5, -90.25, -70.125]
SAGITTAL = np.array([[0, 0, 6.0, -60], [5, 0, 0, -80], [0, 5, 0, -70], [0, 0, 0, 1.0]])


def head(modality="t1n"):
    return np.rint(make_head(modality, shape=SHAPE)).astype(int)


def write(folder, modalities=("t1n", "t1c", "t2w", "t2f"), *, habit="plain", affine=OBLIQUE, **others):
    for number, modality in enumerate(modalities, 2):
        write_series(folder / str(number), head(modality), affine, modality, number=number, habit=habit, **others)


def truth(modality, affine=OBLIQUE):
    return read_volume(nib.Nifti1Image(head(modality).astype(np.float32), affine))


def edited(paths, edit):
    """Change images in place: `edit` gets each and its index."""
    for k, path in enumerate(paths):
        image = pydicom.dcmread(path)
        edit(image, k)
        image.save_as(path)


def rounded(image, _):
    image.ImagePositionPatient = [round(float(v)) for v in image.ImagePositionPatient]
