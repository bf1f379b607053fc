"""What a user names: folders, several of them, files, DICOM; and what would be made of it."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from conftest import image, make_head, save_untrained, tree, write_study

from crossmr.completion.cohort import CohortSettings, complete_cohort, plan_cohort
from crossmr.completion.inputs import find_inputs
from crossmr.completion.layout import CHALLENGE_GRID, FORMAT, PROFILES
from crossmr.completion.study import complete, hashes
from crossmr.data import enhancement
from crossmr.display import Display
from crossmr.errors import ConfigError, NamingError, OutputError
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.parts import Part

SETTINGS = InferenceSettings(ddim_steps=2, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return read_model(save_untrained(tmp_path_factory.mktemp("model")))


def write_files(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        image(make_head(name.removesuffix(".nii.gz")[-3:])).to_filename(folder / name)
    return [folder / name for name in names]


def test_files_make_one_study(model, tmp_path):
    files = write_files(tmp_path / "P7", "x-t1n.nii.gz", "y-t2w.nii.gz")
    summary = complete_cohort(files, tmp_path / "out", model, SETTINGS)
    assert summary.completed == {"P7": ["t1c", "t2f"]}  # their names disagree, so the folder names the study
    assert list(json.loads((tmp_path / "out" / "P7" / "manifest.json").read_text())["inputs"]) == ["t1n", "t2w"]


@pytest.mark.parametrize("score", [1.0, -1.0, 0.1])
def test_two_t1_that_no_name_tells_apart(score, model, tmp_path, monkeypatch, capsys):
    """The voxels tell them apart where they are sure; a mapping of either goes before."""
    case = write_study(tmp_path / "in", "P7", ("t1n", "t1c", "t2w"))
    files = [(case / f"P7-t1{c}.nii.gz").rename(case / f"P7-T1_{n}.nii.gz") for c, n in (("n", 1), ("c", 2))]
    monkeypatch.setattr(enhancement, "compare", lambda *_: enhancement.Comparison(score, 0.9))
    plain, bright = (files[1], files[0]) if score < 0 else files[:2]
    summary = complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS)
    if abs(score) < enhancement.THRESHOLD:
        assert "2 files claim to be t1n" in summary.failed["P7"]
    else:
        manifest = json.loads((tmp_path / "out" / "P7" / "manifest.json").read_text())
        assert {m: entry["file"] for m, entry in manifest["inputs"].items() if m != "t2w"} == {
            "t1n": plain.name,
            "t1c": bright.name,
        }
        assert list(manifest["synthetic"]) == ["t2f"]
        assert manifest["notes"][0].startswith(
            f"{bright.name} was taken for T1ce: vessels brighter than in {plain.name}"
        )
        assert list(complete(case, model, SETTINGS).manifest["synthetic"]) == ["t2f"]
    find_inputs([tmp_path / "in"], display=Display())
    assert (f"P7: {bright.name} was taken for T1ce" in capsys.readouterr().out) == (abs(score) > enhancement.THRESHOLD)
    (study,) = find_inputs([tmp_path / "in"], {"T1": "*-T1_1*"}).studies
    assert study.candidates["t1n"] == (files[0],)
    assert "t1c" not in study.candidates


def test_a_mapping_names_files(tmp_path):
    files = write_files(tmp_path, "A-t1n.nii.gz", "A-t2w.nii.gz")
    strange = files[0].rename(tmp_path / "A-XYZ.nii.gz")
    with pytest.raises(NamingError, match=r"A-XYZ.nii.gz: its name says no contrast\. Name it with --map"):
        find_inputs([strange, files[1]])
    (study,) = find_inputs([strange, files[1]], {"t1n": "*-XYZ*"}).studies
    assert study.case == "A"
    assert list(study.images()) == ["t1n", "t2w"]


def test_several_folders_make_a_cohort(tmp_path):
    for folder, case in (("one", "A"), ("two", "B"), ("three", "A")):
        write_study(tmp_path / folder, case, ("t1n",))
    inputs = find_inputs([tmp_path / "one", tmp_path / "two"])
    assert [study.case for study in inputs.studies] == ["A", "B"]
    assert inputs.root == tmp_path
    with pytest.raises(ConfigError, match=r"The folders share study names \(A\)"):
        find_inputs([tmp_path / "one", tmp_path / "three"])
    with pytest.raises(ConfigError, match="Give files, which make one study, or folders, but not both"):
        find_inputs([tmp_path / "one", tmp_path / "two" / "B" / "B-t1n.nii.gz"])
    (tmp_path / "scan.dcm").touch()
    with pytest.raises(NamingError, match=r"scan.dcm: is no volume .*Give volumes"):
        find_inputs([tmp_path / "scan.dcm"])


def test_a_plan_says_what_would_be_made_of_what_and_writes_nothing(model, tmp_path):
    cohort = tmp_path / "cohort"
    write_study(cohort, "Ann", ("t1n", "t2w"))
    write_study(cohort, "Bob", ("t1n",))
    write_study(cohort, "Cem", ("t1n", "t1c", "t2w", "t2f"))
    write_study(cohort, "Dan", ("t1n", "t2w"))
    shutil.copy(cohort / "Dan" / "Dan-t1n.nii.gz", cohort / "Dan" / "Dan-T1.nii.gz")
    (tmp_path / "out" / "Eve").mkdir(parents=True)
    write_study(cohort, "Eve", ("t1n", "t2w"))
    given = hashes({m: cohort / "Eve" / f"Eve-{m}.nii.gz" for m in ("t1n", "t2w")})
    (tmp_path / "out" / "Eve" / "manifest.json").write_text(
        json.dumps({"format": FORMAT, "acquired": [*given], "given": given})
    )
    write_study(cohort, "Fay", ("t1n", "t2w"))
    for name in ("t1n_bet", "scan"):
        shutil.copy(cohort / "Fay" / "Fay-t1n.nii.gz", cohort / "Fay" / f"Fay-{name}.nii.gz")
    before = tree(tmp_path)
    planned = {case.case: case for case in plan_cohort(cohort, tmp_path / "out", model, SETTINGS)}
    assert tree(tmp_path) == before
    assert {name: case.outcome for name, case in planned.items()} == {
        "Ann": "to be synthesised",
        "Bob": "not to be synthesised",
        "Cem": "nothing to synthesise",
        "Dan": "would fail",
        "Eve": "finished before",
        "Fay": "not to be synthesised",
    }
    assert planned["Fay"].excluded == {
        "Fay-scan.nii.gz": "its name says no contrast",
        "Fay-t1n_bet.nii.gz": "a plainer file of its kind is used",
    }
    assert planned["Ann"].lines() == [
        "Ann: t1n is Ann-t1n.nii.gz",
        "Ann: t2w is Ann-t2w.nii.gz",
        "Ann: would synthesise t1c, t2f from t1n, t2w",
    ]
    again = plan_cohort(cohort, tmp_path / "out", model, SETTINGS, CohortSettings(overwrite=True))
    assert {case.case: case.outcome for case in again}["Eve"] == "to be synthesised"


def test_a_plan_says_what_is_done_again(model, tmp_path):
    """A scan of what was synthesised has come; the plan calls finished what the run keeps, and nothing else."""
    write_study(tmp_path / "in", "Ann", ("t1n", "t2w"))
    write_study(tmp_path / "in", "Bob", ("t1n", "t2w"), seed=1)
    complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS)
    write_study(tmp_path / "more", "Ann", ("t1c",))
    shutil.copy(tmp_path / "more" / "Ann" / "Ann-t1c.nii.gz", tmp_path / "in" / "Ann")
    planned = plan_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS)
    assert [case.outcome for case in planned] == ["to be synthesised", "finished before"]
    assert planned[0].synthesise == ["t2f"]
    done = complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS)
    assert (done.completed, done.skipped) == ({"Ann": ["t2f"]}, ["Bob"])


def test_a_plan_of_dicom_says_what_is_done_again(model, tmp_path):
    dicoms = pytest.importorskip("dicoms", reason="pip install crossmr[dicom]", exc_type=ImportError)
    pytest.importorskip("dcm2niix", reason="pip install crossmr[dicom]")
    dicoms.write(tmp_path / "in", ("t1n", "t2w"))
    complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS)
    (case,) = plan_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS)
    assert case.outcome == "finished before"
    dicoms.write(tmp_path / "in", ("t1n", "t2w", "t2f"))
    (case,) = plan_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS)
    assert (case.outcome, case.synthesise) == ("to be synthesised", ["t1c"])
    assert complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS).completed == {case.case: ["t1c"]}


def test_a_plan_of_dicom_names_every_series_and_converts_none(model, tmp_path, monkeypatch):
    dicoms = pytest.importorskip("dicoms", reason="pip install crossmr[dicom]", exc_type=ImportError)
    dicoms.write(tmp_path / "in", ("t1n", "t2w"))
    before = tree(tmp_path)
    monkeypatch.setattr("subprocess.run", None)
    (case,) = plan_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS)
    assert tree(tmp_path) == before
    assert case.outcome == "to be synthesised"
    assert list(case.acquired) == ["t1n", "t2w"]
    assert all(text.startswith("series ") for text in case.acquired.values())
    assert case.synthesise == ["t1c", "t2f"]


def test_completing_dicom_says_which_series_is_which_contrast(model, tmp_path, capsys):
    dicoms = pytest.importorskip("dicoms", reason="pip install crossmr[dicom]", exc_type=ImportError)
    pytest.importorskip("dcm2niix", reason="pip install crossmr[dicom]")
    from crossmr.display import Display

    dicoms.write(tmp_path / "in", ("t1n", "t2w"))
    complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS, display=Display())
    said = capsys.readouterr().out
    assert "is t1n (" in said
    assert "is t2w (" in said


def touch(folder, *names):
    """Empty files, with their folders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_the_folders_of_a_cohort_are_listed_once(tmp_path, monkeypatch):
    touch(
        tmp_path, *(f"{case}/{case}-{name}" for case in ("P1", "P2") for name in ("t1n.nii.gz", "t2w.nii.gz", "x.zip"))
    )
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    inputs = find_inputs([tmp_path])
    assert inputs.cases == ["P1", "P2"]
    assert {case: [path.name for path in files] for case, files in inputs.beside.items()} == {
        "P1": ["P1-x.zip"],
        "P2": ["P2-x.zip"],
    }
    assert sorted(listed) == [str(tmp_path), str(tmp_path / "P1"), str(tmp_path / "P2")]


