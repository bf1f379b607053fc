"""DICOM in: every habit gives the same voxels in the same place; what is no scan of ours is left out and named."""

import errno
import os
import shutil

import conftest
import dicoms
import numpy as np
import pydicom
import pytest
from conftest import judge
from dicoms import OBLIQUE, SAGITTAL, head, truth, write
from typer.testing import CliRunner

import crossmr.dicom.converter as converting
from crossmr.cli import app
from crossmr.data.naming import find_studies
from crossmr.data.volume import read_volume, same_grid
from crossmr.dicom.convert import convert
from crossmr.dicom.folders import holds_dicom
from crossmr.display import Display
from crossmr.errors import CrossmrError, NamingError, OutputError
from crossmr.parts import WORK, Part


@pytest.mark.parametrize("habit", dicoms.HABITS)
@pytest.mark.parametrize("affine", [OBLIQUE, SAGITTAL], ids=["oblique", "sagittal"])
def test_every_habit_gives_the_same_volumes(habit, affine, tmp_path):
    if needed := dicoms.DCMTK.get(dicoms.HABITS[habit].syntax):
        judge("dcmtk", needed[0])
    write(tmp_path / "in", habit=habit, affine=affine)
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    assert not scans.refused
    assert not scans.left_out
    (study,) = find_studies(tmp_path / "out")
    assert list(study.images()) == ["t1n", "t1c", "t2w", "t2f"]
    for modality, path in study.images().items():
        volume = read_volume(path)
        wanted = truth(modality, affine)
        assert same_grid(volume, wanted)
        np.testing.assert_array_equal(volume.data, wanted.data)


