"""Nothing of others is ever replaced or deleted by `complete`; layouts by themselves are in test_layout.py."""

import json
import os
from pathlib import Path

import nibabel as nib
import pytest
from conftest import image, make_head

from crossmr.completion.cohort import CohortSettings, complete_cohort
from crossmr.completion.layout import Layout, records_of
from crossmr.errors import OutputError
from crossmr.networks.inference import Settings

SETTINGS = Settings(ddim_steps=1, precision="float32")
BIDS, CHALLENGE = (CohortSettings(profile=profile) for profile in ("bids", "challenge"))


def contents(folder):
    """Every file, folder and link below a folder; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture
def raw(tmp_path):
    """A BIDS dataset, with somebody's derivatives."""
    folder = tmp_path / "raw"
    (folder / "sub-01" / "anat").mkdir(parents=True)
    for suffix, modality in (("T1w", "t1n"), ("T2w", "t2w")):
        nib.save(image(make_head(modality)), folder / "sub-01" / "anat" / f"sub-01_{suffix}.nii.gz")
    (folder / "derivatives" / "other").mkdir(parents=True)
    for place in (folder, folder / "derivatives" / "other"):
        (place / "dataset_description.json").write_text('{"Name": "mine", "Authors": ["me"]}')
        (place / "README").write_text("mine")
    (folder / ".bidsignore").write_text("extra/")
    return folder


@pytest.mark.parametrize(
    ("out", "match"),
    [
        ("raw", "raw is the input .*raw, and a BIDS derivative is a dataset of its own"),
        (".", "holds the input"),
        ("raw/sub-01", r"lies in the input .*Name another folder, such as .*raw/derivatives/crossmr"),
        ("raw/derivatives", "lies in the input"),
        ("raw/derivatives/../new", "lies in the input"),
        ("link", "link is the input"),
        ("raw/derivatives/other", r"other/dataset_description\.json is not crossmr's.*Name another folder"),
    ],
)
def test_a_bids_derivative_never_replaces_a_dataset(raw, model, tmp_path, out, match):
    (tmp_path / "link").symlink_to(raw)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=match):
        complete_cohort(raw, tmp_path / out, model, SETTINGS, BIDS)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["README", ".bidsignore"])
def test_a_bids_derivative_is_no_folder_with_another_s_readme(raw, model, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(OutputError, match=rf"{name} is not crossmr's"):
        complete_cohort(raw, tmp_path / "out", model, SETTINGS, BIDS)
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_a_bids_derivative_goes_on_and_keeps_what_was_written_into_its_readme(raw, model, tmp_path):
    out = raw / "derivatives" / "crossmr"
    before = contents(raw)
    assert complete_cohort(raw, out, model, SETTINGS, BIDS).completed == {"sub-01": ["t1c", "t2f"]}
    (out / "README").write_text("changed")
    assert complete_cohort(raw, out, model, SETTINGS, CohortSettings(profile="bids", overwrite=True)).failed == {}
    assert (out / "README").read_text() == "changed"
    assert before.items() <= contents(raw).items()
    sidecar = out / "sub-01" / "anat" / "sub-01_desc-synthetic_FLAIR.json"
    assert json.loads(sidecar.read_text())["GeneratedBy"][0]["Name"] == "crossmr"
    sidecar.write_text('{"GeneratedBy": [{"Name": "another"}, {"Name": "crossmr"}]}')
    before = contents(raw)
    with pytest.raises(OutputError, match=r"FLAIR\.json is not crossmr's"):
        complete_cohort(raw, out, model, SETTINGS, CohortSettings(profile="bids", overwrite=True))
    assert contents(raw) == before


@pytest.mark.parametrize("out", [".", "..", "out/..", "out/."])
def test_the_records_of_a_folder_without_a_name(small, model, tmp_path, monkeypatch, out):
    (tmp_path / "work" / "out").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    where = (tmp_path / "work" / out).resolve()
    result = complete_cohort(small, out, model, SETTINGS, CHALLENGE)
    assert list(result.failed) == ["Ann"]  # on another grid than BraSyn's
    records = records_of(Path(out))
    assert records.resolve() == where.with_name(f"{where.name}_records")
    assert (records / "manifest.json").exists()


def test_the_records_are_locked_and_not_another_s(small, model, tmp_path):
    records = tmp_path / "out_records"
    records.mkdir()
    (records / "thesis.tex").write_text("mine")
    with pytest.raises(
        OutputError, match=r"out_records holds thesis\.tex, which is not crossmr's.*Name another folder"
    ):
        complete_cohort(small, tmp_path / "out", model, SETTINGS, CHALLENGE)
    assert contents(records) == {"thesis.tex": b"mine"}
    (records / "thesis.tex").unlink()
    with Layout(records).locked():
        pass
    layout = Layout(tmp_path / "out", "challenge")
    with layout.locked():
        assert (records / ".crossmr.lock").exists()
        assert (layout.out / ".crossmr.lock").exists()