def test_what_lies_beside_goes_to_the_longest_name_that_it_begins_with(tmp_path):
    touch(tmp_path, "P1/P1-t1n.nii.gz", "P1-2/P1-2-t1n.nii.gz", "P1-2-more.zip", "P1.zip", "P1x.zip", "P1-2/other.zip")
    beside = find_inputs([tmp_path]).beside
    assert {case: [path.name for path in files] for case, files in beside.items()} == {
        "P1": ["P1.zip"],
        "P1-2": ["P1-2-more.zip", "other.zip"],
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_a_plan_for_an_output_that_is_not_there_yet_makes_none(small, model, tmp_path, profile):
    (planned,) = plan_cohort(small, tmp_path / "out", model, options=CohortSettings(profile=profile))
    assert (planned.case, planned.outcome) == ("Ann", "would fail" if profile == "challenge" else "to be synthesised")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_plan_refuses_the_studies_that_the_run_refuses_by_their_headers(cohort, model, tmp_path, profile):
    shutil.copytree(cohort, tmp_path / "in")
    write_study(tmp_path / "in", "status.csv", ("t1n", "t2w"))
    write_study(tmp_path / "in", "Flo", replace={"t1n": make_head("t1n", shape=(28, 4, 3))})
    options = CohortSettings(profile=profile)
    planned = plan_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS, options)
    assert not list(tmp_path.glob("out*"))
    failed = complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS, options).failed
    assert {case.case: case.failed for case in planned if case.failed} == failed
    assert {"Dan", "Flo", "status.csv"} <= {*failed}
    assert all(CHALLENGE_GRID in failed[case] for case in ("Ann", "Bob", "Cem", "Eve") if profile == "challenge")
    planned = plan_cohort(tmp_path / "in", tmp_path / "new", model, replace(SETTINGS, register="always"))
    assert [case.case for case in planned if case.failed] == ["Flo", "status.csv"]