def test_a_mixed_export_is_sorted(tmp_path):
    folder = tmp_path / "in"
    write(folder, ("t1n", "t2f"))
    write(folder / "another patient", ("t2w",), patient="MRN-1")
    three = np.ones((32, 32, 3), int)
    dicoms.write_series(folder, three, OBLIQUE, number=1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    dicoms.write_series(folder, three, OBLIQUE, number=9, habit=dicoms.Habit(name="few{0}"))
    diffusion = {"ScanningSequence": "EP", "SequenceVariant": "SK", "RepetitionTime": 6000, "EchoTime": 90}
    dicoms.write_series(folder / "dwi", head(), OBLIQUE, "dwi", number=8, **diffusion)
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (folder / "read me.txt").write_text("no image")
    (folder / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"\x08\x00")
    shutil.copy(next((folder / "2").iterdir()), folder / "the same image again.dcm")
    scans = {s.case: s for s in convert(folder, tmp_path / "out")}
    assert len(scans) == 2
    other, one = sorted(scans.values(), key=lambda s: len(s.series))
    assert list(other.series) == ["t2w"]
    assert list(one.series) == ["t1n", "t2f"]
    assert one.left_out == {
        "series 1": "a localiser",
        "series 9": "3 slices only",
        "series 8": "echo-planar: diffusion, perfusion or function",
    }


def test_names_are_left_out_unless_kept(tmp_path):
    write(tmp_path / "in", ("t1n", "t2f"), description="Doe private")
    convert(tmp_path / "in", tmp_path / "out")
    everything = b"".join(p.name.encode() + p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    for secret in (b"Doe", b"MRN", b"0042", b"20240131", b"19700101", b"Roe", b"A123", b"2.25."):
        assert secret not in everything
    (kept,) = convert(tmp_path / "in", tmp_path / "kept", keep_names=True)
    assert kept.case == "sub-MRN0042_ses-20240131"
    assert "Doe private" in (tmp_path / "kept" / kept.case / "series.json").read_text()


def test_visits_of_one_patient_share_the_subject(tmp_path):
    write(tmp_path / "in" / "a", ("t1n",), date="20230101")
    write(tmp_path / "in" / "b", ("t1n",), date="20240101")
    first, second = (scans.case for scans in convert(tmp_path / "in", tmp_path / "out"))
    assert first != second
    assert first.split("_")[0] == second.split("_")[0]
    assert len({study.patient for study in find_studies(tmp_path / "out")}) == 1


def test_map_names_series_by_their_descriptions(tmp_path):
    for number, description in enumerate(("mine a", "mine b", "no"), 1):
        dicoms.write_series(tmp_path / str(number), head(), OBLIQUE, "?", number=number, description=description)
    (scans,) = convert(tmp_path, tmp_path / "out", mapping={"T1CE": "*none|*a", "swi": "* b"})
    assert {m: s.number for m, s in scans.series.items()} == {"t1c": 1, "swi": 2}
    assert "tell its contrast" in scans.left_out["series 3"]


def test_map_names_series_by_their_numbers(tmp_path):
    """As `--dry-run` names them: two may share a description."""
    for number in (1, 2, 12):
        dicoms.write_series(tmp_path / str(number), head(), OBLIQUE, "?", number=number, description="same")
    (scans,) = convert(tmp_path, tmp_path / "out", mapping={"t1n": "series 1", "t2f": "series 2"})
    assert {m: s.number for m, s in scans.series.items()} == {"t1n": 1, "t2f": 2}


def test_map_that_matches_no_series_of_a_study_takes_nothing_from_it(tmp_path, capsys):
    """As of a cohort of several vendors, or a slip: what was acquired is never synthesised instead."""
    write(tmp_path / "in" / "one", ("t1n", "t2f"))
    given = {"t1n": "*MPRAGE*|*bravo*", "t2f": "*dark*"}
    dicoms.write_series(tmp_path / "in" / "two", head(), OBLIQUE, patient="Two", description="Ax BRAVO")
    both = convert(tmp_path / "in", tmp_path / "out", mapping=given, display=Display())
    assert sorted(sorted(scans.series) for scans in both) == [["t1n"], ["t1n", "t2f"]]
    told = capsys.readouterr().out
    assert "--map t1n='*MPRAGE*' matches no series; they go by their tags and descriptions." in told
    assert "--map t2f='*dark*' matches no series" in told
    assert "bravo" not in told


def test_a_series_that_map_names_twice_is_left_out(tmp_path):
    write(tmp_path / "in", ("t1n", "t2f"))
    (scans,) = convert(tmp_path / "in", tmp_path / "out", mapping={"t1n": "series 2", "t1c": "Series 2"})
    assert "t1n" not in scans.series
    assert "named t1n and t1c by --map; name it once" in [*scans.left_out.values()]


def test_map_leaves_the_rest_to_recognition_and_what_was_taken_before_goes(tmp_path):
    write(tmp_path / "in", ("t1n", "t2f"))
    dicoms.write_series(tmp_path / "in" / "9", head(), OBLIQUE, number=9, description="late")
    (before,) = convert(tmp_path / "in", tmp_path / "out")
    assert set(before.series) == {"t1n", "t2f"}
    (scans,) = convert(tmp_path / "in", tmp_path / "out", mapping={"t1c": "late"})
    assert {m: s.number for m, s in scans.series.items()}["t1c"] == 9
    assert set(scans.series) == {"t1n", "t1c", "t2f"}
    convert(tmp_path / "in", tmp_path / "out", mapping={"swi": "*"})
    assert [p.name for p in (tmp_path / "out").rglob("*.nii.gz")] == [f"{scans.case}-swi.nii.gz"]


def test_missing_slices_are_named(tmp_path):
    write(tmp_path / "in", ("t1n", "t2f"))
    (tmp_path / "in" / "3" / "IM3009.dcm").unlink()
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    assert list(scans.series) == ["t1n"]
    assert "14.00 mm between the 9th and the next of 23: some are missing" in scans.left_out["series 3"]


def test_two_echoes_are_two_contrasts(tmp_path):
    for echo, time in ((1, 15), (2, 95)):
        tags = dicoms.TIMING["t2w"] | {"EchoTime": time, "EchoNumbers": echo}
        habit = dicoms.Habit(name=f"e{echo}-{{0}}")
        for path in dicoms.write_series(tmp_path, head(), OBLIQUE, "t2w", habit=habit, **tags):
            image = pydicom.dcmread(path)
            image.SOPInstanceUID = dicoms.uid(image.SOPInstanceUID, echo)
            image.save_as(path)
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert list(scans.series) == ["t2w", "pdw"]


def test_done_once_and_again_when_the_series_change(tmp_path):
    write(tmp_path / "in", ("t1n",))
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "out" / scans.case / f"{scans.case}-t1n.nii.gz"
    first, before = path.read_bytes(), path.stat().st_mtime_ns
    convert(tmp_path / "in", tmp_path / "out")
    assert path.stat().st_mtime_ns == before
    dicoms.write_series(tmp_path / "in" / "new", head("t2f"), OBLIQUE, "t2f", number=7)
    convert(tmp_path / "in", tmp_path / "out")
    assert path.stat().st_mtime_ns != before
    assert path.read_bytes() == first


def test_what_lies_beside_the_images_stays_and_what_has_their_names_is_refused(tmp_path):
    write(tmp_path / "in", ("t1n",))
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    place = tmp_path / "out" / scans.case
    mine = [place / f"{scans.case}-{name}.nii.gz" for name in ("brainmask", "swi", "seg")]
    for path in mine:
        path.write_text("mine")
    convert(tmp_path / "in", tmp_path / "out", mapping={"t2w": "*"})  # t1n is ours, and goes
    assert {path.name for path in place.iterdir()} == {
        f"{scans.case}-t2w.nii.gz", "series.json", *(path.name for path in mine)
    }  # fmt: skip
    for spoiled in (mine[1], place / f"{scans.case}-t2w.nii.gz"):
        if spoiled not in mine:
            spoiled.unlink()
            spoiled.symlink_to(mine[0])
        before = conftest.tree(tmp_path / "out")
        with pytest.raises(OutputError, match=rf"{spoiled.name} is not crossmr's, .*Name another folder"):
            convert(tmp_path / "in", tmp_path / "out", mapping={"swi": "*"})
        assert conftest.tree(tmp_path / "out") == before
        mine[1].unlink(missing_ok=True)


def test_a_conversion_that_was_killed_goes_on(tmp_path, monkeypatch):
    def kill(*_, **__):
        raise KeyboardInterrupt

    write(tmp_path / "in", ("t1n", "t2f"))
    convert(tmp_path / "in", tmp_path / "whole")
    (series,) = (tmp_path / "whole").rglob("series.json")
    for name in ("write_volume", "read_volume"):
        monkeypatch.setattr(converting, name, kill)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "in", tmp_path / "out")
    monkeypatch.undo()
    begun = tmp_path / "out" / series.parent.name
    (begun / f"{begun.name}-t1n.nii.gz").write_text("half")  # listed, therefore ours
    convert(tmp_path / "in", tmp_path / "out")
    assert conftest.tree(tmp_path / "out") == conftest.tree(tmp_path / "whole")


def test_bad_folders(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert not holds_dicom(tmp_path)
    with pytest.raises(NamingError, match="no MR image"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(NamingError, match="is a file"):
        convert(tmp_path / "a.txt", tmp_path / "out")
    write(tmp_path / "in", ("t1n",))
    assert holds_dicom(tmp_path / "in")
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out" / scans.case / "series.json").write_text('{"format": "other"}')
    with pytest.raises(OutputError, match="not crossmr's"):
        convert(tmp_path / "in", tmp_path / "out")


def test_the_verb_says_what_it_took_and_other_verbs_name_it(tmp_path):
    write(tmp_path / "in", ("t1n", "t2f"))
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "in"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "series 2 is t1n (SE, TR 550 ms, TE 12 ms; no contrast agent named)" in result.output
    refused = CliRunner().invoke(app, ["prepare", str(tmp_path / "in"), "-o", str(tmp_path / "set")])
    assert isinstance(refused.exception, CrossmrError)
    assert "crossmr convert" in str(refused.exception)


def test_patients_without_uids_are_not_mixed(tmp_path):
    for patient in ("a", "b"):
        for path in dicoms.write_series(tmp_path / "in" / patient, head(), OBLIQUE, "t1n", patient=patient):
            image = pydicom.dcmread(path)
            del image.StudyInstanceUID, image.PatientID
            image.save_as(path)
    assert len(convert(tmp_path / "in", tmp_path / "out")) == 2


def test_the_output_may_lie_within_the_input(tmp_path):
    write(tmp_path, ("t1n", "t2f"))
    first = convert(tmp_path, tmp_path / "out")
    assert holds_dicom(tmp_path, exclude=tmp_path / "out")
    assert holds_dicom(tmp_path)  # what was converted from it does not hide it
    assert [s.case for s in convert(tmp_path, tmp_path / "out")] == [s.case for s in first]


# Parts


def test_parts_convert_what_one_process_converts(tmp_path):
    for number in range(3):
        write(tmp_path / "in" / "export" / f"p{number}", ("t1n", "t2f"), patient=f"MRN-{number}")
    (tmp_path / "in" / "export" / "empty").mkdir()
    convert(tmp_path / "in", tmp_path / "alone")
    first = convert(tmp_path / "in", tmp_path / "out", part=Part(1, 2))
    assert (tmp_path / "out" / WORK).exists()
    second = convert(tmp_path / "in", tmp_path / "out", part=Part(2, 2))
    assert len(first) + len(second) == 3
    assert not any(one.refused for one in (*first, *second))
    assert conftest.tree(tmp_path / "out") == conftest.tree(tmp_path / "alone")
    assert [one.case for one in convert(tmp_path / "in", tmp_path / "out", part=Part(1, 1))] == sorted(
        path.name for path in (tmp_path / "out").iterdir() if path.is_dir()
    )


def test_a_patient_in_two_parts_is_refused_by_the_second(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / "in" / folder, ("t1n",) if folder == "a" else ("t2f",))
    (first,) = convert(tmp_path / "in", tmp_path / "out", part=Part(1, 2))
    assert not first.refused
    (second,) = convert(tmp_path / "in", tmp_path / "out", part=Part(2, 2))
    assert "its patient lies in several folders of" in second.refused
    assert "of part 1/2 and of 2/2" in second.refused


def test_a_part_with_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    for patient in ("a", "b"):
        write(tmp_path / "in" / patient, ("t1n",), patient=patient)
    (tmp_path / "in" / "b" / "old").mkdir()
    scandir = os.scandir

    def refuse(place):
        if str(place).endswith("old"):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(NamingError, match=r"b.old: cannot be listed \(Permission denied\)"):
        convert(tmp_path / "in", tmp_path / "out", part=Part(1, 1))


def test_another_patient_of_the_same_kept_name_replaces_nobody(tmp_path):
    for patient in ("PID1", "PID-1"):
        write(tmp_path / patient, ("t1n",), patient=patient)
    (first,) = convert(tmp_path / "PID1", tmp_path / "out", keep_names=True)
    before = conftest.tree(tmp_path / "out")
    (second,) = convert(tmp_path / "PID-1", tmp_path / "out", keep_names=True)
    assert (first.case, first.refused, second.case) == (second.case, "", first.case)
    assert "was converted from other images. Delete it, or name another folder" in second.refused
    assert conftest.tree(tmp_path / "out") == before
    (again,) = convert(tmp_path / "PID1", tmp_path / "out", keep_names=True, mapping={"t2w": "*"})
    assert [*again.series] == ["t2w"]  # the same images under another name


def test_parts_pass_over_a_link_in_a_circle_and_need_no_file_system_with_links(tmp_path, monkeypatch):
    write(tmp_path / "in" / "a", ("t1n",), patient="A")
    write(tmp_path / "in" / "b", ("t1n",), patient="B")
    (tmp_path / "in" / "circle").symlink_to("circle")

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", unsupported)
    found = [one for k in (1, 2) for one in convert(tmp_path / "in", tmp_path / "out", part=Part(k, 2))]
    assert [one.refused for one in found] == ["", ""]
