r"""Synthetic volumes as DICOM: a series of MR images for any archive, marked as derived in every image.

It has its own series and image UIDs, and shares the scans' study and frame of reference. Image Type is
`DERIVED\SECONDARY\OTHER\SYNTHETIC\CROSSMR`, which de-identification keeps, the description starts with SYNTHETIC, and
the source images and the program are named (DICOM PS3.3 A.4, C.7.6.1, C.7.5.1). An extra.
"""

import math
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pydicom.config
from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.valuerep import VALIDATORS, DSfloat

from crossmr.data.naming import DISPLAY_NAMES, display_name
from crossmr.data.volume import DicomSlices, Volume, as_dicom_slices
from crossmr.dicom.folders import is_derived
from crossmr.dicom.headers import CONTRIBUTION
from crossmr.dicom.series import DicomImage, Series
from crossmr.errors import OutputError, VolumeError
from crossmr.files import refuse_foreign, unfinished_path
from crossmr.picture import window

STEPS = 10000
"""Stored integer that stands for 1: most archives expect integers."""
LARGEST_STORED, LARGEST_SIGNED, FEWEST_LEVELS = 65535, 32767, 255
"""Of intensities like a scan's: the largest stored integer, and that where some are negative, and how many grey levels
an image should have."""
_SERIES_NUMBERS = 9000
"""The lowest number of a derived series."""

