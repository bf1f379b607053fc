"""File names in, studies and modalities out."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmr.data.naming import MODALITIES, StudyFiles, find_studies, modality_name, recognise, unmatched
from crossmr.errors import ConfigError, NamingError

SCANS = Path(__file__).parents[2] / "shared" / "data"


def study(*names: str, mapping: dict[str, str] | None = None) -> StudyFiles:
    (only,) = recognise([Path(name) for name in names], mapping)
    return only


def names(found: StudyFiles) -> dict[str, str]:
    return {modality: path.name for modality, path in found.images().items()}


def touch(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


CONVENTIONS = {
    "brats 2023": (
        [f"BraTS-GLI-00000-000/BraTS-GLI-00000-000-{m}.nii.gz" for m in ("seg", "t2f", "t1n", "t1c", "t2w")],
        "BraTS-GLI-00000-000",
        "BraTS-GLI-00000",
        ["t1n", "t1c", "t2w", "t2f"],
    ),
    "brats 2021": (
        [f"BraTS2021_00495/BraTS2021_00495_{m}.nii.gz" for m in ("flair", "t1", "t1ce", "t2", "seg")],
        "BraTS2021_00495",
        "BraTS2021_00495",
        ["t1n", "t1c", "t2w", "t2f"],
    ),
    "brats 2018 of TCIA": (
        [f"LGG/x/Brats18_TCIA01_131_1_{m}.nii.gz" for m in ("t1", "t1ce", "seg")],
        "Brats18_TCIA01_131_1",
        "Brats18_TCIA01_131_1",
        ["t1n", "t1c"],
    ),
    "upenn": (
        [
            "images/UPENN-GBM-00001_11/UPENN-GBM-00001_11_FLAIR.nii.gz",
            "images/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1.nii.gz",
            "images/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1GD.nii.gz",
            "images/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T2.nii.gz",
            "images_segm/UPENN-GBM-00001_11_segm.nii.gz",
        ],
        "UPENN-GBM-00001_11",
        "UPENN-GBM-00001",
        ["t1n", "t1c", "t2w", "t2f"],
    ),
    "ixi": (
        [f"IXI-{m}/IXI002-Guys-0828-{m}.nii.gz" for m in ("T1", "T2", "PD")],
        "IXI002-Guys-0828",
        "IXI002-Guys-0828",
        ["t1n", "t2w", "pdw"],
    ),
    "bids": (
        [
            "sub-01/ses-02/anat/sub-01_ses-02_acq-3d_ce-gadolinium_run-1_T1w.nii.gz",
            "sub-01/ses-02/anat/sub-01_ses-02_run-1_T1w.nii.gz",
            "sub-01/ses-02/anat/sub-01_ses-02_FLAIR.nii.gz",
            "sub-01/ses-02/anat/sub-01_ses-02_T2w.nii.gz",
            "sub-01/ses-02/anat/sub-01_ses-02_PDw.nii.gz",
            "derivatives/x/sub-01/ses-02/anat/sub-01_ses-02_space-T1w_desc-lesion_mask.nii.gz",
        ],
        "sub-01_ses-02",
        "sub-01",
        ["t1n", "t1c", "t2w", "t2f", "pdw"],
    ),
    "modalities alone": (
        ["PATIENT1/t1.nii.gz", "PATIENT1/FLAIR.nii.gz", "PATIENT1/T1_Gd.nii", "PATIENT1/mask.nii"],
        "PATIENT1",
        "PATIENT1",
        ["t1n", "t1c", "t2f"],
    ),
    "lesion": (
        ["patient07/patient07-t1n.nii.gz", "patient07/patient07-lesion.nii.gz"],
        "patient07",
        "patient07",
        ["t1n"],
    ),
    "tcga": (["TCGA-FG-6692/TCGA-FG-6692-t1n.nii.gz"], "TCGA-FG-6692", "TCGA-FG-6692", ["t1n"]),
    "phantom": (
        ["PHANTOM-00003-000/PHANTOM-00003-000-t2w.nii.gz"],
        "PHANTOM-00003-000",
        "PHANTOM-00003",
        ["t2w"],
    ),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions(convention: str) -> None:
    files, case, patient, modalities = CONVENTIONS[convention]
    found = study(*files)
    assert (found.case, found.patient, list(found.images())) == (case, patient, modalities)
    assert (found.label() is not None) == (len(files) > len(modalities))
    assert found.unrecognised == ()


@pytest.mark.parametrize(
    ("name", "case", "modality"),
    [
        ("CASE_T1.nii.gz", "CASE", "t1n"),
        ("CASE-T1CE.NII.GZ", "CASE", "t1c"),
        ("CASE.t1gd.nii", "CASE", "t1c"),
        ("CASE_T1_post.nii.gz", "CASE", "t1c"),
        ("my case T2 FLAIR.nii.gz", "my case", "t2f"),
        ("CASE-t1n-t2f.nii.gz", "CASE-t1n", "t2f"),
        ("T2-study_pd.nii.gz", "T2-study", "pdw"),
        ("T2-study/t1.nii.gz", "T2-study", "t1n"),
        ("W39_1998.09.19_T1.nii", "W39_1998.09.19", "t1n"),
        ("sub-T2_FLAIR.nii.gz", "sub-T2", "t2f"),
        ("sub-01_t1_ce.nii.gz", "sub-01", "t1c"),
        ("P1/anat/t1.nii.gz", "P1", "t1n"),
        ("t1.nii.gz", "study", "t1n"),
    ],
)
def test_the_last_words_are_the_modality(name: str, case: str, modality: str) -> None:
    found = study(name)
    assert (found.case, list(found.images())) == (case, [modality])


@pytest.mark.parametrize(
    "name",
    [
        "P/T2-study.nii.gz",
        "P/t1_bias.nii.gz",
        "P/sub-1_T2starw.nii.gz",
        "P/mt1.nii.gz",
        "P/P_brain_mask.nii.gz",
        "P/P_0000.nii.gz",
        "P/sub-1_desc-brain_mask.nii.gz",
        "P/sub-1_ce-gd_FLAIR.nii.gz",
        "P/P-t2f_synthetic.nii",
    ],
)
def test_unknown_names_are_listed_not_guessed(name: str) -> None:
    found = study(name)
    assert found.case in ("P", "sub-1")
    assert (found.images(), found.label(), found.unrecognised) == ({}, None, (Path(name),))


def test_unrecognised_files_join_their_study() -> None:
    files = [
        "IXI-T1/IXI002-Guys-0828-T1.nii.gz",
        "IXI-T1/IXI012-HH-1211-T1.nii.gz",
        "DTI/IXI002-Guys-0828-DTI.nii",
    ]
    by_case = {found.case: found for found in recognise(map(Path, files))}
    assert [path.name for path in by_case["IXI002-Guys-0828"].unrecognised] == ["IXI002-Guys-0828-DTI.nii"]
    assert by_case["IXI012-HH-1211"].unrecognised == ()
    assert study("P/P_t1.nii", "P/scan7.nii").unrecognised == (Path("P/scan7.nii"),)


def test_a_segmentation_of_another_name_in_the_studys_folder() -> None:
    found = study("BraTS20_Training_355/BraTS20_Training_355_t1.nii", "BraTS20_Training_355/W39_1998.09.19_Segm.nii")
    assert found.label() == Path("BraTS20_Training_355/W39_1998.09.19_Segm.nii")


@pytest.mark.parametrize(
    ("files", "patients"),
    [
        ("c/P1/baseline/t1.nii c/P1/followup/t1.nii c/P2/baseline/t1.nii", "P1 P1 P2"),
        ("c/P1/T0/t1.nii c/P1/T1/t1.nii c/P2/T0/t1.nii", "P1 P1 P2"),
        ("c/Ann/2019-03-01/anat/t1.nii c/Ann/2020-04-02/anat/t1.nii c/Bob/2019-03-01/anat/t1.nii", "Ann Ann Bob"),
        ("c/P1/P1_MR_1/t1.nii c/P1_2019-03-01/t1.nii c/P1/P1_fu/t1.nii c/x/P1/t1.nii", "P1 P1 P1 x_P1"),
        ("c/Patient-001/week-000-1/t1.nii c/Patient-001/week-040/t1.nii", "Patient-001 Patient-001"),
        ("c/S1/P1/baseline/t1.nii c/S2/P1/baseline/t1.nii", "S1_P1 S2_P1"),
        ("c/P1/baseline_t1.nii c/P1/followup_t1.nii", "P1 P1"),
        ("c/x/P01_T0_t1.nii c/x/P01_T1_t1.nii c/x/P02_T1_t1.nii", "P01 P01 P02"),
        # of one folder of all studies, or where a name may be the patient's, nobody is anybody's
        ("c/baseline/t1.nii c/followup/t1.nii", "*"),
        ("c/m01/t1.nii c/m02/t1.nii c/m03/t1.nii", "*"),
        ("c/GBM/M01/t1.nii c/GBM/M02/t1.nii c/LGG/M03/t1.nii", "*"),
        ("c/HGG/P1/t1.nii c/HGG/P2/t1.nii", "P1 P2"),
        ("c/A-00012-001_t1.nii c/A-00012-002_t1.nii c/A-00012-003_t1.nii", "*"),
        ("c/t1.nii", "c"),
    ],
)
def test_visits_of_a_patient_by_the_names_of_files_and_folders(files: str, patients: str) -> None:
    found = {s.paths()[0]: s for s in recognise(map(Path, files.split()), root=Path("c"))}
    of_files = [found[Path(file)] for file in files.split()]
    assert [s.patient for s in of_files] == ([s.case for s in of_files] if patients == "*" else patients.split())


def test_bids_sessions_are_studies_of_one_patient() -> None:
    files = [f"sub-1/ses-{s}/anat/sub-1_ses-{s}_T1w.nii.gz" for s in ("b", "a")]
    assert [(s.case, s.patient) for s in recognise(map(Path, files))] == [
        ("sub-1_ses-a", "sub-1"),
        ("sub-1_ses-b", "sub-1"),
    ]


@pytest.mark.parametrize(
    "files",
    [
        ("P/P_T1.nii.gz", "P/P_t1n.nii.gz"),
        ("P/P_t1.nii", "P/P_t1.nii.gz"),
        ("P/anat/sub-1_acq-ax_T1w.nii.gz", "P/anat/sub-1_acq-sag_T1w.nii.gz"),
        ("cohort_a/P/P-t1n.nii.gz", "cohort_b/P/P-t1n.nii.gz"),
    ],
)
def test_two_files_for_a_modality_are_refused_by_name(files: tuple[str, str]) -> None:
    found = study(*files)
    with pytest.raises(NamingError, match="2 files claim to be t1n") as error:
        found.images()
    assert all(file in str(error.value) for file in files)
    assert "\n" not in str(error.value)


def test_two_segmentations_are_refused() -> None:
    found = study("P/P_t1.nii", "P/P_seg.nii", "P/P_mask.nii")
    assert list(found.images()) == ["t1n"]
    with pytest.raises(NamingError, match=r"^P: 2 files claim to be the segmentation: .*P_mask.nii, .*P_seg.nii"):
        found.label()


def test_folders_of_one_name_are_never_mixed() -> None:
    files = ["P1/baseline/t1.nii.gz", "P2/baseline/flair.nii.gz", "P3/anat/t1.nii.gz", "P4/anat/t1.nii.gz"]
    assert [s.case for s in recognise(map(Path, files))] == ["P1_baseline", "P2_baseline", "P3", "P4"]


def test_one_bad_study_does_not_hide_the_others() -> None:
    found = recognise(map(Path, ["A/A_t1.nii", "A/A_t1.nii.gz", "B/B_t1.nii"]))
    assert [s.case for s in found] == ["A", "B"]
    assert names(found[1]) == {"t1n": "B_t1.nii"}


def test_the_order_of_paths_does_not_matter() -> None:
    files = [Path(file) for convention in CONVENTIONS.values() for file in convention[0]]
    assert recognise(files) == recognise(reversed(files)) == recognise(files + files)


class TestMapping:
    def test_it_adds_to_the_rules(self) -> None:
        files = ["P1_MPRAGE.nii.gz", "P1-SWI_mag.nii.gz", "P1_t2.nii.gz", "P1_seg.nii.gz", "P1_mprage.nii.gz"]
        found = study(*(f"x/{file}" for file in files), mapping={"swi": "*SWI*", "T1": "*_MPRAGE.nii.gz"})
        assert found.case == "P1"
        assert names(found) == {"t1n": "P1_MPRAGE.nii.gz", "t2w": "P1_t2.nii.gz", "swi": "P1-SWI_mag.nii.gz"}
        assert found.label() == Path("x/P1_seg.nii.gz")
        assert [path.name for path in found.unrecognised] == ["P1_mprage.nii.gz"]

    def test_what_it_matches_is_preferred_within_the_study(self) -> None:
        files = ["P1/P1_T1.nii.gz", "P1/P1_T1_new.nii.gz", "P1/P1_FLAIR.nii.gz", "P2/P2_T1.nii.gz", "P2/P2_T2.nii.gz"]
        first, second = recognise([Path(file) for file in files], {"t1n": "*_T1_new.nii.gz"})
        assert names(first) == {"t1n": "P1_T1_new.nii.gz", "t2f": "P1_FLAIR.nii.gz"}
        assert [path.name for path in first.unrecognised] == ["P1_T1.nii.gz"]
        assert names(second) == {"t1n": "P2_T1.nii.gz", "t2w": "P2_T2.nii.gz"}

    def test_the_case_is_the_folder_where_the_glob_does_not_begin_with_a_star(self) -> None:
        found = study("P1/T1_run1.nii", "P1/lesion7.nii", mapping={"t1n": "T1*", "seg": "lesion?.nii"})
        assert (found.case, names(found), found.label()) == (
            "P1",
            {"t1n": "T1_run1.nii"},
            Path("P1/lesion7.nii"),
        )

    def test_the_case_is_the_folder_where_the_star_stands_for_nothing(self) -> None:
        assert study("P1/T1.nii", mapping={"t1n": "*T1.nii"}).case == "P1"

    def test_bids_names_keep_their_case(self) -> None:
        found = study(
            "sub-1_ses-2_acq-x_T1w.nii",
            "sub-1_ses-2_T2w.nii",
            mapping={"t1n": "*_T1w.nii", "t2w": "*_T2w.nii"},
        )
        assert (found.case, found.patient) == ("sub-1_ses-2", "sub-1")

    def test_one_file_for_two_modalities_is_refused(self) -> None:
        found = study("P_T1_Gd.nii", mapping={"t1n": "*_T1*", "t1c": "*_T1_Gd*"})
        with pytest.raises(NamingError, match="both t1n and t1c"):
            found.images()

    @pytest.mark.parametrize("key", ["", "SWI", "my-swi", "s w i", "../x"])
    def test_odd_names_are_refused(self, key: str) -> None:
        with pytest.raises(ConfigError, match="mapping"):
            recognise([Path("a.nii")], {key: "*"})


class TestModalityName:
    @pytest.mark.parametrize("name", MODALITIES)
    def test_canonical_names_stay(self, name: str) -> None:
        assert modality_name(name) == name

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("T1CE", "t1c"),
            ("flair", "t2f"),
            ("T1GD", "t1c"),
            ("t1w", "t1n"),
            ("PD", "pdw"),
            ("T2-FLAIR", "t2f"),
        ],
    )
    def test_spellings(self, text: str, name: str) -> None:
        assert modality_name(text) == name

    def test_extra_names(self) -> None:
        assert modality_name("swi", extra=("swi",)) == "swi"

    @pytest.mark.parametrize(("text", "hint"), [("flare", "t2f"), ("t1cc", "t1c")])
    def test_unknown_names_get_a_hint(self, text: str, hint: str) -> None:
        with pytest.raises(ConfigError, match=rf"'{text}' is not a modality.*Did you mean {hint}\?"):
            modality_name(text)

    @pytest.mark.parametrize("text", ["", "swi", "seg", "ct", "brain-mask"])
    def test_other_things_are_no_modality(self, text: str) -> None:
        with pytest.raises(ConfigError, match="not a modality: expected one of t1n, t1c, t2w, t2f, pdw"):
            modality_name(text)


class TestFindStudies:
    def test_walks_sorts_and_skips(self, tmp_path: Path) -> None:
        touch(
            tmp_path,
            "b/b_t1.nii.gz",
            "a/deep/a_t1.nii",
            ".trash/c_t1.nii",
            "a/.a_t2.nii",
            "a/a_t2.nii.gz.x.partial",
        )
        touch(tmp_path, "a/notes.txt", "job.partial/d_t1.nii")
        found = find_studies(tmp_path)
        assert [s.case for s in found] == ["a", "b"]
        assert found[0].images() == {"t1n": tmp_path / "a/deep/a_t1.nii"}

    def test_one_study(self, tmp_path: Path) -> None:
        touch(tmp_path / "P1", "T1.nii.gz", "FLAIR.nii.gz")
        (found,) = find_studies(tmp_path / "P1")
        assert (found.case, names(found)) == ("P1", {"t1n": "T1.nii.gz", "t2f": "FLAIR.nii.gz"})

    def test_the_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(touch(tmp_path / "P1", "T1.nii.gz"))
        assert find_studies(Path())[0].case == "P1"

    def test_links_are_followed_once(self, tmp_path: Path) -> None:
        touch(tmp_path, "store/x_t1.nii", "cohort/y_t1.nii")
        (tmp_path / "cohort" / "x").symlink_to(tmp_path / "store")
        (tmp_path / "cohort" / "loop").symlink_to(tmp_path / "cohort")
        assert [s.case for s in find_studies(tmp_path / "cohort")] == ["x", "y"]

    def test_mapping(self, tmp_path: Path) -> None:
        (found,) = find_studies(touch(tmp_path, "p_MPRAGE.nii"), {"t1n": "*_MPRAGE.nii"})
        assert (found.case, names(found)) == ("p", {"t1n": "p_MPRAGE.nii"})

    def test_nothing_there(self, tmp_path: Path) -> None:
        touch(tmp_path, "dicom/1.dcm", "dicom/2.dcm")
        with pytest.raises(NamingError, match="does not exist"):
            find_studies(tmp_path / "nowhere")
        with pytest.raises(NamingError, match="is a file, not a folder"):
            find_studies(tmp_path / "dicom" / "1.dcm")
        with pytest.raises(NamingError, match=r"no \.nii or \.nii\.gz file in it or below \(2 other files\)"):
            find_studies(tmp_path)

    @pytest.mark.skipif(not SCANS.is_dir(), reason=f"needs the development scans in {SCANS}")
    def test_real_cohorts(self) -> None:
        everyone = {cohort: find_studies(SCANS / cohort) for cohort in ("lgg", "lgg_incomplete", "brats", "openms")}
        assert {cohort: len(found) for cohort, found in everyone.items()} == {
            "lgg": 77,
            "lgg_incomplete": 10,
            "brats": 2,
            "openms": 2,
        }
        assert all(list(s.images()) == ["t1n", "t1c", "t2f"] and s.label() for s in everyone["lgg"])
        assert all(list(s.images()) == ["t1n", "t1c", "t2w", "t2f"] for s in everyone["brats"] + everyone["openms"])
        assert all(s.label() for s in everyone["openms"])
        assert all(s.patient == s.case for s in everyone["lgg"] + everyone["lgg_incomplete"])
        assert not any(s.unrecognised for found in everyone.values() for s in found)


def test_a_pattern_that_matches_no_file_is_said(tmp_path):
    paths = [tmp_path / "P1" / name for name in ("P1-t1n.nii.gz", "P1_SWI.nii.gz")]
    studies = recognise(paths, {"swi": "*_SWI*", "t2w": "*_T2"})
    assert unmatched(studies, {"swi": "*_SWI*", "t2w": "*_T2"}) == [
        "--map t2w='*_T2' matches no file; files go by their names."
    ]
    assert unmatched(studies, None) == []


# Layouts of public cohorts, by their raw file names: case → (patient, modality → file, segmentation).
LAYOUTS = {
    "BraTS 2013 to 2015": (
        "HGG/pat0001_1/VSD.Brain.XX.O.MR_Flair.54512/VSD.Brain.XX.O.MR_Flair.54512.nii.gz "
        "HGG/pat0001_1/VSD.Brain.XX.O.MR_T1.54513/VSD.Brain.XX.O.MR_T1.54513.nii.gz "
        "HGG/pat0001_1/VSD.Brain.XX.O.MR_T1c.54514/VSD.Brain.XX.O.MR_T1c.54514.nii.gz "
        "HGG/pat0001_1/VSD.Brain.XX.O.MR_T2.54515/VSD.Brain.XX.O.MR_T2.54515.nii.gz",
        {"HGG_pat0001_1": "t1n t1c t2w t2f"},
    ),
    "BraTS 2017": (
        "HGG/Brats17_2013_2_1/Brats17_2013_2_1_{t1,t1ce,t2,flair,seg}.nii.gz",
        {"Brats17_2013_2_1": "t1n t1c t2w t2f seg"},
    ),
    "BraTS 2020": (
        "BraTS20_Training_001/BraTS20_Training_001_{t1,t1ce,t2,flair,seg}.nii",
        {"BraTS20_Training_001": "t1n t1c t2w t2f seg"},
    ),
    "BraTS 2024": (
        "BraTS-GLI-00005-100/BraTS-GLI-00005-100-{t1n,t1c,t2w,t2f,seg}.nii.gz "
        "BraTS-GLI-00005-101/BraTS-GLI-00005-101-{t1n,t1c,t2w,t2f,seg}.nii.gz",
        {"BraTS-GLI-00005-100": "t1n t1c t2w t2f seg", "BraTS-GLI-00005-101": "t1n t1c t2w t2f seg"},
    ),
    "BraTS 2024, radiotherapy": (
        "BraTS-MEN-RT-0001-1/BraTS-MEN-RT-0001-1_{t1c,gtv}.nii.gz",
        {"BraTS-MEN-RT-0001-1": "t1c seg"},
    ),
    "BraTS 2023 to 2025, inpainting": (
        "BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1n,t1n-voided,mask,mask-healthy,mask-unhealthy}.nii.gz",
        {"BraTS-GLI-00000-000": "t1n seg"},
    ),
    "UPenn-GBM": (
        "images_structural/UPENN-GBM-00001_11/UPENN-GBM-00001_11_{T1,T1GD,T2,FLAIR}.nii.gz "
        "images_structural_unstripped/UPENN-GBM-00001_11/UPENN-GBM-00001_11_{T1,T1GD,T2,FLAIR}_unstripped.nii.gz "
        "images_segm/UPENN-GBM-00001_11_segm.nii.gz automated_segm/UPENN-GBM-00001_11_automated_approx_segm.nii.gz",
        {"UPENN-GBM-00001_11": "t1n t1c t2w t2f seg"},
    ),
    "UPenn-GBM, automated": (
        "images_structural/UPENN-GBM-00002_21/UPENN-GBM-00002_21_{T1,T1GD,T2,FLAIR}.nii.gz "
        "automated_segm/UPENN-GBM-00002_21_automated_approx_segm.nii.gz",
        {"UPENN-GBM-00002_21": "t1n t1c t2w t2f seg"},
    ),
    "UCSF-PDGM": (
        "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_{T1,T1_bias,T1c,T1c_bias,T2,T2_bias,FLAIR,FLAIR_bias,DWI,DWI_bias,SWI,"
        "SWI_bias,ADC,ASL,DTI_eddy_FA,DTI_eddy_noreg,brain_segmentation,brain_parenchyma_segmentation,"
        "tumor_segmentation}.nii.gz",
        {"UCSF-PDGM-0004": "t1n t1c t2w t2f seg"},
    ),
    "UCSF-BMSR": (
        "UCSF_BrainMetastases_TRAIN/100101A/100101A_{T1pre,T1post,FLAIR,T2Synth,subtraction,seg,BraTS-seg}.nii.gz",
        {"100101A": "t1n t1c t2f seg"},
    ),
    "UCSF-POSTOP-GLIOMA": (
        "100010/100010_time1_{t1,t1ce,t2,flair,seg}.nii.gz 100010/100010_time2_{t1,t1ce,t2,flair,seg}.nii.gz",
        {"100010_time1": "t1n t1c t2w t2f seg", "100010_time2": "t1n t1c t2w t2f seg"},
    ),
    "LUMIERE": (
        "Patient-001/week-000-1/{T1,CT1,T2,FLAIR}.nii.gz Patient-001/week-044/{T1,CT1,FLAIR}.nii.gz "
        "Patient-001/week-044/HD-GLIO-AUTO-segmentation/registered/{CT1_r2s_bet_reg,segmentation}.nii.gz "
        "Patient-001/week-044/DeepBraTumIA-segmentation/atlas/skull_strip/{ct1,t1,flair}_skull_strip.nii.gz",
        {"Patient-001_week-000-1": "t1n t1c t2w t2f", "Patient-001_week-044": "t1n t1c t2f seg"},
    ),
    "EGD": (
        "EGD-0001/1_T1/NIFTI/T1.nii.gz EGD-0001/2_T1GD/NIFTI/T1GD.nii.gz EGD-0001/3_T2/NIFTI/T2.nii.gz "
        "EGD-0001/4_FLAIR/NIFTI/FLAIR.nii.gz EGD-0001/5_MASK/NIFTI/MASK.nii.gz "
        "EGD-0002/1_T1/NIFTI/T1.nii.gz EGD-0002/5_MASK/NIFTI/MASK.nii.gz",
        {"EGD-0001": "t1n t1c t2w t2f seg", "EGD-0002": "t1n seg"},
    ),
    "MSLesSeg": (
        "train/P1/T1/P1_T1_{T1,T2,FLAIR,MASK}.nii.gz train/P1/T2/P1_T2_{T1,T2,FLAIR,MASK}.nii.gz "
        "train/P2/T1/P2_T1_{T1,T2,FLAIR,MASK}.nii.gz test/P54/P54_{T1,T2,FLAIR,MASK}.nii.gz",
        {
            "P1_T1": "t1n t2w t2f seg",
            "P1_T2": "t1n t2w t2f seg",
            "P2_T1": "t1n t2w t2f seg",
            "P54": "t1n t2w t2f seg",
        },
    ),
    "MSSEG 2016": (
        "Center_01/Patient_01/Raw_Data/{3DFLAIR,3DT1,3DT1GADO,T2,DP}.nii.gz "
        "Center_01/Patient_01/Preprocessed_Data/{FLAIR,T1,GADO,T2,DP}_preprocessed.nii.gz "
        "Center_01/Patient_01/Masks/{Brain_Mask,Consensus,ManualSegmentation_1,ManualSegmentation_2}.nii.gz",
        {"Center_01_Patient_01": "t1n t1c t2w t2f pdw seg"},
    ),
    "MSSEG-2 2021": (
        "training/013/{flair_time01_on_middle_space,flair_time02_on_middle_space,ground_truth}.nii.gz",
        {"training_013_time01": "t2f", "training_013_time02": "t2f"},
    ),
    "ISBI 2015": (
        "training01/orig/training01_01_{flair,mprage,pd,t2}.nii.gz "
        "training01/preprocessed/training01_01_{flair,mprage,pd,t2}_pp.nii "
        "training01/preprocessed/training01_02_{flair,mprage,pd,t2}_pp.nii training01/masks/training01_01_mask1.nii",
        {"training01_01": "t1n t2w t2f pdw seg", "training01_02": "t1n t2w t2f pdw"},
    ),
    "WMH 2017": (
        "Utrecht/0/orig/{3DT1,3DT1_mask,FLAIR,T1}.nii.gz Utrecht/0/pre/{3DT1,FLAIR,T1}.nii.gz Utrecht/0/wmh.nii.gz",
        {"Utrecht_0": "t1n t2f seg"},
    ),
    "MRBrainS 2018": (
        "1/orig/{3DT1,3DT1_mask,FLAIR,IR,T1}.nii.gz 1/pre/{FLAIR,IR,reg_3DT1,reg_IR,reg_T1}.nii.gz 1/segm.nii.gz",
        {"1": "t1n t2f seg"},
    ),
    "ISLES 2015": (
        "1/VSD.Brain.XX.O.MR_DWI.70613/VSD.Brain.XX.O.MR_DWI.70613.nii "
        "1/VSD.Brain.XX.O.MR_T1.70615/VSD.Brain.XX.O.MR_T1.70615.nii "
        "1/VSD.Brain.XX.O.MR_Flair.70614/VSD.Brain.XX.O.MR_Flair.70614.nii",
        {"1": "t1n t2f"},
    ),
    "ISLES 2022": (
        "sub-strokecase0001/ses-0001/anat/sub-strokecase0001_ses-0001_FLAIR.nii.gz "
        "sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_{dwi,adc}.nii.gz "
        "derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz",
        {"sub-strokecase0001_ses-0001": "t2f seg"},
    ),
    "IXI": (
        "IXI-T1/IXI002-Guys-0828-T1.nii.gz IXI-T2/IXI002-Guys-0828-T2.nii.gz IXI-PD/IXI002-Guys-0828-PD.nii.gz "
        "IXI-MRA/IXI002-Guys-0828-MRA.nii.gz IXI-DTI/IXI002-Guys-0828-DTI-00.nii.gz",
        {"IXI002-Guys-0828": "t1n t2w pdw"},
    ),
    "OASIS-3": (
        "OAS30001_MR_d0129/anat2/sub-OAS30001_ses-d0129_run-01_T1w.nii.gz "
        "OAS30001_MR_d0129/anat3/sub-OAS30001_ses-d0129_T2w.nii.gz "
        "OAS30001_MR_d0129/anat4/sub-OAS30001_ses-d0129_FLAIR.nii.gz",
        {"sub-OAS30001_ses-d0129": "t1n t2w t2f"},
    ),
    "RSNA-MICCAI": (
        "train/00000/FLAIR/scan.nii.gz train/00000/T1w/scan.nii.gz train/00000/T1wCE/scan.nii.gz "
        "train/00000/T2w/scan.nii.gz train/00002/FLAIR/scan.nii.gz",
        {"train_00000": "t1n t1c t2w t2f", "train_00002": "t2f"},
    ),
    "UK Biobank": (
        "1000032_2_0/T1/{T1,T1_brain,T1_brain_mask,T1_unbiased,T1_unbiased_brain,T1_brain_to_MNI}.nii.gz "
        "1000032_2_0/T1/T1_fast/{T1_brain_pve_0,T1_brain_seg}.nii.gz 1000032_2_0/lesions/final_mask.nii.gz "
        "1000032_2_0/T2_FLAIR/{T2_FLAIR,T2_FLAIR_brain,T2_FLAIR_unbiased,T2_FLAIR_brain_to_MNI}.nii.gz",
        {"1000032_2_0": "t1n t2f seg"},
    ),
    "Yale metastases": (
        "YG_0BCZ/2012-03-01/YG_0BCZ_2012-03-01_{PRE,POST,T2,FLAIR}.nii.gz "
        "YG_0BCZ/2012-06-01/YG_0BCZ_2012-06-01_{PRE,POST,T2,FLAIR}.nii.gz",
        {"YG_0BCZ_2012-03-01": "t1n t1c t2w t2f", "YG_0BCZ_2012-06-01": "t1n t1c t2w t2f"},
    ),
    "Ljubljana MS": (
        "cross_sectional/raw/patient01/{FLAIR,T1W,T1WKS,T2W,consensus_gt,brainmask}.nii.gz "
        "cross_sectional/raw/patient02/{FLAIR,T1W,T1WKS,T2W,consensus_gt}.nii.gz",
        {
            "cross_sectional_raw_patient01": "t1n t1c t2w t2f seg",
            "cross_sectional_raw_patient02": "t1n t1c t2w t2f seg",
        },
    ),
    "ADNI": (
        "002_S_0295/MPRAGE/2006-04-18_08_20_30.0/I13722/"
        "ADNI_002_S_0295_MR_MPRAGE_br_raw_20060418193713091_1_S13408_I13722.nii "
        "002_S_0295/MPR__GradWarp__B1_Correction__N3__Scaled/2006-04-18_08_20_30.0/I45107/"
        "ADNI_002_S_0295_MR_MPR__GradWarp__B1_Correction__N3__Scaled_Br_20070319113623975_S13408_I45107.nii "
        "002_S_0295/Axial_PD_T2_FSE/2006-04-18_08_20_30.0/I13719/"
        "ADNI_002_S_0295_MR_Axial_PD_T2_FSE_br_raw_20060418193538378_1_S13407_I13719.nii "
        "002_S_0295/Axial_T2-FLAIR/2011-06-02_07_56_36.0/I239487/"
        "ADNI_002_S_0295_MR_Axial_T2-FLAIR_br_raw_20110603120000123_1_S110476_I239487.nii "
        "002_S_0295/Axial_T2_Star/2011-06-02_07_56_36.0/I239488/"
        "ADNI_002_S_0295_MR_Axial_T2_Star_br_raw_20110603120000124_1_S110477_I239488.nii",
        {"002_S_0295_2006-04-18": "t1n", "002_S_0295_2011-06-02": "t2f"},
    ),
    "XNAT": (
        "S1/scans/2-T1/resources/NIFTI/files/scan.nii.gz S1/scans/3-T2/resources/NIFTI/files/scan.nii.gz",
        {"S1": "t1n t2w"},
    ),
}
PATIENTS = {  # of those layouts where a patient has several studies
    "ADNI": "002_S_0295 002_S_0295",
    "BraTS 2024": "BraTS-GLI-00005 BraTS-GLI-00005",
    "UCSF-POSTOP-GLIOMA": "100010 100010",
    "LUMIERE": "Patient-001 Patient-001",
    "MSLesSeg": "P1 P1 P2 P54",
    "Yale metastases": "YG_0BCZ YG_0BCZ",
}


def expand(text: str) -> list[str]:
    """Names with every {a,b} written out."""
    found = []
    for name in re.findall(r"(?:\{[^}]*\}|\S)+", text):
        before, brace, rest = name.partition("{")
        options, _, after = rest.partition("}")
        found += [before + option + after for option in options.split(",")] if brace else [name]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_public_cohorts(layout: str) -> None:
    files, expected = LAYOUTS[layout]
    found = recognise([Path("c", file) for file in expand(files)], root=Path("c"))
    assert {s.case: " ".join([*s.images(), *(["seg"] if s.label() else [])]) for s in found} == expected
    if layout in PATIENTS:
        assert [s.patient for s in found] == PATIENTS[layout].split()


def found_in(*files: str) -> dict[str, dict[str, str]]:
    """Case → modality → the file's name, of files below a folder c."""
    found = recognise([Path("c", file) for name in files for file in expand(name)], root=Path("c"))
    return {study.case: names(study) for study in found}


