"""One file of DICOM: whether it is one, its tags, and where its image lies. Read by pydicom.

pydicom is an extra (`pip install crossmr[dicom]`).
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossmr.errors import ConfigError, NamingError
from crossmr.files import walk

Floats = npt.NDArray[np.float64]
File = tuple[Path, Any]
"""A path and its tags."""
_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID", "StudyDate"),
    *("Modality", "ImageType", "SeriesNumber", "SeriesDescription", "ProtocolName", "AcquisitionTime", "SeriesTime"),
    *("ScanningSequence", "SequenceVariant", "RepetitionTime", "EchoTime", "InversionTime", "AngioFlag"),
    *("ContrastBolusAgent", "ContrastBolusAgentSequence", "ContrastBolusVolume", "AcquisitionContrast"),
    *("DiffusionBValue", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns"),
    *("NumberOfFrames", "EchoPulseSequence", "InversionRecovery", "SamplesPerPixel", "ManufacturerModelName"),
    *("PatientName", "FrameOfReferenceUID", "BodyPartExamined", "NumberOfTemporalPositions", "ContrastBolusStartTime"),
    *("PhaseContrast", "TimeOfFlightContrast", "EchoPlanarPulseSequence", "PatientBirthDate"),
    *("FlipAngle", "PhotometricInterpretation", "PixelPaddingValue", "PixelRepresentation", "RescaleSlope"),
    *("AcquisitionDate", "SeriesDate", "AcquisitionDateTime", "AcquisitionNumber", "ImagesInAcquisition"),
    *("RescaleIntercept", "DerivationDescription", "ContributingEquipmentSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
_PRIVATE = {
    "GEMS_RELA_01": (0x00210010, 0x0021104F),  # locations in acquisition
    "Philips Imaging DD 001": (0x20010010, 0x20011018),  # number of slices
}
"""Creator of private tags → its place, and that of the number of slices."""
_PRIVATE_TAGS = [tag for tags in _PRIVATE.values() for tag in tags]
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
"""Of an image."""
CONTRIBUTION = "Synthesis of an MR contrast that was not acquired; research use only"
"""Contribution Description of the images that crossmr makes."""
MR = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.4",  # MR
        "1.2.840.10008.5.1.4.1.1.4.1",  # enhanced MR
        "1.2.840.10008.5.1.4.1.1.4.4",  # legacy converted enhanced MR
    }
)
"""SOP classes."""
NO_SCANS = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.4.2",  # spectroscopy
        "1.2.840.10008.5.1.4.1.1.30",  # parametric map
        "1.2.840.10008.5.1.4.1.1.66",  # raw data
        "1.2.840.10008.5.1.4.1.1.66.4",  # segmentation
        "1.2.840.10008.5.1.4.1.1.66.7",  # label map
        "1.2.840.10008.5.1.4.1.1.481.2",  # radiation dose
        "1.3.12.2.1107.5.9.1",  # what Siemens stores beside its images
    }
)
"""SOP classes of what has rows and columns, and never is a scan."""
_ENHANCED = MR - {"1.2.840.10008.5.1.4.1.1.4"}
_WITHOUT_PREAMBLE = (
    *(b"\x08\x00\x05\x00", b"\x08\x00\x08\x00", b"\x02\x00\x00\x00"),
    *(b"\x08\x00\x00\x00UL\x04\x00", b"\x08\x00\x00\x00\x04\x00\x00\x00"),
)
"""How files without a preamble begin: a first element of group 0002 or 0008, or the length of the latter."""


def files_in(folder: Path, exclude: Path | None = None) -> Iterator[Path]:
    """Every file under a folder that is neither hidden nor below `exclude`; sorted, links followed."""
    root = Path(os.path.abspath(folder))
    if os.path.isfile(root):
        raise NamingError(f"{folder}: is a file, not a folder: give the folder that holds it.")
    for place, folders, files in walk(root) if os.path.isdir(root) else ():
        folders[:] = [f for f in folders if exclude is None or os.path.join(place, f) != os.path.abspath(exclude)]
        yield from (Path(place, name) for name in files)


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does."""
    try:
        with path.open("rb") as file:
            return begins_as_dicom(file.read(132))
    except OSError:
        return False