def foreign_file(out):
    (out / "Ann").mkdir(parents=True)
    (out / "Ann" / "Ann-t2f_synthetic.nii.gz").write_text("mine")


def foreign_manifest(out):
    out.mkdir()
    (out / "manifest.json").write_text("{}")


def another_profile(out):
    foreign_manifest(out)
    (out / "manifest.json").write_text(json.dumps({"format": FORMAT, "profile": "labelled"}))


def the_input(out):
    out.symlink_to(out.with_name("small"))


@pytest.mark.parametrize("part", [None, Part(1, 1)])
@pytest.mark.parametrize(
    ("make", "profile", "said"),
    [
        (foreign_file, "labelled", r"Ann-t2f_synthetic\.nii\.gz is not crossmr's"),
        (foreign_manifest, "labelled", r"manifest\.json is not crossmr's"),
        (another_profile, "bids", "holds the records of --profile labelled"),
        (the_input, "bids", "out is the input"),
    ],
)
def test_a_plan_refuses_the_output_that_the_run_refuses(small, model, tmp_path, make, profile, said, part):
    make(tmp_path / "out")
    before, options = tree(tmp_path), CohortSettings(profile=profile, part=part)
    with pytest.raises(OutputError, match=said):
        plan_cohort(small, tmp_path / "out", model, SETTINGS, options)
    assert tree(tmp_path) == before
    with pytest.raises(OutputError, match=said):
        complete_cohort(small, tmp_path / "out", model, SETTINGS, options)