class TestWhatOtherFilesSay:
    @pytest.mark.parametrize(
        ("files", "cases"),
        [
            ("P1/P1_{T2,T1_FLAIR}.nii", "P1"),
            ("P1/P1_{T1,T2,T2_FLAIR}.nii", "P1"),
            ("P1/P1_{T1_T1,T1_FLAIR,T2_T2,T2_FLAIR}.nii", "P1_T1 P1_T2"),
            ("P1/T1/P1_T1_FLAIR.nii P1/P1_T2/P1_T2_FLAIR.nii", "P1 P1_T2"),
            ("P1/{pre_T1,post_T1,T2}.nii", "P1"),
            ("P1/P1_{pre_T1,pre_FLAIR,post_T1,post_FLAIR}.nii", "P1_pre P1_post"),
            ("P1/{pre_T1,pre_FLAIR,post_T1,post_FLAIR}.nii", "P1_pre P1_post"),
            ("P1/{baseline_T1,baseline_T2,followup_T1}.nii P2/baseline_T1.nii", "P1_baseline P1_followup P2_baseline"),
            ("P1/{2_T1,3_T2,4_FLAIR,5_T1ce}.nii", "P1"),
            ("{1_T1,2_T1,3_T1}.nii", "1 2 3"),
            ("{001_T1,001_FLAIR,002_T1,002_FLAIR}.nii", "001 002"),
            ("7/7_T1.nii 8/8_T1.nii", "7 8"),
            ("P1/1_T1/T1.nii P1/2_T2/T2.nii", "P1"),
            ("P1/T1/T1.nii P1/T2/T2.nii", "P1"),
            ("P1/T1/{T1,T2}.nii P1/T2/{T1,T2}.nii", "P1_T1 P1_T2"),
            ("P1/T1/T1.nii P1/T0/T1.nii", "P1_T1 P1_T0"),
            ("P1/pre/T1.nii P1/post/T1.nii", "P1_pre P1_post"),
            ("P1/pre/T1.nii P1/orig/T1.nii", "P1"),
            ("S/scans/3-T2/NIFTI/x.nii S/scans/4-FLAIR/NIFTI/x.nii", "S"),
            ("P1/baseline/P1_{T1,T2}.nii P1/followup/P1_T1.nii", "P1_baseline P1_followup"),
            ("2019-03-01/P1_T1.nii 2020-03-01/anat/P1_T1.nii", "P1_2019-03-01 P1_2020-03-01"),
            ("P1/T0/P1_T1.nii P1/T1/P1_T1.nii P1/T1/P1_T2.nii", "P1_T0 P1_T1"),
            ("sub-1/ses-2/anat/sub-1_T1w.nii", "sub-1_ses-2"),
            ("P1/baseline/P1_baseline_T1.nii", "P1_baseline"),
            ("T1/P1_T1.nii T2/P1_T2.nii", "P1"),
            ("P1/P1_{T1_visit1,T1_visit2,T2_visit1}.nii", "P1_visit1 P1_visit2"),
        ],
    )
    def test_cases(self, files: str, cases: str) -> None:
        assert sorted(found_in(*files.split())) == sorted(cases.split())

    def test_several_series_of_one_contrast_are_never_several_patients(self) -> None:
        found = study("P1/2_T1.nii", "P1/3_T2.nii", "P1/7_T1.nii")
        with pytest.raises(NamingError, match="2 files claim to be t1n"):
            found.images()

    def test_an_agent_alone_counts_beside_other_contrasts(self) -> None:
        assert found_in("P1/P1_{PRE,POST,FLAIR}.nii") == {
            "P1": {"t1n": "P1_PRE.nii", "t1c": "P1_POST.nii", "t2f": "P1_FLAIR.nii"}
        }
        assert found_in("P1/P1_{PRE,POST}.nii") == {"P1": {}}

    def test_a_cases_name_does_not_depend_on_its_neighbours(self) -> None:
        alone = found_in("site1/P1/T1.nii", "site1/P2/T1.nii")
        assert found_in("site1/P1/T1.nii", "site1/P2/T1.nii", "site2/P1/T1.nii").keys() - alone.keys() == {"site2_P1"}
        assert alone.keys() == {"site1_P1", "site1_P2"}