# Patient, study and coordinates: copied from the scan.
_COPIED = (
    *("SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("PatientAge", "PatientSize", "PatientWeight", "OtherPatientIDs", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "DeidentificationMethodCodeSequence", "StudyInstanceUID", "StudyID", "StudyDate"),
    *("StudyTime", "StudyDescription", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
    *("AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID", "PositionReferenceIndicator"),
    *("PatientPosition", "BodyPartExamined", "MagneticFieldStrength", "InstitutionName", "TimezoneOffsetFromUTC"),
)
_REQUIRED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"),
    *("AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator", "PatientPosition"),
)
"""Type 2 or 2C: they must be present, but may be empty."""
_TEXTS, _CHECKED = ("PN", "LO", "SH"), ("DA", "TM", "AS", "CS", "DS")
"""Value representations of texts in any letters, and of values that have a form."""
_MR_STORAGE = "1.2.840.10008.5.1.4.1.1.4"


@dataclass(frozen=True, eq=False)
class DerivedSeries:
    """What a series of synthetic images is, and what it was derived from."""

    modality: str
    like: Series
    """The series whose patient, study and frame of reference it shares."""
    sources: Mapping[str, Series]
    """Modality → series that it was synthesised from."""
    description: str
    """How it was derived, and what to beware of."""
    settings: str
    """Whatever determines the voxels; the UIDs follow from it and from the voxels, so that the same synthesis has the
    same UIDs."""
    created: datetime
    """With a timezone."""
    kind: str = ""
    """'std' for a standard deviation, '' for an image."""
    steps: float | None = None
    """Stored integers per unit, of intensities like those of a scan; None of [0, 1]."""

    @property
    def number(self) -> int:
        """Series Number."""
        place = list(DISPLAY_NAMES).index(self.modality) if self.modality in DISPLAY_NAMES else 9
        return _SERIES_NUMBERS + 10 * place + bool(self.kind)

    @property
    def title(self) -> str:
        """Series Description, at most 64 characters."""
        name = display_name(self.modality)
        return f"SYNTHETIC {name}{f' {self.kind}' if self.kind else ''} (crossmr)"[:64]


def write_derived(folder: Path, array: npt.NDArray[np.float32], grid: Volume, series: DerivedSeries) -> Path:
    """Write a volume as a folder of MR images, completely or not at all.

    Args:
        folder: becomes the series' folder; an older one of this name is replaced, if crossmr wrote all that is in it.
        array: (Z, Y, X) within [0, 1], or, with `series.steps`, any intensities, on `grid`; where some of these are
            negative, the stored integers are signed.
        grid: the volume that was converted from `series.like`.
        series: what the images are.

    Raises:
        OutputError: the folder cannot be written, or holds anything else. VolumeError: the scan's tags can no longer be
            read.
    """
    refuse_foreign(folder, is_derived)
    slices = as_dicom_slices(array, grid)
    stored = _stored(slices.pixels, series.steps)
    with pydicom.config.disable_value_validation():
        common = _common(series, slices, stored)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            (temporary := unfinished_path(folder)).mkdir()
            try:
                for index, (pixels, position) in enumerate(zip(stored, slices.positions, strict=True), 1):
                    image = _image(common, index, pixels, position)
                    nearest = _nearest(series.sources, position, slices.orientation)
                    image.SourceImageSequence = [_source(source) for source in nearest]
                    image.SliceLocation = _decimals([position @ np.cross(*slices.orientation)])[0]
                    image.save_as(temporary / f"{index:04d}.dcm", enforce_file_format=True)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise OutputError(f"{folder} could not be written: {error.strerror or error}. Check free space.") from error
    return folder


def _stored(pixels: npt.NDArray[np.float32], steps: float | None) -> npt.NDArray[Any]:
    """The integers that stand for intensities: signed where some of a scan's scale are negative, else unsigned."""
    lowest, largest = 0, STEPS if steps is None else LARGEST_STORED
    if steps is not None and pixels.min() < 0:
        lowest, largest = -LARGEST_SIGNED, LARGEST_SIGNED
    stored: npt.NDArray[Any] = np.rint(np.clip(pixels * (steps or STEPS), lowest, largest))
    return stored.astype("<i2" if lowest else "<u2")


def _image(common: Dataset, index: int, pixels: npt.NDArray[Any], position: npt.NDArray[np.float64]) -> Dataset:
    """One image (rows, columns) with its own tags, numbered from 1, beside those that all images share."""
    image = FileDataset(None, {}, preamble=bytes(128))
    image.update(common)
    image.SOPInstanceUID = _uid(f"{common.SeriesInstanceUID} {index}")
    image.InstanceNumber = index
    image.ImagePositionPatient = _decimals(position)
    image.PixelData = pixels.tobytes()
    image["PixelData"].VR = "OW"
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID = _MR_STORAGE
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    letters = convert_encodings(image.get("SpecificCharacterSet"))
    image.set_original_encoding(False, True, letters if "SpecificCharacterSet" in image else letters[0])  # see _copied
    image.file_meta.ImplementationClassUID = _uid("crossmr implementation")
    image.file_meta.ImplementationVersionName = f"CROSSMR {version('crossmr')}"[:16]
    return image


def _common(series: DerivedSeries, slices: DicomSlices, stored: npt.NDArray[Any]) -> Dataset:
    """The tags that all images of the series share."""
    try:
        scan = pydicom.dcmread(series.like.images[0].path, stop_before_pixels=True, force=True)
    except Exception as error:  # pydicom raises whatever its parsing runs into
        raise VolumeError(f"{series.like.name}: its DICOM tags can no longer be read ({error}).") from error
    common = Dataset()
    _add_patient(common, scan, series)
    _add_origin(common, scan, _as_of_scan(series.created, scan))
    _add_pixels(common, slices, series, signed=bool(stored.dtype.kind == "i"))
    voxels = uuid.uuid5(uuid.NAMESPACE_OID, stored.tobytes().hex())
    identity = f"{series.settings} {series.modality} {series.kind} {voxels}"
    common.SeriesInstanceUID = _uid(f"{common.StudyInstanceUID} {identity}")
    common.SeriesNumber = series.number
    common.SeriesDescription = series.title
    common.DerivationDescription = series.description[:1024]
    return common


def _add_patient(common: Dataset, scan: Dataset, series: DerivedSeries) -> None:
    """Copy patient, study and frame of reference from the scan, but what is no value of its kind."""
    for keyword in _COPIED:
        if keyword in scan and (element := _copied(scan, keyword)) is not None:
            common[keyword] = element
    for keyword in _REQUIRED:
        if keyword not in common:
            setattr(common, keyword, "")
    study = scan.get("StudyInstanceUID")
    if not common.get("FrameOfReferenceUID"):
        whose = study or f"{series.like.study} {series.like.patient}"
        common.FrameOfReferenceUID = _uid(f"{whose} frame of reference")
    if not study:  # removed by whoever shared the scans
        common.StudyInstanceUID = _uid(series.like.study)
    common.BodyPartExamined = common.get("BodyPartExamined") or "BRAIN"


def _copied(scan: Dataset, keyword: str) -> Any:
    """A tag of the scan as it stands there; None where it is no date, time, age, code or number as DICOM has them.

    A text is copied byte by byte: where it is of other characters than Specific Character Set says, reading it would
    lose them.
    """
    vr = dictionary_VR(keyword)
    raw = scan.get_item(keyword)
    if vr in _TEXTS and isinstance(raw, RawDataElement):
        text = raw.value or b""
        return raw._replace(VR=vr, value=text + b" " * (len(text) % 2), is_implicit_VR=False)
    try:
        element = scan[keyword]
    except Exception:  # whatever pydicom's parsing runs into
        return None
    values = element.value if element.VM > 1 else [element.value]
    if vr in _CHECKED and not all(VALIDATORS[vr](vr, str(value))[0] for value in values if value is not None):
        return None
    return element


def _as_of_scan(created: datetime, scan: Dataset) -> datetime:
    """A time in the timezone of the scan's dates and times, which is that of this computer where no tag says it.

    One offset, or none, is for all dates and times of an image (DICOM PS3.3 C.12.1.1.8).
    """
    try:
        return created.astimezone(datetime.strptime(str(scan.get("TimezoneOffsetFromUTC")).strip(), "%z").tzinfo)
    except ValueError:
        return created.astimezone()


def _add_origin(common: Dataset, scan: Dataset, created: datetime) -> None:
    """State that the images are derived, when, and by which program."""
    common.SOPClassUID = _MR_STORAGE
    common.Modality = "MR"
    common.ImageType = ["DERIVED", "SECONDARY", "OTHER", "SYNTHETIC", "CROSSMR"]
    common.SeriesDate = common.ContentDate = common.InstanceCreationDate = created.strftime("%Y%m%d")
    common.SeriesTime = common.ContentTime = common.InstanceCreationTime = created.strftime("%H%M%S")
    common.Manufacturer = common.ManufacturerModelName = "crossmr"
    common.SoftwareVersions = version("crossmr")
    common.ContributingEquipmentSequence = [_equipment(created)]
    common.AcquisitionNumber = ""
    common.LossyImageCompression = str(scan.get("LossyImageCompression") or "00")
    common.BurnedInAnnotation = "NO"
    # nothing was acquired: research mode, and no times
    common.ScanningSequence, common.SequenceVariant = "RM", "NONE"
    common.ScanOptions = common.MRAcquisitionType = common.EchoTime = common.EchoTrainLength = ""
    common.RepetitionTime = ""


def choose_steps(array: npt.NDArray[np.float32]) -> float:
    """Stored integers per unit for intensities like a scan's: 1 where these are fine enough, else a power of ten."""
    largest = max(float(np.abs(array).max()), 1e-30)
    limit = LARGEST_SIGNED if array.min() < 0 else LARGEST_STORED
    return 1.0 if FEWEST_LEVELS <= largest <= limit else 10.0 ** math.floor(math.log10(limit / largest))


def _add_pixels(common: Dataset, slices: DicomSlices, series: DerivedSeries, *, signed: bool) -> None:
    """Describe geometry, storage and scale of the pixels."""
    steps = series.steps or STEPS
    distance, rows, columns = slices.spacing_mm
    common.PixelSpacing = _decimals([rows, columns])
    common.SliceThickness = common.SpacingBetweenSlices = _decimals([distance])[0]
    common.ImageOrientationPatient = _decimals(np.ravel(slices.orientation))
    common.SamplesPerPixel, common.PhotometricInterpretation = 1, "MONOCHROME2"
    common.Rows, common.Columns = slices.pixels.shape[1:]
    common.BitsAllocated, common.BitsStored, common.HighBit, common.PixelRepresentation = 16, 16, 15, int(signed)
    black, white = window(slices.pixels)
    common.WindowCenter, common.WindowWidth = _decimals([steps * (black + white) / 2, steps * (white - black)])
    common.WindowCenterWidthExplanation = "SYNTHETIC"
    scale = Dataset()
    scale.LUTLabel, scale.LUTExplanation = "NORMALISED", "1/3 is the head's median, 1/15 a robust standard deviation"
    if series.steps is not None:
        scale.LUTLabel, scale.LUTExplanation = "LIKE A SCAN", "median and robust standard deviation of a scan's head"
    largest = STEPS if series.steps is None else LARGEST_SIGNED if signed else LARGEST_STORED
    scale.RealWorldValueFirstValueMapped, scale.RealWorldValueLastValueMapped = -largest if signed else 0, largest
    scale.RealWorldValueIntercept, scale.RealWorldValueSlope = 0.0, 1 / steps
    scale.MeasurementUnitsCodeSequence = [_code("1", "UCUM", "no units")]
    for keyword in ("RealWorldValueFirstValueMapped", "RealWorldValueLastValueMapped"):
        scale[keyword].VR = "SS" if signed else "US"
    common.RealWorldValueMappingSequence = [scale]


def _equipment(created: datetime) -> Dataset:
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [_code("109102", "DCM", "Processing Equipment")]
    equipment.Manufacturer = equipment.ManufacturerModelName = "crossmr"
    equipment.SoftwareVersions = version("crossmr")
    equipment.ContributionDateTime = created.strftime("%Y%m%d%H%M%S%z")
    equipment.ContributionDescription = CONTRIBUTION
    return equipment


def _source(image: DicomImage) -> Dataset:
    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = image.sop_class, image.sop_instance
    source.PurposeOfReferenceCodeSequence = [_code("121322", "DCM", "Source image for image processing operation")]
    return source


def _nearest(sources: Mapping[str, Series], position: Any, orientation: Any) -> list[DicomImage]:
    """The image nearest to a slice of each parallel source series, and all images of any other."""
    normal = np.cross(*orientation)

    def distance(image: DicomImage) -> float:
        return float(np.abs((np.atleast_2d(image.position) - position) @ normal).min())

    images: list[DicomImage] = []
    for series in sources.values():
        parallel = abs(normal @ np.cross(*series.orientation)) > 0.9
        images += [min(series.images, key=distance)] if parallel else series.images
    return images


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _uid(name: str) -> str:
    """The UID (2.25.…) of a name: the same name always has the same."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, name).int}"


def _decimals(values: Any) -> list[Any]:
    """Decimal strings of at most 16 characters."""
    return [DSfloat(float(value), auto_format=True) for value in values]