def begins_as_dicom(start: bytes) -> bool:
    """Whether the first 132 bytes of a file are as DICOM's, with a preamble or without."""
    return start[128:132] == b"DICM" or (len(start) > 8 and start.startswith(_WITHOUT_PREAMBLE))


def read_header(pydicom: Any, path: Path) -> Any:
    """A file's tags, or None where it is no DICOM image."""
    if path.name.upper() == "DICOMDIR" or not is_dicom(path):
        return None
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=[*_TAGS, *_PRIVATE_TAGS])
        _drop_broken(header)
        uids = header.get("SOPClassUID"), header.get("SOPInstanceUID")  # several in one element are none
        return header if all(uid and isinstance(uid, str) for uid in uids) else None
    except Exception:  # pydicom raises whatever its parsing runs into
        return None


def why_not_read(header: Any) -> str:
    """What else an image is than an MR image, by its SOP class and its modality; '' for one that is read."""
    modality = text_of(header, "Modality") or "MR"
    if header.SOPClassUID not in MR:
        name = import_pydicom().uid.UID(str(header.SOPClassUID)).name  # a wrong VR makes a text of it
        return f"of SOP class {name}, which is not read"
    return "" if modality == "MR" else f"of modality {modality}, which is not read"


def may_be_scan(header: Any) -> bool:
    """Whether an image that is not read may have been acquired by MR all the same, by its SOP class and modality."""
    return header.SOPClassUID not in NO_SCANS and text_of(header, "Modality") in ("", "MR", "OT", "SC")


def _drop_broken(item: Any) -> None:
    """Delete elements whose values cannot be parsed; pydicom parses them only when they are read."""
    for tag in list(item.keys()):
        try:
            element = item[tag]
            if element.VR == "SQ":
                for nested in element.value:
                    _drop_broken(nested)
        except Exception:  # whatever pydicom's parsing runs into
            del item[tag]


def find(item: Any, keyword: str) -> Any:
    """The value of a tag in the image, or in the functional groups that are shared or of its first frame."""
    if keyword in item and item.get(keyword) not in (None, ""):
        return item.get(keyword)
    for element in item:
        if element.VR == "SQ" and element.value and element.keyword != "ReferencedImageSequence":
            value = find(element.value[0], keyword)
            if value is not None:
                return value
    return None


def number_of(item: Any, keyword: str) -> float | None:
    """The value of a tag as a finite number, the first of several; None where it is none."""
    try:
        value = find(item, keyword)
        number = float(value[0] if isinstance(value, (list, tuple)) or hasattr(value, "append") else value)
    except (TypeError, ValueError, IndexError):
        return None
    return number if np.isfinite(number) else None


def announced_slices(header: Any) -> int | None:
    """The number of slices that a private tag of the scanner announces; None where there is none."""
    for creator, (place, tag) in _PRIVATE.items():
        if place in header and str(header[place].value).strip() == creator and tag in header:
            value = header[tag].value
            if isinstance(value, bytes) and len(value) in (2, 4):  # of unknown type, as where it was not told
                value = int.from_bytes(value, "little")
            if isinstance(value, int) and value > 0:
                return int(value)
    return None


def _numbers(value: Any) -> Floats:
    try:
        return np.atleast_1d(np.array(value, dtype=np.float64)) if value is not None else np.zeros(0)
    except (TypeError, ValueError):
        return np.zeros(0)


def texts_of(item: Any, keyword: str) -> list[str]:
    """The values of a tag; none where it is missing."""
    value = find(item, keyword)
    if value is None:
        return []
    several = not isinstance(value, str) and hasattr(value, "__iter__")  # a damaged VR makes numbers of texts
    return [str(part).strip() for part in (value if several else [value])]