class TestOneOfSeveral:
    @pytest.mark.parametrize(
        ("files", "taken", "passed_over"),
        [
            ("FLAIR FLAIR_bet FLAIR_n4_bet", "FLAIR", "FLAIR_bet FLAIR_n4_bet"),
            ("FLAIR_bet FLAIR_n4_bet", "FLAIR_bet", "FLAIR_n4_bet"),
            ("FLAIR (1)|FLAIR", "FLAIR", "FLAIR (1)"),
            ("T1 FLAIR FLAIR_to_T1", "FLAIR_to_T1 T1", "FLAIR"),
            ("T1 T1_to_MNI", "T1", "T1_to_MNI"),
            ("T1 T1_FLAIR", "T1", "T1_FLAIR"),
            ("orig/T1 orig/FLAIR pre/T1 pre/FLAIR", "pre/FLAIR pre/T1", "orig/FLAIR orig/T1"),
            ("raw/T1 raw/T2 raw/FLAIR preprocessed/T1", "raw/FLAIR raw/T1 raw/T2", "preprocessed/T1"),
        ],
    )
    def test_the_plainest_is_taken_and_the_others_are_listed(self, files: str, taken: str, passed_over: str) -> None:
        paths = [f"P/{file}.nii" for file in (files.split("|") if "|" in files else files.split())]
        found = study(*paths)
        assert sorted(map(str, found.images().values())) == [f"P/{file}.nii" for file in taken.split()]
        expected = [passed_over] if "|" in files else passed_over.split()
        assert sorted(map(str, found.passed_over)) == [f"P/{file}.nii" for file in expected]
        assert sorted(map(str, found.paths())) == sorted(paths)

    @pytest.mark.parametrize("pair", ["FLAIR_SAG FLAIR_AX", "FLAIR_1 FLAIR_2", "orig_FLAIR FLAIR_bet"])
    def test_two_alike_are_refused(self, pair: str) -> None:
        with pytest.raises(NamingError, match="2 files claim to be t2f"):
            study(*(f"P/{name}.nii" for name in pair.split())).images()


