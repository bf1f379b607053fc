"""A cohort becomes a prepared set: complete, repeatable, and nobody else's files are touched."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import Listener, ellipsoid, header_alone, image, make_head, write_study

import crossmr.data.prepare as module
import crossmr.data.prepared_case as case_module
from crossmr.data.dataset import PreparedDataset
from crossmr.data.formats import content_sha256
from crossmr.data.head import DARKEST
from crossmr.data.naming import find_studies
from crossmr.data.patients import SPLITS
from crossmr.data.prepare import (
    PrepareSettings,
    default_workers,
    lesions_in_words,
    prepare,
    prepare_case,
)
from crossmr.data.split import Split
from crossmr.data.study import load_study, study_memory
from crossmr.display import Display
from crossmr.errors import ConfigError, NamingError, OutputError, SetError
from crossmr.files import digest, read_json

SCANS = Path(__file__).parents[2] / "shared" / "data"
CASES = ["P-00001-000", "P-00002-000", "P-00002-001", "P-00003-000"]


def listening(said):
    """A display that shows nothing, and adds each line to a list."""
    display = Display(quiet=True, keep=False)
    display.say = said.append
    return display


def write_cohort(folder: Path) -> Path:
    """Three patients, one of them seen twice, one with a lesion, one without t1c, one stripped."""
    write_study(folder, CASES[0], lesion=True)
    write_study(folder, CASES[1], seed=1)
    write_study(folder, CASES[2], seed=2, air=False)
    write_study(folder, CASES[3], ("t1n", "t2f"), seed=3)
    return folder


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    return write_cohort(tmp_path / "cohort")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """Changes where a file is written anew, even with the same content."""
    files = (p for p in sorted(folder.rglob("*.npy")))
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def rewritten(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> set[str]:
    """The cases with a file that is not what it was."""
    return {name.split("/")[1] for name in before | after if before.get(name) != after.get(name)}


def arrays(folder: Path, case: str) -> tuple[np.ndarray, np.ndarray]:
    images, masks = (np.load(folder / "cases" / case / f"{name}.npy") for name in ("images", "masks"))
    return images, masks


# --------------------------------------------------------------------------------------------- contents


def test_the_manifest_is_complete(cohort, tmp_path):
    body = prepare(cohort, tmp_path / "set")
    manifest = read_json(tmp_path / "set" / "manifest.json")
    assert manifest.pop("sha256") == digest(manifest)
    assert manifest == body
    assert (manifest["format"], manifest["format_version"]) == ("crossmr-set", 4)
    assert (
        "5 robust standard deviations (quartile range / 1.349) below each volume's median" in manifest["normalisation"]
    )
    assert manifest["refused"] == []
    assert list(manifest["cases"]) == CASES
    fingerprint = manifest["fingerprint"]
    assert (fingerprint["studies"], fingerprint["patients"]) == (4, 3)
    assert fingerprint["modalities"] == {"t1c": 3, "t1n": 4, "t2f": 4}
    assert fingerprint["patterns"] == {"t1n+t1c+t2f": 3, "t1n+t2f": 1}
    assert fingerprint["shape_zyx"] == {"min": [24, 32, 28], "max": [24, 32, 28]}
    assert fingerprint["spacing_mm_zyx"]["median"] == [7, 6, 6]
    assert (fingerprint["masked_background"], fingerprint["labelled"]) == (1, 1)
    assert fingerprint["label_values"] == [3]
    head, lesion = (sum(manifest["cases"][CASES[0]][name]) for name in ("head_voxels", "lesion_voxels"))
    assert fingerprint["lesion_share"] == pytest.approx(lesion / head, abs=1e-6)
    assert lesions_in_words(fingerprint) == f"of 1 of 4 studies, values 3, median {lesion / head:.2%} of the head"
    assert lesions_in_words({"labelled": 0}) == "of no study"
    earlier = {"labelled": 1, "studies": 4, "label_values": [], "lesion_share": 0.01}  # records without label_values
    assert lesions_in_words(earlier) == "of 1 of 4 studies, median 1.00% of the head"
    assert 0.15 < fingerprint["intensity"]["t1n"]["mean"] < 0.5
    patients = {"P-00001", "P-00002", "P-00003"}
    assert set().union(*(manifest["split"][name] for name in SPLITS)) == patients
    for name, case in manifest["cases"].items():
        assert case["patient"] in manifest["split"][case["part"]]
        assert case["patient"] == name[:-4]
        folder = tmp_path / "set" / "cases" / name
        assert read_json(folder / "case.json") == {k: v for k, v in case.items() if k not in ("part", "patient")}
        assert case["files"] == {f: content_sha256(folder / f) for f in ("images.npy", "masks.npy")}
        assert case["inputs"] == {
            path.name: content_sha256(path) for path in (cohort / name).iterdir() if "-seg" not in path.name
        }
        images, masks = arrays(tmp_path / "set", name)
        assert case["head_voxels"] == masks[:, 0].sum((1, 2)).tolist()
        assert case["lesion_voxels"] == ((masks[:, 1] > 0).sum((1, 2)).tolist() if case["labelled"] else [])
        inside = images[:, 0][masks[:, 0] > 0].astype(np.float64)
        assert case["statistics"]["t1n"]["mean"] == pytest.approx(inside.mean(), abs=1e-4)
        assert case["statistics"]["t1n"]["std"] == pytest.approx(inside.std(), abs=1e-4)


def test_the_arrays_are_the_normalised_crop(cohort, tmp_path):
    manifest = prepare(cohort, tmp_path / "set")
    for files in find_studies(cohort):
        study, case = load_study(files), manifest["cases"][files.case]
        images, masks = arrays(tmp_path / "set", files.case)
        assert (images.dtype, masks.dtype) == (np.float16, np.uint8)
        box = tuple(slice(*ends) for ends in case["box"])
        assert box == study.box(4)
        assert images.shape[1] == len(case["modalities"]) == len(study.volumes)
        for channel, modality in enumerate(case["modalities"]):
            error = images[:, channel].astype(np.float64) - study.normalised(modality)[box]
            assert np.abs(error).max() <= 2**-12  # half a step of float16 below 1
            there = study.mask[box]
            np.testing.assert_array_equal(images[:, channel] > 0, there)  # float16 keeps the darkest voxels above 0
            assert images[:, channel][there].min() >= DARKEST
        np.testing.assert_array_equal(masks[:, 0], study.mask[box])
        assert masks[:, 0].sum() == study.mask.sum()  # nothing of the head is cropped away
        assert case["normalisation"] == {m: asdict(n) for m, n in study.normalisation.items()}
        if study.labels is None:
            assert not masks[:, 1].any()
        else:
            np.testing.assert_array_equal(masks[:, 1], study.labels[box])
            assert (masks[:, 1] == 3).sum() == 4 * 4 * 3
    assert [c for c in CASES if manifest["cases"][c]["labelled"]] == CASES[:1]
    assert [c for c in CASES if manifest["cases"][c]["masked_background"]] == CASES[2:3]


def test_a_patient_who_lacks_a_modality_is_kept(cohort, tmp_path):
    manifest = prepare(cohort, tmp_path / "set")
    assert manifest["cases"][CASES[3]]["modalities"] == ["t1n", "t2f"]
    images, _ = arrays(tmp_path / "set", CASES[3])
    assert images.shape[1] == 2


def test_what_is_refused_is_listed_while_the_others_go_on(cohort, tmp_path):
    flat = np.zeros((28, 32, 24), np.float32)
    write_study(cohort, "P-00000-000", replace={"t2f": flat})
    write_study(cohort, "P-00009-000", replace={"t2f": make_head("t2f")[1:]})
    (cohort / "P-00004-000").mkdir()
    (cohort / "P-00004-000" / "P-00004-000-t1n.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    manifest = prepare(cohort, tmp_path / "set")
    assert list(manifest["cases"]) == CASES
    reasons = {refusal["case"]: refusal["reason"] for refusal in manifest["refused"]}
    assert list(reasons) == ["P-00000-000", "P-00004-000", "P-00009-000"]
    assert "t2f is all zero" in reasons["P-00000-000"]
    assert "is a link to a file that is not there" in reasons["P-00004-000"]
    assert "27×32×24" in reasons["P-00009-000"]
    for case, reason in reasons.items():
        assert reason.startswith(f"{case}: ")
        assert not (tmp_path / "set" / "cases" / case).exists()


def test_nothing_prepared_is_an_error(tmp_path):
    write_study(tmp_path / "cohort", "P1", replace={"t2f": np.zeros((28, 32, 24), np.float32)})
    with pytest.raises(SetError, match=r"None of the 1 studies.*P1: t2f is all zero"):
        prepare(tmp_path / "cohort", tmp_path / "set")
    assert not (tmp_path / "set").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(NamingError, match=r"no volume"):
        prepare(tmp_path / "empty", tmp_path / "set")


def test_several_cohorts_make_one_set(tmp_path):
    write_study(tmp_path / "a", "A1")
    write_study(tmp_path / "b", "B1", ("t2w",))
    manifest = prepare([tmp_path / "a", str(tmp_path / "b")], tmp_path / "set")
    assert list(manifest["cases"]) == ["A1", "B1"]
    write_study(tmp_path / "b", "A1", ("t2w",))
    before = tree(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"share study names \(A1\)"):
        prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "set")
    assert tree(tmp_path / "set") == before


@pytest.mark.parametrize("folder", ["{}/{}/", "{}/", "{}/{}/{}_"])
def test_cohorts_that_share_names_are_one_set_by_the_folder_above(tmp_path, folder):
    """The remedy of the message, for names of folders, of files, and of both."""
    cohorts = [tmp_path / "both" / site for site in ("siteA", "siteB")]
    for seed, (cohort, case) in enumerate(itertools.product(cohorts, ("P1", "P2"))):
        write_study(tmp_path / "made", f"{seed}", ("t1n", "t2f"), seed=seed)
        for m in ("t1n", "t2f"):
            name = {1: f"{m}.nii.gz", 0: f"{case}_{m}.nii.gz"}[int(folder == "{}/{}/")]
            path = Path(folder.format(cohort, case, case) + name.removeprefix(f"{case}_" if "{}_" in folder else ""))
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tmp_path / "made" / f"{seed}" / f"{seed}-{m}.nii.gz", path)
    with pytest.raises(
        ConfigError, match=r"names \(P1, P2\); rename them, or give .*, the folder above .*siteA_NAME"
    ) as e:
        prepare(cohorts, tmp_path / "set")
    said = []
    manifest = prepare(re.search("give (.*), the", str(e.value))[1], tmp_path / "set", display=listening(said))
    assert list(manifest["cases"]) == ["siteA_P1", "siteA_P2", "siteB_P1", "siteB_P2"]
    assert len({case["patient"] for case in manifest["cases"].values()}) == 4
    assert any("siteA_P1, siteB_P1 are taken for studies of different patients" in line for line in said)


def test_the_remedy_for_shared_names_where_no_folder_is_above_all_cohorts_alone(tmp_path):
    for folder in ("a", "b/c"):
        write_study(tmp_path / folder, "P1")
    with pytest.raises(
        ConfigError, match=r"\(P1\); rename them, or move the cohorts into one folder, each into one call"
    ):
        prepare([tmp_path / "a", tmp_path / "b" / "c"], tmp_path / "set")


def test_no_remedy_for_shared_names_merges_studies(tmp_path):
    """By their names, one folder's T1 and the other's FLAIR would be of one P1, and copies would be refused."""
    for folder, contrast in (("A", "t1n"), ("B", "t2f"), ("B_n4", "t2f")):
        (tmp_path / folder).mkdir()
        write_study(tmp_path / "made", "P1", (contrast,))
        (tmp_path / "made" / "P1" / f"P1-{contrast}.nii.gz").rename(tmp_path / folder / f"P1-{contrast}.nii.gz")
    for one, other in (("A", "B"), ("B", "B_n4")):
        with pytest.raises(ConfigError, match=r"\(P1\); rename them\.$"):
            prepare([tmp_path / one, tmp_path / other], tmp_path / "set")


def test_a_mapping_tells_the_modalities(tmp_path):
    write_study(tmp_path / "cohort", "P1", ("t1n", "t2f"))
    for path in (tmp_path / "cohort" / "P1").iterdir():
        path.rename(path.with_name(path.name.replace("t1n", "one").replace("t2f", "two")))
    first = prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(mapping={"t1n": "*-one*", "t2f": "*-two*"}))
    assert first["cases"]["P1"]["modalities"] == ["t1n", "t2f"]
    images, _ = arrays(tmp_path / "set", "P1")
    swapped = prepare(
        tmp_path / "cohort", tmp_path / "set", PrepareSettings(mapping={"t2f": "*-one*", "t1n": "*-two*"})
    )
    assert swapped["cases"]["P1"]["modalities"] == ["t1n", "t2f"]
    np.testing.assert_array_equal(arrays(tmp_path / "set", "P1")[0], images[:, ::-1])


# ---------------------------------------------------------------------------------------------- run again


def test_run_again_keeps_what_is_finished(cohort, tmp_path):
    first = prepare(cohort, tmp_path / "set")
    before, files = inodes(tmp_path / "set"), tree(tmp_path / "set")
    assert len(before) == 8
    assert prepare(cohort, tmp_path / "set") == first
    assert inodes(tmp_path / "set") == before
    assert tree(tmp_path / "set") == files


def test_studies_that_change_their_part_are_said(cohort, tmp_path):
    for seed in range(8):
        write_study(tmp_path / "cohort", f"P{seed}", ("t1n",), seed=seed)
    split, listener = Split(0.5, 0.25, 0.25, seed=5), Listener()
    first = prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(split=split), display=listener)
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(split=split), display=listener)
    assert not any("change their part" in line for line in listener.said)
    second = prepare(tmp_path / "cohort", tmp_path / "set", display=listener)
    moved = [case for case in first["cases"] if first["cases"][case]["part"] != second["cases"][case]["part"]]
    (line,) = (line for line in listener.said if "change their part" in line)
    assert f"{moved[0]} from {first['cases'][moved[0]]['part']} to {second['cases'][moved[0]]['part']}" in line
    assert "--split 50/25/25 --seed 5" in line


def test_a_changed_input_is_prepared_again(cohort, tmp_path):
    first = prepare(cohort, tmp_path / "set")
    before = inodes(tmp_path / "set")
    write_study(cohort, CASES[1], seed=77)
    second = prepare(cohort, tmp_path / "set")
    assert rewritten(before, inodes(tmp_path / "set")) == {CASES[1]}
    differing = [c for c in CASES if first["cases"][c]["files"] != second["cases"][c]["files"]]
    assert differing == [CASES[1]]


def test_a_label_that_arrives_is_taken_in(cohort, tmp_path):
    prepare(cohort, tmp_path / "set")
    write_study(cohort, CASES[1], (), lesion=True)
    assert prepare(cohort, tmp_path / "set")["cases"][CASES[1]]["labelled"]
    assert arrays(tmp_path / "set", CASES[1])[1][:, 1].any()


def test_a_case_that_is_gone_is_deleted_only_when_asked_for(cohort, tmp_path):
    prepare(cohort, tmp_path / "set")
    before, content = inodes(tmp_path / "set"), tree(tmp_path / "set")
    notes = tmp_path / "set" / "cases" / CASES[0] / ".notes"
    notes.write_text("mine")
    for case in CASES[:2]:
        shutil.rmtree(cohort / case)
    with pytest.raises(
        OutputError,
        match=rf"set holds 2 prepared cases that the cohorts, of 2 studies, do not have: "
        rf"{CASES[0]}, {CASES[1]}\. Name .*or delete these cases with --prune",
    ):
        prepare(cohort, tmp_path / "set")
    notes.rename(tmp_path / "notes")
    assert tree(tmp_path / "set") == content
    (tmp_path / "notes").rename(notes)
    assert list(prepare(cohort, tmp_path / "set", PrepareSettings(prune=True))["cases"]) == CASES[2:]
    assert rewritten(before, inodes(tmp_path / "set")) == set(CASES[:2])
    assert sorted(p.name for p in (tmp_path / "set" / "cases").iterdir()) == [CASES[0], *CASES[2:]]
    assert tree(notes.parent) == {".notes": b"mine"}  # what is not ours stays, and its folder


def test_another_cohort_does_not_replace_the_first(cohort, tmp_path):
    prepare(cohort, tmp_path / "set")
    before = tree(tmp_path / "set")
    write_study(tmp_path / "other", "Q1")
    with pytest.raises(OutputError, match="holds 4 prepared cases that the cohorts, of 1 study, do not have"):
        prepare(tmp_path / "other", tmp_path / "set")
    assert tree(tmp_path / "set") == before
    assert len(prepare([cohort, tmp_path / "other"], tmp_path / "set")["cases"]) == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_a_prepared_case_that_can_only_not_be_read_today_is_kept(cohort, tmp_path, workers, capsys):
    """As where scans are links to a drive that is not there."""
    scan, drive = cohort / CASES[0] / f"{CASES[0]}-t1n.nii.gz", tmp_path / "drive.nii.gz"
    shutil.copy2(scan, drive)
    scan.unlink()
    scan.symlink_to(drive)
    first = prepare(cohort, tmp_path / "set")
    before = tree(tmp_path / "set")
    drive.rename(tmp_path / "gone.nii.gz")
    assert prepare(cohort, tmp_path / "set", PrepareSettings(workers=workers), display=Display()) == first
    (tmp_path / "set" / "crossmr.log").unlink()
    assert tree(tmp_path / "set") == before
    said = capsys.readouterr().out.replace("\n", " ")
    assert "is a link to a file that is not there" in said
    assert "It was prepared before, and is kept." in said
    new = prepare(cohort, tmp_path / "new")
    assert [refusal["case"] for refusal in new["refused"]] == [CASES[0]]


@pytest.mark.parametrize("damage", [lambda _: b"damaged", lambda content: content[:-8] + bytes(8)], ids=["all", "CRC"])
def test_a_case_that_is_refused_now_is_removed(cohort, tmp_path, damage):
    prepare(cohort, tmp_path / "set")
    scan = cohort / CASES[0] / f"{CASES[0]}-t1n.nii.gz"
    scan.write_bytes(damage(scan.read_bytes()))
    manifest = prepare(cohort, tmp_path / "set")
    assert [refusal["case"] for refusal in manifest["refused"]] == [CASES[0]]
    assert not (tmp_path / "set" / "cases" / CASES[0]).exists()


def test_a_run_that_was_stopped_goes_on(cohort, tmp_path, monkeypatch):
    wanted = prepare(cohort, tmp_path / "wanted")
    write_json = case_module.write_json

    def stop_at_the_third(path: Path, data: Any) -> None:
        if path.parent.name == CASES[2] and data["signature"]:
            raise KeyboardInterrupt
        write_json(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(case_module, "write_json", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            prepare(cohort, tmp_path / "set")
    files = tree(tmp_path / "set")
    assert f"cases/{CASES[2]}/images.npy" in files  # a case without its signature ...
    assert "manifest.json" not in files
    assert not read_json(tmp_path / "set" / "cases" / CASES[2] / "case.json")["signature"]
    (tmp_path / "set" / "cases" / CASES[2] / "images.npy").write_bytes(b"half of it")
    before = inodes(tmp_path / "set")
    assert prepare(cohort, tmp_path / "set") == wanted
    assert rewritten(before, inodes(tmp_path / "set")) == set(CASES[2:])  # ... does not exist
    assert tree(tmp_path / "set") == tree(tmp_path / "wanted")


def test_while_a_case_is_written_it_does_not_exist(cohort, tmp_path, monkeypatch):
    """Or old numbers would stand beside new arrays."""
    prepare(cohort, tmp_path / "set")
    write_study(cohort, CASES[1], seed=77)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(case_module, "_write_array", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(cohort, tmp_path / "set")
    records = {case: read_json(tmp_path / "set" / "cases" / case / "case.json") for case in CASES}
    assert [case for case in CASES if records[case]["signature"]] == [CASES[0], *CASES[2:]]


@pytest.mark.parametrize("content", [b"{", b"{}", b"\xff\xfe\x00"])
def test_a_damaged_case_json_is_made_again(cohort, tmp_path, content):
    prepare(cohort, tmp_path / "set")
    before, files = inodes(tmp_path / "set"), tree(tmp_path / "set")
    (tmp_path / "set" / "cases" / CASES[1] / "case.json").write_bytes(content)
    assert prepare(cohort, tmp_path / "set")["refused"] == []
    assert rewritten(before, inodes(tmp_path / "set")) == {CASES[1]}
    assert tree(tmp_path / "set") == files


@pytest.mark.parametrize(
    ("name", "damage"), [("masks.npy", "missing"), ("images.npy", "truncated"), ("masks.npy", "empty")]
)
def test_a_damaged_array_is_made_again(cohort, tmp_path, name, damage):
    """As the reader of a set is told to do: 'Run prepare again'."""
    prepare(cohort, tmp_path / "set")
    files, path = tree(tmp_path / "set"), tmp_path / "set" / "cases" / CASES[1] / name
    path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-1])
    if damage == "missing":
        path.unlink()
    prepare(cohort, tmp_path / "set")
    assert tree(tmp_path / "set") == files


def test_a_damaged_manifest_may_be_anybody_s(cohort, tmp_path):
    prepare(cohort, tmp_path / "set")
    before, files = inodes(tmp_path / "set"), tree(tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    path.write_text('{"format": ')
    with pytest.raises(OutputError, match=r"manifest\.json is not crossmr's.*Name another folder, or move it away"):
        prepare(cohort, tmp_path / "set")
    assert path.read_text() == '{"format": '
    path.unlink()
    prepare(cohort, tmp_path / "set")
    assert tree(tmp_path / "set") == files
    assert inodes(tmp_path / "set") == before


def test_registration_is_part_of_a_case(cohort, tmp_path):
    prepare(cohort, tmp_path / "set")
    before = inodes(tmp_path / "set")
    prepare(cohort, tmp_path / "set", PrepareSettings(register="if needed"))
    assert rewritten(before, inodes(tmp_path / "set")) == set(CASES)


def test_workers_do_not_change_a_byte(cohort, tmp_path):
    write_study(cohort, "P-00009-000", replace={"t2f": make_head("t2f")[1:]})
    alone = prepare(cohort, tmp_path / "alone")
    assert prepare(cohort, tmp_path / "together", PrepareSettings(workers=2)) == alone
    assert tree(tmp_path / "together") == tree(tmp_path / "alone")
    assert default_workers() >= 1


# ------------------------------------------------------------------------------------- the folder given


def occupied(folder: Path) -> list[Path]:
    """Folders that are no set of ours, and must come out as they went in."""
    contents = {
        "photos": {"photo.jpg": "x"},
        "tcia": {"manifest.json": '{"downloads": []}', "cases/P1/notes.txt": "x"},
        "raw": {"cases/P1/scan.nii.gz": "x", "cases/P2/images.npy": "x"},
        "loose": {"cases/notes.txt": "x"},
        "mixed": {"cases/P1/images.npy": "x", "thesis.tex": "x"},
    }
    for place, files in contents.items():
        for name, text in files.items():
            (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / place / name).write_text(text)
    return [folder / place for place in contents]


def test_a_folder_that_holds_something_else_is_refused(cohort, tmp_path):
    for folder in occupied(tmp_path / "occupied"):
        before = tree(folder)
        with pytest.raises(OutputError, match=rf"{folder.name}.* (exists and is not a prepared|is not crossmr's)"):
            prepare(cohort, folder)
        assert tree(folder) == before


def test_into_the_cohort_itself_is_refused(tmp_path):
    """Patients in a folder named cases/: none of their files may be taken for stale."""
    write_study(tmp_path / "data" / "cases", "P1")
    write_study(tmp_path / "data" / "cases", "P2", replace={"t2f": np.zeros((28, 32, 24), np.float32)})
    before = tree(tmp_path / "data")
    with pytest.raises(OutputError, match="not a prepared dataset"):
        prepare(tmp_path / "data", tmp_path / "data")
    assert tree(tmp_path / "data") == before


def test_what_we_did_not_write_stays(cohort, tmp_path):
    prepare(cohort, tmp_path / "set")
    cases = tmp_path / "set" / "cases"
    (cases / "mine").mkdir()
    (cases / "mine" / "notes.txt").write_text("x")
    (cases / ".DS_Store").write_text("x")
    prepare(cohort, tmp_path / "set")
    assert sorted(p.name for p in cases.iterdir()) == [".DS_Store", *CASES, "mine"]


def test_an_empty_folder_is_welcome(cohort, tmp_path):
    (tmp_path / "set").mkdir()
    assert list(prepare(cohort, tmp_path / "set")["cases"]) == CASES


def test_a_file_in_the_way(cohort, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"file could not be written: File exists\. Check free space"):
        prepare(cohort, tmp_path / "file")
    for workers in (1, 2):
        with pytest.raises(OutputError, match="could not be written: Not a directory"):
            prepare(cohort, tmp_path / "file" / "set", PrepareSettings(workers=workers))
    assert (tmp_path / "file").read_text() == "x"


def test_a_file_where_a_case_belongs(cohort, tmp_path):
    prepare(cohort, tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "cases" / CASES[2])
    (tmp_path / "set" / "cases" / CASES[2]).write_text("x")
    with pytest.raises(OutputError, match=rf"{CASES[2]} is not crossmr's"):
        prepare(cohort, tmp_path / "set")
    assert (tmp_path / "set" / "cases" / CASES[2]).read_text() == "x"


@pytest.mark.parametrize("name", ["images.npy", "case.json"])
def test_a_file_where_a_new_case_goes(cohort, tmp_path, name):
    prepare(cohort, tmp_path / "set")
    path = tmp_path / "set" / "cases" / "P-00004-000" / name
    path.parent.mkdir()
    path.write_text("mine")
    write_study(cohort, "P-00004-000")
    before = tree(tmp_path / "set")
    with pytest.raises(OutputError, match="P-00004-000 is not crossmr's"):
        prepare(cohort, tmp_path / "set")
    assert tree(tmp_path / "set") == before


def test_a_read_only_folder(cohort, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("permissions do not bind this user (root)")
    with pytest.raises(OutputError, match="could not be written"):
        prepare(cohort, tmp_path / "locked" / "set")


def test_a_full_disk_is_told(cohort, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crossmr.files.os.fsync", full)
    (files, *_) = find_studies(cohort)
    with pytest.raises(OutputError, match="No space left on device"):
        prepare_case(files, tmp_path / "set")


# ------------------------------------------------------------------------------------------------ split


def test_visits_of_one_patient_are_never_separated(tmp_path):
    for number in range(6):
        write_study(tmp_path / "cohort", f"P-0000{number}-000", ("t1n",), seed=number)
        write_study(tmp_path / "cohort", f"P-0000{number}-001", ("t1n",), seed=100 + number)
    for seed in range(3):
        split = Split(1 / 3, 1 / 3, 1 / 3, seed=seed)
        manifest = prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(split=split))
        assert manifest["split"]["seed"] == seed
        assert sum(len(manifest["split"][name]) for name in SPLITS) == 6
        for number in range(6):
            splits = {manifest["cases"][f"P-0000{number}-00{visit}"]["part"] for visit in range(2)}
            assert len(splits) == 1


def test_a_table_groups_studies_and_fixes_splits(tmp_path):
    for seed, case in enumerate(("A", "B", "C", "D_T0", "D_T1")):
        write_study(tmp_path / "cohort", case, ("t1n",), seed=seed)
    table = tmp_path / "patients.csv"
    table.write_text("case,patient,part\nA,P,test\nB,P,\nC,Q,val\n")
    for seed in range(3):  # whatever chance says
        chosen = PrepareSettings(split=Split(seed=seed), patients=table)
        manifest = prepare(tmp_path / "cohort", tmp_path / "set", chosen)
        whose = {name: (case["patient"], case["part"]) for name, case in manifest["cases"].items()}
        assert whose == {
            **{"A": ("P", "test"), "B": ("P", "test"), "C": ("Q", "val")},
            **{"D_T0": ("D_T0", whose["D_T0"][1]), "D_T1": ("D_T1", whose["D_T1"][1])},
        }
        assert manifest["patients"]["several_studies"] == {"P": ["A", "B"]}
        assert manifest["fingerprint"]["patients"] == 4
    before = inodes(tmp_path / "set")
    table.write_text("case,patient\nA,P\nB,Q\n")  # another grouping of studies that are prepared
    manifest = prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(patients=table))
    assert [manifest["cases"][case]["patient"] for case in "AB"] == ["P", "Q"]
    assert inodes(tmp_path / "set") == before
    table.write_text("case,patient\nAA,P\n")
    with pytest.raises(ConfigError, match=r"line 2, column case: there is no study 'AA'. Did you mean 'A'"):
        prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(patients=table))


def test_studies_that_share_a_scan_go_together_under_any_name_header_and_packing(tmp_path):
    """One volume of A is in F as well, unpacked and under another description; F's and G's others are their own."""
    cohort = tmp_path / "cohort"
    for seed, case in enumerate("ABCDEFG"):
        write_study(cohort, case, ("t1n", "t2f"), seed=seed)
    volume = nib.load(cohort / "A" / "A-t2f.nii.gz")
    copy = image(np.asarray(volume.dataobj), description="another")
    (cohort / "F" / "F-t2f.nii.gz").unlink()
    nib.save(copy, cohort / "F" / "F-t2f.nii")
    said = []
    display = listening(said)
    for seed in range(4):
        chosen = PrepareSettings(split=Split(1 / 3, 1 / 3, 1 / 3, seed=seed))
        cases = prepare(cohort, tmp_path / "set", chosen, display=display)["cases"]
        assert cases["A"]["part"] == cases["F"]["part"]
        assert (cases["A"]["patient"], cases["F"]["patient"]) == ("A", "A")
    manifest = read_json(tmp_path / "set" / "manifest.json")
    assert manifest["patients"] == {"several_studies": {"A": ["A", "F"]}, "share_a_scan": [["A", "F"]]}
    assert "A, F share a scan, so they are studies of one patient" in said
    (shared,) = {*cases["A"]["scans"].values()} & {*cases["F"]["scans"].values()}
    opened = {case.name: case for case in PreparedDataset(tmp_path / "set").cases}
    assert shared in opened["A"].scans
    assert (opened["A"].named, opened["F"].patient, opened["F"].named) == ("", "A", "F")
    (tmp_path / "patients.csv").write_text("case,patient,part\nA,A,train\nF,F,test\n")
    chosen = PrepareSettings(patients=tmp_path / "patients.csv")
    with pytest.raises(ConfigError, match=r"puts F into test and A into train, but they share a scan"):
        prepare(cohort, tmp_path / "set", chosen)


def test_prepare_says_who_has_several_studies_and_what_names_leave_open(tmp_path):
    for seed, case in enumerate(("P1_T0", "P1_T1", "P2_T0", "Q")):
        write_study(tmp_path / "cohort", case, ("t1n",), seed=seed)
    said = []
    prepare(tmp_path / "cohort", tmp_path / "set", display=listening(said))
    several, warning = (line for line in said if not line.startswith("prepare:"))
    assert several == "patients with several studies: 1 (P1: P1_T0, P1_T1)"
    assert warning.startswith(
        "warning: names leave open who is whose: P1_T0, P1_T1 are taken for studies of one patient"
    )


@pytest.mark.parametrize("guard", ["", 'if __name__ == "__main__":\n    '])
def test_a_script_without_a_guard_is_told_of_it(cohort, tmp_path, guard):
    """Every process imports the script, which begins the same anew."""
    script = tmp_path / "script.py"
    call = f"crossmr.prepare({str(cohort)!r}, {str(tmp_path / 'set')!r}, crossmr.PrepareSettings(workers=2))"
    script.write_text(f"import crossmr\n{guard}print(crossmr.__name__, {call}['fingerprint']['studies'])\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    if guard:
        assert (done.returncode, done.stdout) == (0, "crossmr 4\n")
        return
    assert done.returncode == 1
    *before, last = done.stderr.strip().splitlines()
    assert last.startswith("crossmr.errors.ConfigError: prepare: a process ended while it began.")
    assert last.endswith('Put what it does under if __name__ == "__main__": or prepare with workers=1.')
    assert sum(line.startswith("Traceback") for line in before) <= 2  # of this process, and its cause
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_prepare_names_labels_that_it_does_not_use(tmp_path):
    write_study(tmp_path / "cohort", "P1", ("t1n", "t2f"), lesion=True)
    write_study(tmp_path / "cohort", "P2", ("t1n", "t2f"), seed=1)
    write_study(tmp_path / "cohort", "P3", ("t1n", "t2f"), seed=2)
    (tmp_path / "cohort" / "labels").mkdir()
    seg = tmp_path / "cohort" / "P1" / "P1-seg.nii.gz"
    for name in ("P2", "P-3_seg"):
        (tmp_path / "cohort" / "labels" / f"{name}.nii.gz").write_bytes(seg.read_bytes())
    nib.save(image(ellipsoid().astype(np.uint8)), seg)
    said = []
    manifest = prepare(tmp_path / "cohort", tmp_path / "set", display=listening(said))
    assert [case for case, record in manifest["cases"].items() if record["labelled"]] == ["P2"]
    (warning,) = (line for line in said if line.startswith("warning"))
    assert warning.startswith(
        f"warning: 1 volume that may be lesion labels is used for no study: {Path('labels', 'P-3_seg.nii.gz')}. Call"
    )
    (note,) = (line for line in said if line.startswith("note"))
    assert note.startswith("note on P1: the segmentation *-seg.nii.gz is not used: it covers more than 40% of the head")


def test_a_4d_image_of_all_contrasts_is_to_be_split(tmp_path):
    """As the Medical Segmentation Decathlon has them: their labels are called after them already."""
    write_study(tmp_path / "cohort", "P1", ("t1n", "t2f"))
    for folder, shape in (("imagesTr", (8, 8, 8, 4)), ("labelsTr", (8, 8, 8))):
        (tmp_path / "cohort" / "Task01" / folder).mkdir(parents=True)
        nib.save(image(np.zeros(shape, np.uint8)), tmp_path / "cohort" / "Task01" / folder / "BRATS_001.nii.gz")
    said = []
    prepare(tmp_path / "cohort", tmp_path / "set", display=listening(said))
    warnings = [line for line in said if line.startswith("warning: BRATS") or "lesion labels" in line]
    assert len(warnings) == 1
    assert "BRATS_001.nii.gz is a 4D image" in warnings[0]
    assert "BRATS_001_t1n.nii.gz" in warnings[0]


def test_a_set_that_grows_keeps_the_part_of_everybody_it_knows(tmp_path):
    cohort, split = tmp_path / "cohort", PrepareSettings(split=Split(0.5, 0.25, 0.25))
    for seed, case in enumerate(("P1_T0", "B", "C", "D")):
        write_study(cohort, case, ("t1n",), seed=seed)
    before = prepare(cohort, tmp_path / "set", split)
    for seed, case in enumerate(("P1_T1", "E", "F", "G", "H"), 4):
        write_study(cohort, case, ("t1n",), seed=seed)
    listener = Listener()
    after = prepare(cohort, tmp_path / "set", split, display=listener)
    assert [len(after["split"][part]) for part in SPLITS] == [4, 2, 2]
    assert {case: after["cases"][case]["part"] for case in before["cases"]} == {
        case: record["part"] for case, record in before["cases"].items()
    }
    assert after["cases"]["P1_T1"]["part"] == after["cases"]["P1_T0"]["part"]
    assert not any("change their part" in line for line in listener.said)


def test_two_patients_who_turn_out_to_be_one_are_no_test(tmp_path):
    cohort = tmp_path / "cohort"
    for seed, case in enumerate("ABC"):
        write_study(cohort, case, ("t1n",), seed=seed)
    before = prepare(cohort, tmp_path / "set")
    (table := tmp_path / "patients.csv").write_text("case,patient\nA,P\nB,P\nC,P\n")
    listener = Listener()
    after = prepare(cohort, tmp_path / "set", PrepareSettings(patients=table), display=listener)
    assert sorted(case["part"] for case in before["cases"].values()) == sorted(SPLITS)
    assert {case["part"] for case in after["cases"].values()} == {"train"}
    assert any("change their part" in line for line in listener.said)


def test_settings_are_understood_as_the_command_line_gives_them():
    assert Split(70, 10, 20, seed=4) == Split.parse("70/10/20", 4)
    given = PrepareSettings(split="50/25/25", patients="p.csv", register=True)
    assert given == PrepareSettings(split=Split(0.5, 0.25, 0.25), patients=Path("p.csv"), register="always")
    assert PrepareSettings(register=False) == PrepareSettings()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"split": "70/30"}, r"--split is '70/30'; expected train/val/test"),
        (
            {"split": (0.7, 0.1, 0.2)},
            r"split is \(.*\); expected text such as '70/10/20' or crossmr\.Split\(0\.7, 0\.1, 0\.2\)\.$",
        ),
        ({"patients": 5}, r"patients is 5; expected text such as 'patients.csv'"),
        ({"register": "yes"}, r"register is 'yes'; expected one of never, if needed, always"),
        ({"workers": "two"}, r"workers is 'two'; expected a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        PrepareSettings(**wrong)


# ------------------------------------------------------------------------------------------- real scans


def test_real_patients_who_lack_modalities(tmp_path):
    source = SCANS / "lgg_incomplete"
    if not source.is_dir():
        pytest.skip(f"needs the real scans in {source}")
    for folder in sorted(source.iterdir())[:3]:
        shutil.copytree(folder, tmp_path / "cohort" / folder.name)
    manifest = prepare(tmp_path / "cohort", tmp_path / "set")
    assert manifest["refused"] == []
    assert all("t2f" in case["modalities"] for case in manifest["cases"].values())
    assert min(len(case["modalities"]) for case in manifest["cases"].values()) < 3
    assert len(PreparedDataset(tmp_path / "set").cases) == 3


def test_an_error_that_nobody_foresaw_refuses_its_study_alone(tmp_path, monkeypatch):
    for case in ("A", "B"):
        write_study(tmp_path / "cohort", case)
    original = case_module.load_study

    def break_first(files, **options):
        if files.case == "A":
            raise IndexError("out of range")
        return original(files, **options)

    monkeypatch.setattr(case_module, "load_study", break_first)
    manifest = prepare(tmp_path / "cohort", tmp_path / "set")
    assert list(manifest["cases"]) == ["B"]
    assert [(r["case"], "IndexError: out of range" in r["reason"]) for r in manifest["refused"]] == [("A", True)]
    assert 'raise IndexError("out of range")' in (tmp_path / "set" / "crossmr.log").read_text()


def test_a_process_that_is_killed_ends_the_preparation_in_words(tmp_path, monkeypatch):
    write_study(tmp_path / "cohort", "A")

    def killed(*_):
        raise BrokenProcessPool("terminated abruptly")

    monkeypatch.setattr(module, "prepare_case", killed)
    with pytest.raises(OutputError, match=r"a process was killed, .*--workers 1; what is prepared is kept"):
        prepare(tmp_path / "cohort", tmp_path / "set")


# Memory


def test_a_study_that_cannot_fit_is_refused_by_its_headers_and_the_others_go_on(tmp_path):
    write_study(tmp_path / "cohort", "A")
    (tmp_path / "cohort" / "Big").mkdir()
    header_alone(tmp_path / "cohort" / "Big" / "Big-t1n.nii.gz", 20_000)
    said = []
    manifest = prepare(tmp_path / "cohort", tmp_path / "set", display=listening(said))
    assert list(manifest["cases"]) == ["A"]
    (refused,) = manifest["refused"]
    assert re.match(r"Big: needs about \d+\.\d GB of memory, \d+\.\d GB are available\. Give", refused["reason"])
    assert not [line for line in said if "prepared at once" in line]  # what is refused holds nobody up


@pytest.mark.parametrize(
    ("share", "asked", "processes", "said"),
    [
        (9, 3, 3, None),
        (2.5, 3, 2, "2 studies are"),
        (1.5, 3, 1, "1 study is"),
        (1.5, 1, 1, "1 study is"),
        (3, 1, 1, None),
    ],
)
def test_as_many_studies_are_prepared_at_once_as_fit(share, asked, processes, said, tmp_path, monkeypatch):
    for case in ("A", "B", "Done"):
        write_study(tmp_path / "cohort", case, ("t1n",))
    (tmp_path / "set" / "cases" / "Done").mkdir(parents=True)
    for folder, side in (("A", 300), ("B", 500), ("Done", 700)):
        header_alone(tmp_path / "cohort" / folder / f"{folder}-t1n.nii.gz", side)
    (tmp_path / "set" / "cases" / "Done" / "case.json").write_text("{}")  # needs no memory any more
    studies = find_studies(tmp_path / "cohort")
    needed = study_memory(studies[1].images()).bytes()
    monkeypatch.setattr(module, "PROCESS_BYTES", 0)
    monkeypatch.setattr(module, "reusable_memory", lambda: needed)
    monkeypatch.setattr(module, "available_memory", lambda: int((share - 1) * needed))
    lines = []
    settings = PrepareSettings(workers=asked)
    assert module._processes(studies, tmp_path / "set", settings, listening(lines)) == processes
    expected = f"B: needs about 1.9 GB of memory, {share * needed / 1e9:.1f} GB are available: {said} prepared at once"
    assert lines == [expected] * (said is not None)
