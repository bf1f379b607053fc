"""One file of DICOM: whether it is one, and its tags, however damaged."""

import dicoms
import pydicom
import pytest
from dicoms import OBLIQUE, edited, head, write

from crossmr.dicom.convert import convert
from crossmr.dicom.folders import holds_dicom
from crossmr.dicom.headers import dates_of, geometry_of, is_dicom, number_of, read_header, texts_of, time_of
from crossmr.dicom.series import find_series


def test_tags_of_an_image(tmp_path):
    path = dicoms.write_series(tmp_path, head(), OBLIQUE, "t2w")[0]
    assert is_dicom(path)
    header = read_header(pydicom, path)
    assert number_of(header, "EchoTime") == pydicom.dcmread(path).EchoTime
    position, orientation, spacing = geometry_of(header)
    assert (position.shape, orientation.shape, spacing.shape) == ((3,), (2, 3), (2,))
    assert read_header(pydicom, path.rename(tmp_path / "DICOMDIR")) is None


@pytest.mark.parametrize("value", [7, 1.5, [1, 2], b"x", "SK"])
def test_numbers_where_texts_belong_are_texts(value):
    class Header(dict):
        """Any value, as of a damaged VR."""

    assert all(isinstance(text, str) for text in texts_of(Header(SequenceVariant=value), "SequenceVariant"))


@pytest.mark.parametrize(
    ("tags", "time", "dates"),
    [
        ({"AcquisitionTime": "101500.25", "AcquisitionDate": "20240131"}, "101500", ("20240131", "")),
        ({"AcquisitionTime": "10:15", "SeriesDate": "2024.01.31"}, "101500", ("", "20240131")),
        ({"AcquisitionDateTime": "20240131101500-0500", "SeriesTime": "09"}, "101500", ("20240131", "")),
        ({"SeriesTime": "09", "AcquisitionDate": "unknown"}, "090000", ("", "")),
        ({"AcquisitionTime": "morning"}, "", ("", "")),
    ],
)
def test_when_an_image_was_acquired(tags, time, dates):
    header = pydicom.Dataset()
    with pydicom.config.disable_value_validation():
        for keyword, value in tags.items():
            setattr(header, keyword, value)
    assert (time_of(header), dates_of(header)) == (time, dates)


def test_a_file_without_a_preamble_that_begins_with_the_length_of_its_group(tmp_path):
    write(tmp_path, ("t1n",), habit="without preamble")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x08\x00\x00\x00\x04\x00\x00\x00\x86\x00\x00\x00" + path.read_bytes())
    assert holds_dicom(tmp_path)
    assert [series.modality for series in find_series(tmp_path)] == ["t1n"]


def test_broken_elements_are_as_good_as_missing(tmp_path):
    for path in dicoms.write_series(tmp_path / "in", head(), OBLIQUE, "t2f", description="flair"):
        content = path.read_bytes()
        for value, broken in ((b"9000", b"9e0."), (b"2500", b"2..0")):  # repetition and inversion time
            content = content.replace(value, broken, 1)
        path.write_bytes(content)
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    assert scans.series["t2f"].why == "its description"


@pytest.mark.parametrize("habit", ["plain", "implicit, no suffix, shuffled"])
def test_the_padding_of_signed_voxels(habit, tmp_path):
    def pad(image, _):
        image.PixelRepresentation, image.PixelPaddingValue = 1, -1000
        image["PixelPaddingValue"].VR = "SS"

    edited(dicoms.write_series(tmp_path, head(), OBLIQUE, habit=habit), pad)
    assert [series.padding for series in find_series(tmp_path)] == [-1000]


def test_a_class_that_is_stored_as_a_text_is_named(tmp_path):
    def as_text(image, _):
        del image.SOPClassUID
        image.add_new(0x00080016, "LO", "1.2.840.10008.5.1.4.1.1.7")

    write(tmp_path, ("t1n", "t2w"))
    edited((tmp_path / "3").iterdir(), as_text)
    _, captured = find_series(tmp_path)
    assert captured.why.startswith("of SOP class Secondary Capture Image Storage")