class TestMasks:
    @pytest.mark.parametrize(
        "mask",
        ["mask_FLAIR", "P1_FLAIR_lesion", "P1_T1_mask", "seg/other", "P1_brain_mask", "Brain_Mask", "masks/P1_T1_mask"],
    )
    def test_they_are_no_image_and_no_case(self, mask: str) -> None:
        name = mask.replace("seg/other", "seg/other_mask")
        found = found_in("P1/P1_{T1,T2}.nii", f"P1/{name}.nii", "P2/P2_T1.nii")
        assert found == {"P1": {"t1n": "P1_T1.nii", "t2w": "P1_T2.nii"}, "P2": {"t1n": "P2_T1.nii"}}

    def test_those_of_a_patient_without_images_are_left_out(self) -> None:
        assert found_in("images/P1_T1.nii", "labels/P1_seg.nii", "labels/P2_seg.nii").keys() == {"P1"}

    def test_one_for_each_contrast_is_of_the_head(self) -> None:
        found = study(*(f"P1/P1_{c}{m}.nii" for c in ("T1", "T2", "FLAIR") for m in ("", "_mask")))
        assert found.label() is None
        assert len(found.images()) == 3

    @pytest.mark.parametrize(
        ("files", "label"),
        [
            ("a/P1_segm.nii b/P1_automated_approx_segm.nii", "P1_segm.nii"),
            ("P1/P1_automated_approx_segm.nii", "P1_automated_approx_segm.nii"),
            ("P1/P1_seg.nii P1/P1_BraTS-seg.nii", "P1_seg.nii"),
            ("P1/Consensus.nii P1/ManualSegmentation_1.nii P1/ManualSegmentation_2.nii", "Consensus.nii"),
            ("P1/P1_seg.nii P1/P1_T1_mask.nii", "P1_seg.nii"),
        ],
    )
    def test_the_segmentation_of_several(self, files: str, label: str) -> None:
        found = study("P1/P1_T1.nii", *files.split())
        assert (found.label() or Path()).name == label


