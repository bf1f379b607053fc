"""Names and sidecars of BIDS."""

import json
from pathlib import Path

import pytest

from crossmr.data.bids import case_of, enhanced_by_sidecar, last_runs, read_bids
from crossmr.data.naming import find_studies, recognise


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        *[(f"acq-{a}_T1w", "t1c") for a in ("postgad", "gd", "T1Gd", "ce", "post", "MPRAGEGd", "mprageKM", "contrast")],
        *[(f"acq-{a}_T1w", "t1n") for a in ("pre", "mprage", "3d", "highres", "postop", "nativ", "FLAIR", "ax")],
        *[(f"acq-{a}_T1w", "t1c") for a in ("GdNoFS", "gdNoFatSat", "postNoNorm", "ceNoGap")],
        *[(f"acq-{a}_T1w", "t1n") for a in ("preGd", "nonGd", "mprageNoGd", "preContrast", "withoutContrast")],
        *[(f"ce-{c}_T1w", "t1c") for c in ("gadolinium", "gad", "Gadovist", "GADOLINIUM", "1")],
        *[(f"ce-{c}_T1w", "t1n") for c in ("none", "no", "pre", "NONE", "without", "native")],
        *[(f"ce-{c}_T1w", "t1n") for c in ("noncontrast", "nogad", "nocontrast", "unenhanced")],
        ("acq-oKM_T1w", "t1n"),
        ("ce-unknown_T1w", ""),
        ("ce-gd_FLAIR", ""),
        ("ce-none_FLAIR", "t2f"),
        ("acq-gd_T2w", ""),
        ("acq-FLAIR_T2w", "t2f"),
        ("acq-DarkFluid_T2w", "t2f"),
        ("part-mag_T1w", "t1n"),
        ("part-phase_T1w", ""),
        ("part-real_T2w", ""),
        ("inv-1_MP2RAGE", ""),
        ("inv-2_part-mag_MP2RAGE", ""),
        ("inv-1_T1w", ""),
        ("UNIT1", "t1n"),
        ("acq-gd_UNIT1", "t1c"),
        ("T1map", ""),
        ("T2starw", ""),
        ("PDT2", ""),
        ("PDw", "pdw"),
        ("PD", "pdw"),
        ("echo-1_T2w", "t2w"),
        ("echo-2_MESE", ""),
        ("desc-synthetic_FLAIR", ""),
        ("desc-syntheticstd_FLAIR", ""),
        ("space-T1w_desc-lesion_mask", "label"),
        ("desc-brain_mask", ""),
        ("desc-aseg_dseg", ""),
        ("space-T1w_desc-aparcaseg_dseg", ""),
        ("label-GM_mask", ""),
        ("label-lesion_mask", "label"),
        ("desc-tumor_dseg", "label"),
        ("T1w__dup-01", "t1n"),
    ],
)
def test_suffix_and_entities_say_the_contrast(name: str, meaning: str) -> None:
    reading = read_bids(f"sub-01_{name}")
    assert reading is not None
    assert (reading.meaning, reading.head) == (meaning, "sub-01")


@pytest.mark.parametrize("name", ["P1_T1", "sub-01", "sub-T2_FLAIR_x y", "T1w", "sub-01__T1w"])
def test_other_names_are_none(name: str) -> None:
    assert read_bids(name) is None


def test_the_case_is_subject_and_session() -> None:
    assert case_of("sub-01_ses-02_acq-x_T1w") == "sub-01_ses-02"
    assert case_of("sub-01_sess-02_T1w") == "sub-01_sess-02"  # OASIS-3
    assert case_of("sub-01_T1w") == "sub-01"
    assert case_of("P1_T1w") == "P1_T1w"


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["run-1_T1w", "run-2_T1w"], "run-2_T1w"),
        (["run-2_T1w", "run-10_T1w", "run-09_T1w"], "run-10_T1w"),
        (["T1w", "T1w__dup-01", "T1w__dup-02"], "T1w"),
        (["T1w", "acq-lowres_T1w"], "T1w"),
        (["T1w", "rec-norm_T1w"], "T1w"),
        (["T1w", "echo-1_T1w", "echo-2_T1w"], "T1w"),
        (["T1w", "space-MNI152NLin6Asym_T1w"], "T1w"),
        (["T1w", "acq-pre_T1w"], "T1w"),
    ],
)
def test_the_plainest_name_and_the_last_run_are_taken(names: list[str], taken: str) -> None:
    files = [Path(f"sub-1/anat/sub-1_{name}.nii.gz") for name in names]
    (study,) = recognise(files)
    assert study.images() == {"t1n": Path(f"sub-1/anat/sub-1_{taken}.nii.gz")}
    assert {*study.passed_over} == {*files} - {study.images()["t1n"]}


@pytest.mark.parametrize("lesion", ["label-lesion_mask", "desc-lesion_mask", "label-tumor_dseg", "mask"])
def test_tissues_are_no_label_beside_a_lesion_s(lesion: str) -> None:
    """The dseg of fMRIPrep is of tissues."""
    files = [Path(f"sub-01/anat/sub-01_{name}.nii.gz") for name in ("T1w", "dseg", lesion)]
    (found,) = recognise(files)
    assert found.label() == files[2]


