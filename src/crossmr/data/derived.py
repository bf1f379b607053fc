r"""Synthetic volumes as DICOM: a derived series of MR images that any archive takes, and nobody can take for a scan.

New series and image UIDs, the study and the frame of reference of the scans; `DERIVED\SECONDARY`, a description that
starts with SYNTHETIC, and the images and the program it was made of (DICOM PS3.3 A.4, C.7.6.1, C.7.5.1). An extra.
"""

import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pydicom.config
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.valuerep import DSfloat

from crossmr.data.naming import SPOKEN
from crossmr.data.series import Plane, Series
from crossmr.data.volume import Volume, as_planes
from crossmr.errors import OutputError, VolumeError

STEPS = 10000
"""Stored values from 0 to this are 0 to 1: whole numbers, as archives like them, and a step of 1e-4."""
_SERIES_NUMBERS = 9000
"""Where the numbers of derived series begin."""

# What says whose it is, of which study, and in which coordinates: taken over from the scan.
_KEPT = (
    *("SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("PatientAge", "PatientSize", "PatientWeight", "OtherPatientIDs", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "StudyInstanceUID", "StudyID", "StudyDate", "StudyTime", "StudyDescription"),
    *("AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID", "PositionReferenceIndicator"),
    *("PatientPosition", "BodyPartExamined", "MagneticFieldStrength", "InstitutionName"),
)
_REQUIRED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"),
    *("AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator"),
)
"""Type 2: there, if need be empty."""
_MR_STORAGE = "1.2.840.10008.5.1.4.1.1.4"


def write_derived(
    folder: Path,
    array: npt.NDArray[np.float32],
    grid: Volume,
    like: Series,
    sources: Mapping[str, Series],
    *,
    modality: str,
    kind: str = "",
    description: str,
    made: datetime,
    settings: str,
) -> Path:
    """Write a volume as a folder of MR images, whole or not at all.

    Args:
        folder: becomes the series' folder; an older one of this name is replaced.
        array: (Z, Y, X) within [0, 1], on `grid`.
        grid: the volume that was converted from `like`.
        like: the series whose patient, study and frame of reference the new one shares.
        sources: modality → the series that it was synthesised from.
        modality: what it is.
        kind: 'std' for a standard deviation.
        description: how it was derived, and what to beware of.
        made: when.
        settings: what decides the voxels; the UIDs are derived from it and from the voxels, so that the same synthesis
            has the same UIDs.

    Raises:
        OutputError: the folder cannot be written. VolumeError: the scan's tags can no longer be read.
    """
    planes = as_planes(array, grid)
    stored = np.rint(np.clip(planes.pixels, 0, 1) * STEPS).astype("<u2")
    with pydicom.config.disable_value_validation():
        try:
            scan = pydicom.dcmread(like.planes[0].path, stop_before_pixels=True, force=True)
        except Exception as error:  # whatever pydicom's parsing runs into
            raise VolumeError(f"{like.name}: its DICOM tags can no longer be read ({error}).") from error
        common = _common(scan, planes.orientation, planes.spacing_mm, stored.shape[1:], made)
        identity = f"{settings} {modality} {kind} {uuid.uuid5(uuid.NAMESPACE_OID, stored.tobytes().hex())}"
        if not common.get("StudyInstanceUID"):  # removed by whoever shared the scans
            common.StudyInstanceUID = _uid(like.study)
        common.SeriesInstanceUID = _uid(f"{common.StudyInstanceUID} {identity}")
        common.SeriesNumber = (
            _SERIES_NUMBERS + 10 * (list(SPOKEN).index(modality) if modality in SPOKEN else 9) + bool(kind)
        )
        common.SeriesDescription = f"SYNTHETIC {SPOKEN.get(modality, modality)}{f' {kind}' * bool(kind)} (crossmr)"[:64]
        common.DerivationDescription = description[:1024]
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
            try:
                for index, (pixels, position) in enumerate(zip(stored, planes.positions, strict=True), 1):
                    image = FileDataset(None, {}, preamble=bytes(128))
                    image.update(common)
                    image.SOPInstanceUID = _uid(f"{common.SeriesInstanceUID} {index}")
                    image.InstanceNumber = index
                    image.ImagePositionPatient = _decimals(position)
                    image.SliceLocation = _decimals([position @ np.cross(*planes.orientation)])[0]
                    image.SourceImageSequence = [
                        _source(plane) for plane in _nearest(sources, position, planes.orientation)
                    ]
                    image.PixelData = pixels.tobytes()
                    image["PixelData"].VR = "OW"
                    image.file_meta = FileMetaDataset()
                    image.file_meta.MediaStorageSOPClassUID = _MR_STORAGE
                    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
                    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
                    image.file_meta.ImplementationClassUID = _uid("crossmr implementation")
                    image.file_meta.ImplementationVersionName = f"CROSSMR {version('crossmr')}"[:16]
                    image.save_as(temporary / f"{index:04d}.dcm", enforce_file_format=True)
                shutil.rmtree(folder, ignore_errors=True)
                os.chmod(temporary, 0o755)
                os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise OutputError(f"{folder} could not be written: {error.strerror or error}. Check free space.") from error
    return folder


