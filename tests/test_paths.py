"""Paths that a user names wrongly: each is refused with what is wrong and what to do."""

import pytest

from crossmr import paths
from crossmr.errors import ModelError, NamingError, OutputError, SetError


def test_studies_are_a_folder(tmp_path):
    (tmp_path / "scan.nii").touch()
    paths.check_studies(tmp_path)
    with pytest.raises(NamingError, match=r"gone: does not exist\. Expected a folder"):
        paths.check_studies(tmp_path / "gone")
    with pytest.raises(NamingError, match=r"scan.nii: is a file, not a folder: give the folder that holds it"):
        paths.check_studies(tmp_path / "scan.nii")
    with pytest.raises(NamingError, match="does not exist"):
        paths.check_studies(tmp_path / ("x" * 5000))


def test_a_model_has_a_configuration(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="Train one with: crossmr train"):
        paths.check_model(tmp_path)
    (tmp_path / "model" / "config.json").touch()
    paths.check_model(tmp_path / "model")
    with pytest.raises(ModelError, match=f"Did you mean {tmp_path / 'model'}"):
        paths.check_model(tmp_path)
    with pytest.raises(ModelError, match=r"crossmr models import .*mine\.zip"):
        paths.check_model(tmp_path / "mine.zip")


def test_a_prepared_dataset_has_a_manifest(tmp_path):
    with pytest.raises(SetError, match=r"not a prepared dataset.*crossmr prepare COHORT -o SET"):
        paths.check_prepared(tmp_path)
    (tmp_path / "manifest.json").touch()
    paths.check_prepared(tmp_path)


@pytest.mark.parametrize("records", ["out", "out_records", "out/crossmr"])
def test_an_output_of_any_profile_holds_a_case(tmp_path, records):
    with pytest.raises(OutputError, match=r"out does not exist\. Name a folder that 'crossmr complete' wrote"):
        paths.check_completed(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="out holds no completed case"):
        paths.check_completed(tmp_path / "out")
    (tmp_path / records / "case").mkdir(parents=True)
    (tmp_path / records / "case" / "manifest.json").touch()
    paths.check_completed(tmp_path / "out")


def test_no_file_is_in_the_way_of_an_output(tmp_path):
    (tmp_path / "file").touch()
    for good in (tmp_path, tmp_path / "new", tmp_path / "new" / "deeper"):
        paths.check_output(good)
    for bad in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "file" / "a" / "b"):
        with pytest.raises(OutputError, match=r"file is a file\. Name another folder"):
            paths.check_output(bad)
