"""File names in, studies and modalities out."""

import re
from pathlib import Path

import pytest

from crossmr.data.naming import (
    LONGEST,
    MODALITIES,
    StudyFiles,
    _recognise,
    find_all,
    find_studies,
    modality_name,
    modality_names,
    recognise,
    unmatched,
)
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
        ("T2-study7_pd.nii.gz", "T2-study7", "pdw"),
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


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images/{0}_T1 images/{0}_T2", "labels/{0}"),
        ("images/{0}/T1 images/{0}/T2", "labels/{0}"),
        ("images/{0}/T1 images/{0}/T2", "manual_masks/{0}/seg"),
        ("site/imagesTr/{0}_T1 site/imagesTr/{0}_T2", "site/labelsTr/{0}"),
        ("{0}/T1 {0}/T2", "GT/{0}_seg"),
    ],
)
def test_labels_in_a_folder_of_their_own(tmp_path: Path, images: str, labels: str) -> None:
    for patient in ("P1", "P2"):
        touch(tmp_path, *(f"{name.format(patient)}.nii.gz" for name in (*images.split(), labels)))
    found = find_all(tmp_path)
    assert [s.patient for s in found.studies] == ["P1", "P2"]
    assert [s.label() for s in found.studies] == [tmp_path / f"{labels.format(p)}.nii.gz" for p in ("P1", "P2")]
    assert [*map(names, found.studies)] == [names(s) for s in found.studies if len(names(s)) == 2]
    assert found.unused == []


def test_a_label_beside_the_images_is_preferred_to_one_elsewhere(tmp_path: Path) -> None:
    touch(tmp_path, "P1/P1_T1.nii", "P1/P1_seg.nii", "labels/P1.nii")
    (found,) = find_studies(tmp_path)
    assert found.label() == tmp_path / "P1/P1_seg.nii"


def test_labels_of_no_study_are_known(tmp_path: Path) -> None:
    """Of another name, of a patient without images, of two visits, and those whose names say nothing."""
    touch(tmp_path, "P1/P1_T1.nii", "P1/labels/final.nii", "baseline/P2/T1.nii", "followup/P2/T1.nii")
    touch(tmp_path, "labels/P-1_seg.nii", "labels/P2.nii", "P9_seg.nii", "P1/P1_brain_mask.nii")
    unused = [str(path.relative_to(tmp_path)) for path in find_all(tmp_path).unused]
    assert unused == ["P1/labels/final.nii", "P9_seg.nii", "labels/P-1_seg.nii", "labels/P2.nii"]


def labelled(*files: str) -> tuple[dict[str, str], list[str]]:
    """Case → its segmentation, and what is used for no study, of files below a folder c."""
    found = _recognise([Path("c", f"{file}.nii") for file in files], None, Path("c"), None, ())
    labels = {study.case: study.label() for study in found.studies}
    return (
        {case: str(label.relative_to("c"))[:-4] for case, label in labels.items() if label},
        [str(path.relative_to("c"))[:-4] for path in found.unused],
    )


@pytest.mark.parametrize(
    ("files", "label"),
    [
        ("P1/preop/T1 P2/postop/T1", "labels/P2/preop"),
        ("P1/2019-01-01/P1_T1", "labels/P1/2020-05-05/seg"),
        ("P1/2019-01-01/P1_T1", "labels/2020-05-05/P1_seg"),
        ("siteA/images/P1/P1_T1 siteB/images/P3/P3_T1", "siteB/labels/P1"),
        ("siteA/images/P1/P1_T1 siteB/images/P3/P3_T1", "siteB/labels/P1_seg"),
        ("Group1/01/T1 Group2/02/T1", "labels/Group2/01/seg"),
        ("P1/1/T1 P2/2/T1", "labels/1/seg"),
        ("P1/preop/T1 P2/postop/T1", "labels/preop"),
        ("A/x/P1/T1 B/P2/T1", "labels/other/P1"),
        ("images/P1_T1 images/P2_T1", "masks/P3_FLAIR"),
    ],
)
def test_labels_of_another_patient_visit_or_site_are_not_used(files: str, label: str) -> None:
    assert labelled(*files.split(), label) == ({}, [label])