def _common(
    scan: Dataset, orientation: Any, spacing_mm: Sequence[float], shape: Sequence[int], made: datetime
) -> Dataset:
    """What all images of the series share."""
    common = Dataset()
    for keyword in _KEPT:
        if keyword in scan:
            common[keyword] = scan[keyword]
    for keyword in _REQUIRED:
        if keyword not in common:
            setattr(common, keyword, "")
    if not common.get("FrameOfReferenceUID"):
        common.FrameOfReferenceUID = _uid(f"{scan.get('StudyInstanceUID')} frame of reference")
    common.SOPClassUID = _MR_STORAGE
    common.Modality = "MR"
    common.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    common.SeriesDate = common.ContentDate = common.InstanceCreationDate = made.strftime("%Y%m%d")
    common.SeriesTime = common.ContentTime = common.InstanceCreationTime = made.strftime("%H%M%S")
    common.Manufacturer = common.ManufacturerModelName = "crossmr"
    common.SoftwareVersions = version("crossmr")
    common.ContributingEquipmentSequence = [_equipment(made)]
    common.AcquisitionNumber = ""
    common.LossyImageCompression = str(scan.get("LossyImageCompression") or "00")
    common.BurnedInAnnotation = "NO"
    # nothing was acquired: research mode, and no times
    common.ScanningSequence, common.SequenceVariant = "RM", "NONE"
    common.ScanOptions = common.MRAcquisitionType = common.EchoTime = common.EchoTrainLength = ""
    common.RepetitionTime = ""
    common.BodyPartExamined = common.get("BodyPartExamined") or "BRAIN"
    slices, rows, columns = spacing_mm
    common.PixelSpacing = _decimals([rows, columns])
    common.SliceThickness = common.SpacingBetweenSlices = _decimals([slices])[0]
    common.ImageOrientationPatient = _decimals(np.ravel(orientation))
    common.SamplesPerPixel, common.PhotometricInterpretation = 1, "MONOCHROME2"
    common.Rows, common.Columns = shape
    common.BitsAllocated, common.BitsStored, common.HighBit, common.PixelRepresentation = 16, 16, 15, 0
    common.WindowCenter, common.WindowWidth = STEPS // 2, STEPS
    common.WindowCenterWidthExplanation = "SYNTHETIC"
    scale = Dataset()
    scale.LUTLabel, scale.LUTExplanation = "NORMALISED", "0 is air, 1 four times the median of the head"
    scale.RealWorldValueFirstValueMapped, scale.RealWorldValueLastValueMapped = 0, STEPS
    scale.RealWorldValueIntercept, scale.RealWorldValueSlope = 0.0, 1 / STEPS
    scale.MeasurementUnitsCodeSequence = [_code("1", "UCUM", "no units")]
    for keyword in ("RealWorldValueFirstValueMapped", "RealWorldValueLastValueMapped"):
        scale[keyword].VR = "US"
    common.RealWorldValueMappingSequence = [scale]
    return common


def _equipment(made: datetime) -> Dataset:
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [_code("109102", "DCM", "Processing Equipment")]
    equipment.Manufacturer = equipment.ManufacturerModelName = "crossmr"
    equipment.SoftwareVersions = version("crossmr")
    equipment.ContributionDateTime = made.strftime("%Y%m%d%H%M%S")
    equipment.ContributionDescription = "Synthesis of an MR contrast that was not acquired; research use only"
    return equipment


def _source(plane: Plane) -> Dataset:
    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = plane.sop_class, plane.sop_instance
    source.PurposeOfReferenceCodeSequence = [_code("121322", "DCM", "Source image for image processing operation")]
    return source


def _nearest(sources: Mapping[str, Series], position: Any, orientation: Any) -> list[Plane]:
    """Of each parallel source series the image nearest to a slice, of any other all images."""
    normal = np.cross(*orientation)

    def distance(plane: Plane) -> float:
        return float(np.abs((np.atleast_2d(plane.position) - position) @ normal).min())

    planes: list[Plane] = []
    for series in sources.values():
        parallel = abs(normal @ np.cross(*series.orientation)) > 0.9
        planes += [min(series.planes, key=distance)] if parallel else series.planes
    return planes


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _uid(name: str) -> str:
    """A UID (2.25.…) that a name always leads to."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, name).int}"


def _decimals(values: Any) -> list[Any]:
    """Decimal strings of at most 16 characters."""
    return [DSfloat(float(value), auto_format=True) for value in values]