class TestNnUNet:
    @pytest.mark.parametrize("key", ["channel_names", "modality"])
    def test_channels_are_read_from_dataset_json(self, tmp_path: Path, key: str) -> None:
        touch(tmp_path, *(f"imagesTr/P1_000{n}.nii.gz" for n in range(4)), "imagesTs/P2_0001.nii.gz")
        touch(tmp_path, "labelsTr/P1.nii.gz", "labelsTr/P9.nii.gz")
        channels = {"0": "FLAIR", "1": "T1", "2": "T1ce", "3": "CT"}
        (tmp_path / "dataset.json").write_text(json.dumps({key: channels, "labels": {"background": 0}}))
        first, second = find_studies(tmp_path)
        assert names(first) == {"t1n": "P1_0001.nii.gz", "t1c": "P1_0002.nii.gz", "t2f": "P1_0000.nii.gz"}
        assert first.label() == tmp_path / "labelsTr/P1.nii.gz"
        assert [path.name for path in first.unrecognised] == ["P1_0003.nii.gz"]
        assert (second.case, names(second)) == ("P2", {"t1n": "P2_0001.nii.gz"})

    @pytest.mark.parametrize("text", ["", "[]", '{"channel_names": {"a": 1}}', '{"channel_names": ["T1"]}'])
    def test_a_dataset_json_of_something_else_says_nothing(self, tmp_path: Path, text: str) -> None:
        touch(tmp_path, "P1_0000.nii.gz", "P1_t1.nii.gz")
        (tmp_path / "dataset.json").write_text(text)
        (found,) = find_studies(tmp_path)
        assert names(found) == {"t1n": "P1_t1.nii.gz"}


_WORDS = "P1 T1 T2 FLAIR T1ce pre post seg mask bet to 2 1 baseline T0 brain pd ax MNI r anat orig x sub-1 week-040 CT1"
_NAMES = st.lists(st.sampled_from(_WORDS.split()), min_size=1, max_size=5).map("_".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(_NAMES, min_size=1, max_size=4).map("/".join), min_size=1, max_size=8, unique=True))
def test_whatever_the_names_every_image_is_in_one_study_once(names: list[str]) -> None:
    paths = [Path("c", f"{name}.nii.gz") for name in names]
    found = recognise(paths, root=Path("c"))
    listed = [path for study in found for path in study.paths()]
    assert len({study.case for study in found}) == len(found)
    assert len(set(listed)) == len(listed)
    assert all(re.search("seg|mask", path.name) for path in {*paths} - {*listed})
    assert recognise(paths[::-1], root=Path("c")) == found