@pytest.mark.parametrize(
    ("files", "label", "case"),
    [
        ("P1/preop/T1 P2/postop/T1", "labels/P2/postop", "P2_postop"),
        ("P1/2019-01-01/P1_T1 P1/2020-05-05/P1_T1", "labels/P1/2020-05-05/seg", "P1_2020-05-05"),
        ("P1/2019-01-01/P1_T1 P2/2019-01-01/P2_T1", "labels/P2_seg", "P2_2019-01-01"),
        ("siteA/images/P1_T1 siteB/images/P1_T1", "siteB/labels/P1", "siteB_P1"),
        ("siteA/images/P1_T1 siteB/images/P1_T1", "labels/siteB/P1_seg", "siteB_P1"),
        ("Group1/01/T1 Group2/02/T1", "labels/Group2/02/seg", "Group2_02"),
        ("images/1/T1 images/2/T1", "labels/2", "images_2"),
        ("images/P1/T1 images/P2/T1", "train/labels/expert/P2/final", "images_P2"),
        ("images/P1/T1 images/P2/T1", "train/labels/P2", "images_P2"),
        ("rawdata/sub-1/anat/sub-1_T1w", "derivatives/lesions/sub-1/sub-1_mask", "sub-1"),
        ("images/P1_T1 images/P1_T2 images/P2_T1", "masks/P1_FLAIR", "P1"),  # drawn on FLAIR
        ("P1/T1 P1/T2 P2/T1", "P1/masks/FLAIR", "P1"),
    ],
)
def test_labels_join_the_study_that_no_folder_contradicts(files: str, label: str, case: str) -> None:
    assert labelled(*files.split(), label) == ({case: label}, [])


@pytest.mark.parametrize("group", ["tumor", "lesion", "wmh", "ROI", "GT"])
@pytest.mark.parametrize("name", ["{}/{}", "{}/{}_"])
def test_a_folder_of_patients_is_none_of_labels(group: str, name: str) -> None:
    """What lies beside their images is no segmentation by its folder."""
    names = (f"{name.format(place, who)}/".replace("_/", "_") for place, who in ((group, "P1"), ("control", "P2")))
    first, other = names
    files = [f"{first}{m}" for m in ("T1", "FLAIR", "DWI", "perf")] + [f"{other}{m}" for m in ("T1", "DTI")]
    assert labelled(*files) == ({}, [])
    found = recognise([Path("c", f"{file}.nii") for file in files], root=Path("c"))
    assert sorted([*study.images()] for study in found) == [["t1n"], ["t1n", "t2f"]]


def test_what_says_something_else_is_no_label_by_its_folder() -> None:
    assert labelled("images/P1_T1", "labels/P1/DWI", "labels/P1/P1_prob") == (
        {},
        ["labels/P1/DWI", "labels/P1/P1_prob"],
    )


def test_of_several_labels_by_folder_those_of_lesions_are_preferred_or_none_is_used() -> None:
    assert labelled("images/P1_T1", "labels/P1", "masks/P1") == ({"P1": "labels/P1"}, [])
    raters = [Path("c", f"{file}.nii") for file in ("images/P1_T1", "masks/rater1/P1", "masks/rater2/P1")]
    (found,) = recognise(raters, root=Path("c"))
    assert found.label() is None
    assert found.passed_over == tuple(raters[1:])
    (note,) = found.notes
    assert "2 files may be its segmentation, by the folders" in note
    named = raters[1].with_name("P1_seg.nii")  # as the note advises
    (found,) = recognise([raters[0], named, raters[2]], root=Path("c"))
    assert (found.label(), found.notes) == (named, ())