def test_an_image_in_the_space_of_another_is_preferred() -> None:
    names = ("T1w", "T2w", "space-T1w_T2w", "space-T1w_FLAIR")
    (study,) = recognise([Path(f"sub-1/sub-1_{name}.nii.gz") for name in names])
    assert [path.name for path in study.images().values()] == [
        f"sub-1_{name}.nii.gz" for name in ("T1w", "space-T1w_T2w", "space-T1w_FLAIR")
    ]


def test_images_of_one_name_and_run_are_all_kept_so_that_they_are_refused() -> None:
    a, b, c = Path("a/sub-1_T1w.nii"), Path("b/sub-1_T1w.nii"), Path("b/sub-1_run-2_T2w.nii")
    assert last_runs({a: 0, b: 0, c: 2}) == sorted([a, b, c])


# ---------------------------------------------------------------- sidecars


def tree(root: Path, files: dict[str, object]) -> Path:
    """Empty images, and sidecars of this content."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def taken(root: Path) -> dict[str, str]:
    """Modality → the name of its file, of the only study."""
    (study,) = find_studies(root)
    return {modality: path.name for modality, path in study.images().items()}


AGENT = {"ContrastBolusIngredient": "GADOLINIUM"}


@pytest.mark.parametrize(
    ("sidecar", "modality"),
    [
        (AGENT, "t1c"),
        ({"ContrastBolusIngredient": ["GADOLINIUM"]}, "t1c"),
        ({"ContrastBolusIngredient": "Gadovist 7.5"}, "t1c"),
        ({"ContrastBolusIngredient": "NONE"}, "t1n"),
        *(({"ContrastBolusIngredient": said}, "t1n") for said in ("NO CONTRAST", "None given", "WITHOUT", "Nein", "0")),
        ({"ContrastBolusIngredient": "unknown"}, "t1n"),
        ({"ContrastBolusIngredient": ""}, "t1n"),
        ({"ContrastBolusIngredient": []}, "t1n"),
        ({"EchoTime": 0.002}, "t1n"),
        (["no object"], "t1n"),
        ("{damaged", "t1n"),
    ],
)
@pytest.mark.parametrize("stem", ["sub-1/anat/sub-1_T1w", "P1/5_T1_MPRAGE"])
def test_a_sidecar_tells_t1_from_t1ce(sidecar: object, modality: str, stem: str, tmp_path: Path) -> None:
    root = tree(tmp_path, {f"{stem}.nii.gz": "", f"{stem}.json": sidecar})
    assert taken(root) == {modality: f"{stem.rsplit('/', 1)[-1]}.nii.gz"}


@pytest.mark.parametrize("name", ["ce-none_T1w", "acq-pre_T1w"])
def test_a_name_counts_before_a_sidecar(name: str, tmp_path: Path) -> None:
    root = tree(tmp_path, {f"sub-1/sub-1_{name}.nii.gz": "", f"sub-1/sub-1_{name}.json": AGENT})
    assert [*taken(root)] == ["t1n"]


def test_the_agent_on_every_sidecar_does_not_undo_what_names_tell_apart(tmp_path: Path) -> None:
    names = ("sub-1/sub-1_T1w", "sub-1/sub-1_ce-gadolinium_T1w")
    root = tree(tmp_path, {f"{name}{end}": AGENT for name in names for end in (".nii.gz", ".json")})
    assert taken(root) == {"t1n": "sub-1_T1w.nii.gz", "t1c": "sub-1_ce-gadolinium_T1w.nii.gz"}


@pytest.mark.parametrize(
    ("above", "enhanced"),
    [
        ({"T1w.json": AGENT}, True),
        ({"acq-x_T1w.json": AGENT}, True),
        ({"acq-y_T1w.json": AGENT}, False),
        ({"T2w.json": AGENT}, False),
        ({"sub-1/sub-1_T1w.json": {"ContrastBolusIngredient": "NONE"}, "T1w.json": AGENT}, False),
        ({"sub-1/sub-1_T1w.json": {"EchoTime": 1}, "T1w.json": AGENT}, True),
        ({"T1w.json": {"ContrastBolusIngredient": "NONE"}, "acq-x_T1w.json": AGENT}, True),
    ],
)
def test_sidecars_of_folders_above_are_inherited(above: dict[str, object], enhanced: bool, tmp_path: Path) -> None:
    image = "sub-1/anat/sub-1_acq-x_T1w.nii.gz"
    root = tree(tmp_path, {image: "", **above})
    found = enhanced_by_sidecar([root / image], {root / name for name in above}, root)
    assert found == ({root / image} if enhanced else set())


def test_nothing_above_the_cohort_is_read(tmp_path: Path) -> None:
    root = tree(tmp_path, {"set/sub-1/sub-1_T1w.nii.gz": "", "T1w.json": AGENT})
    image = root / "set/sub-1/sub-1_T1w.nii.gz"
    assert enhanced_by_sidecar([image], {root / "T1w.json"}, root / "set") == set()


def test_sessions_need_no_anat(tmp_path: Path) -> None:
    names = ("sub-1_ses-1_T1w", "sub-1_ses-2_T1w", "sub-1_ses-2_FLAIR")
    root = tree(tmp_path, {f"sub-1/ses-{name.split('_')[1][-1]}/{name}.nii.gz": "" for name in names})
    assert {s.case: sorted(s.images()) for s in find_studies(root)} == {
        "sub-1_ses-1": ["t1n"],
        "sub-1_ses-2": ["t1n", "t2f"],
    }
