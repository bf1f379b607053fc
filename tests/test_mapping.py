"""Patterns of --map: their keys, their alternatives, and the case that one names."""

import pytest

from crossmr.data.mapping import alternatives, case_by_glob, mapping_key
from crossmr.data.words import LABEL
from crossmr.errors import ConfigError


def test_a_key_is_a_contrast_in_any_spelling_or_a_new_name() -> None:
    assert [mapping_key(key) for key in ("T1", "flair", "t1gd", "seg", "swi")] == ["t1n", "t2f", "t1c", LABEL, "swi"]
    for wrong in ("S W I", "", "s-wi"):
        with pytest.raises(ConfigError, match="cannot name a modality"):
            mapping_key(wrong)


def test_several_patterns_are_one_text() -> None:
    assert alternatives("*_MPRAGE*|*_BRAVO*") == ["*_MPRAGE*", "*_BRAVO*"]
    assert alternatives("a[|]b*") == ["a[|]b*"]
    with pytest.raises(ConfigError, match="is no pattern"):
        alternatives(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "glob", "case"),
    [
        ("P01_MPRAGE.nii.gz", "*_MPRAGE.nii.gz", "P01"),
        ("P01_MPRAGE_2.nii", "*MPRAGE*", "P01"),
        ("MPRAGE.nii", "MPRAGE*", ""),
        ("sub-01_acq-x_T1w.nii.gz", "*_T1w.nii.gz", "sub-01"),
    ],
)
def test_the_case_is_what_the_leading_star_stands_for(name: str, glob: str, case: str) -> None:
    assert case_by_glob(name, glob) == case