def test_a_plan_of_a_part_has_its_studies_alone(cohort, model, tmp_path):
    shutil.copytree(cohort, tmp_path / "in")
    options = [CohortSettings(part=Part(number, 2)) for number in (1, 2)]

    def planned():
        return [[c.case for c in plan_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS, o)] for o in options]

    assert planned() == [["Ann", "Cem", "Eve"], ["Bob", "Dan"]]
    assert not (tmp_path / "out").exists()
    complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS, options[0])
    write_study(tmp_path / "in", "Abe", ("t1n",))  # which the run that has begun does not know
    assert planned() == [["Ann", "Cem", "Eve"], ["Bob", "Dan"]]


def test_a_plan_of_a_part_of_dicom_has_its_folders_alone(model, tmp_path):
    dicoms = pytest.importorskip("dicoms", reason="pip install crossmr[dicom]", exc_type=ImportError)
    pytest.importorskip("dcm2niix", reason="pip install crossmr[dicom]")
    for number in range(3):
        dicoms.write(tmp_path / "in" / f"p{number}", ("t1n", "t2w"), patient=f"MRN-{number}")
    dicoms.write(tmp_path / "in" / "o", ("t1n",), patient="MRN-0")  # who lies in a folder of each part
    parts = [CohortSettings(part=Part(number, 2)) for number in (1, 2)]
    given = tmp_path / "in", tmp_path / "out", model, SETTINGS
    assert [len(plan_cohort(*given, options)) for options in parts] == [2, 2]
    assert not (tmp_path / "out").exists()
    complete_cohort(*given, parts[0])
    planned = {case.case: case.failed for case in plan_cohort(*given, parts[1]) if case.failed}
    assert planned == complete_cohort(*given, parts[1]).failed
    assert "its patient lies in several folders" in "".join(planned.values())