def test_a_mapping_names_labels_of_any_place(tmp_path: Path) -> None:
    touch(
        tmp_path, *(f"{place}/P{k}{end}.nii" for k in (1, 2) for place, end in (("i", "_T1"), ("i", "_T2"), ("x", "")))
    )
    assert [s.label() for s in find_studies(tmp_path)] == [None, None]
    assert [s.label() for s in find_studies(tmp_path, {"seg": "P?.nii"})] == [tmp_path / f"x/P{k}.nii" for k in (1, 2)]


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

    def test_a_pattern_is_text(self) -> None:
        with pytest.raises(ConfigError, match=r"mapping: \['\*_A\*'\] is no pattern; expected one, or several"):
            recognise([Path("a.nii")], {"t1n": ["*_A*"]})  # type: ignore[dict-item]


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


class TestModalityNames:
    @pytest.mark.parametrize("given", ["T1,FLAIR", "t1n, flair", ["T1", "FLAIR"], ["T1,FLAIR"], "T1,FLAIR,t2f"])
    def test_commas_separate(self, given: str | list[str]) -> None:
        assert modality_names(given) == ("t1n", "t2f")

    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ("T1ce FLAIR", "t1c,t2f"),
            ("T1ce-FLAIR", "t1c,t2f"),
            ("T1 FLAIR", "t1n,t2f"),
            ("T2 FLAIR", "t2w,t2f"),
            ("T2+FLAIR", "t2w,t2f"),
            ("T1;T2/PD", "t1n,t2w,pdw"),
        ],
    )
    def test_a_name_of_several_is_refused(self, text: str, names: str) -> None:
        with pytest.raises(ConfigError, match=rf"'{re.escape(text)}' names several .* with commas: {names}\.$"):
            modality_names(["t2w", text])

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("T1-FLAIR", "t1n"),
            ("T2-FLAIR", "t2f"),
            ("T2w_FLAIR", "t2f"),
            ("T1 Gd", "t1c"),
            ("T1+C", "t1c"),
            ("x1", "x1"),
        ],
    )
    def test_a_name_of_one_stays(self, text: str, name: str) -> None:
        assert modality_names(text) == (name,)


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
        with pytest.raises(NamingError, match=r"no volume \(.*\) in it or below \(2 other files\)"):
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


def test_a_case_of_a_very_long_name_has_one_that_files_can_have(tmp_path):
    above = tmp_path / ("a" * 90)
    paths = [above / ("ü" * 45) / f"{last}{'c' * 80}" / f"{m}.nii.gz" for last in "xy" for m in ("T1", "T2")]
    studies = recognise(paths, root=tmp_path)
    names = [study.case for study in studies]
    assert [len(name.encode()) <= LONGEST for name in names] == [True, True]
    assert len({*names}) == 2
    assert [[*study.candidates] for study in studies] == [["t1n", "t2w"]] * 2
    assert [study.case for study in recognise(paths[:2], root=tmp_path)] == [
        study.case for study in studies if paths[0] in study.paths()
    ]  # whatever lies beside


def test_a_pattern_that_matches_no_file_is_said(tmp_path):
    paths = [tmp_path / "P1" / name for name in ("P1-t1n.nii.gz", "P1_SWI.nii.gz")]
    studies = recognise(paths, {"swi": "*_SWI*", "t2w": "*_T2"})
    assert unmatched(studies, {"swi": "*_SWI*", "t2w": "*_T2"}) == [
        "--map t2w='*_T2' matches no file; files go by their names."
    ]
    assert unmatched(studies, None) == []


def test_sites_may_name_one_contrast_differently(tmp_path):
    touch(tmp_path, "A/A_SAGMP.nii.gz", "A/A_flair.nii.gz", "B/B_BRAVO1.nii.gz", "C/C_x|y.nii.gz")
    mapping = {"t1n": "*_SAGMP.nii.gz|*_BRAVO*|*_BRAVO1.nii.gz", "t2w": "*_x[|]y.nii.gz|*_none*"}
    found = {study.case: names(study) for study in find_studies(tmp_path, mapping)}
    assert found == {
        "A": {"t1n": "A_SAGMP.nii.gz", "t2f": "A_flair.nii.gz"},
        "B": {"t1n": "B_BRAVO1.nii.gz"},
        "C": {"t2w": "C_x|y.nii.gz"},
    }
    assert unmatched(find_studies(tmp_path, mapping), mapping) == [
        "--map t2w='*_none*' matches no file; files go by their names."
    ]