def text_of(header: Any, keyword: str) -> str:
    """The value of a tag of the image itself; '' where it is missing."""
    return str(header.get(keyword) or "").strip()


def time_of(header: Any) -> str:
    """When it was acquired, HHMMSS, or else its series; '' where neither is told."""
    return _time(text_of(header, "AcquisitionTime")) or _moment(header)[8:] or _time(text_of(header, "SeriesTime"))


def dates_of(header: Any) -> tuple[str, str]:
    """The dates of its acquisition and of its series, YYYYMMDD; '' where they are not told."""
    acquired, series = (_date(text_of(header, keyword)) for keyword in ("AcquisitionDate", "SeriesDate"))
    return acquired or _moment(header)[:8], series


def _moment(header: Any) -> str:
    """When an enhanced image was acquired, YYYYMMDDHHMMSS, without its zone; '' where it is not told."""
    text = str(find(header, "AcquisitionDateTime") or find(header, "FrameAcquisitionDateTime") or "")
    digits = re.split(r"[-+.]", text.strip())[0]
    return digits if re.fullmatch(r"\d{14}", digits) else ""


def _date(text: str) -> str:
    """YYYYMMDD of a date, also one with points or hyphens; '' where it is none."""
    digits = re.sub(r"[-./]", "", text)
    return digits if re.fullmatch(r"\d{8}", digits) else ""


def _time(text: str) -> str:
    """HHMMSS of a time, also one with colons, or without seconds or minutes; '' where it is none."""
    digits = text.replace(":", "").partition(".")[0]
    return digits.ljust(6, "0") if re.fullmatch(r"(\d\d){1,3}", digits) else ""


def description_of(header: Any) -> str:
    """How its series is described, or else its protocol is called."""
    return str(header.get("SeriesDescription") or header.get("ProtocolName") or "")


def names_crossmr(header: Any) -> bool:
    """Whether crossmr made an image, by any tag that says so: de-identification may have emptied the others."""
    items = [header, *(header.get("ContributingEquipmentSequence") or [])]
    tags = ("Manufacturer", "ManufacturerModelName", "ImageType", "DerivationDescription", "ContributionDescription")
    told = [text for item in items for tag in tags for text in texts_of(item, tag)]
    if "(CROSSMR)" in text_of(header, "SeriesDescription").upper():
        return True
    return any("CROSSMR" in text.upper() or text.startswith(CONTRIBUTION[:40]) for text in told)


def is_enhanced(header: Any) -> bool:
    """Whether one file holds a volume of several frames ('enhanced' as DICOM has it, of any contrast)."""
    return header.SOPClassUID in _ENHANCED


def geometry_of(image: Any) -> tuple[Floats, Floats, Floats]:
    """Position (3,), or (F, 3) of an enhanced image, orientation (2, 3) and pixel spacing (2,); empty where missing."""
    nothing = np.zeros(0)
    orientation = _numbers(find(image, "ImageOrientationPatient"))
    spacing = _numbers(find(image, "PixelSpacing"))
    frames = image.get("PerFrameFunctionalGroupsSequence") or [image]
    positions = [_numbers(find(frame, "ImagePositionPatient")) for frame in frames]
    if len(orientation) != 6 or len(spacing) != 2 or any(len(p) != 3 for p in positions):
        return nothing, nothing, nothing
    position = np.stack(positions) if is_enhanced(image) else positions[0]
    return position, orientation.reshape(2, 3), spacing


def place_of(header: Any) -> str:
    """Position to a hundredth of a mm, and direction; '' where they are missing."""
    position, orientation, _ = geometry_of(header)
    return (
        str((np.round([*np.atleast_2d(position)[0], *orientation.ravel()], 2) + 0.0).tolist()) if len(position) else ""
    )


def import_pydicom() -> Any:
    """The module pydicom, or a ConfigError that says how to install it."""
    try:
        import pydicom
        import pydicom.config
    except ImportError as error:
        raise ConfigError(
            "DICOM needs pydicom and dcm2niix. Install them with: pip install 'crossmr[dicom]'"
        ) from error
    return pydicom
