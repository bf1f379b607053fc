"""One case: what is finished is kept, and said where its settings or files have changed."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from conftest import Listener, image, make_head, tree

from crossmr.completion.case import CohortSettings
from crossmr.completion.cohort import complete_cohort
from crossmr.display import Display
from crossmr.networks.inference import Settings

SHAPE = (26, 28, 22)
SETTINGS = Settings(ddim_steps=3, device="cpu", precision="float32")
AGAIN = CohortSettings(overwrite=True)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"guidance": "unconditional"}, {"targets": ("t1c",)}, {"ddim_steps": 4}]
)
def test_other_settings_are_noticed_and_said(model, small, tmp_path, change):
    complete_cohort(small, tmp_path / "out", model, SETTINGS)
    before = tree(tmp_path / "out" / "Ann")
    listener = Listener()
    result = complete_cohort(small, tmp_path / "out", model, replace(SETTINGS, **change), display=listener)
    assert result.skipped == ["Ann"]
    assert [line for line in listener.said if "Ann: finished before with other settings" in line]
    assert tree(tmp_path / "out" / "Ann") == before


def test_overwriting_leaves_nothing_that_the_new_manifest_does_not_name(model, small, tmp_path):
    out = tmp_path / "out"
    complete_cohort(small, out, model, SETTINGS)
    complete_cohort(small, out, model, replace(SETTINGS, targets=("t1c",)), AGAIN)
    assert {path.name for path in (out / "Ann").iterdir()} == {"Ann-t1c_synthetic.nii.gz", "manifest.json"}
    # a scan that has been acquired in the meantime closes its gap
    nib.save(image(make_head("t1c", shape=SHAPE)), small / "Ann" / "Ann-t1c.nii.gz")
    complete_cohort(small, out, model, SETTINGS, AGAIN)
    assert {path.name for path in (out / "Ann").iterdir()} == {"Ann-t2f_synthetic.nii.gz", "manifest.json"}


def test_a_finished_case_whose_inputs_changed_is_kept_and_said(model, small, tmp_path, capsys):
    complete_cohort(small, tmp_path / "out", model, SETTINGS)
    (changed,) = small.rglob("Ann-t1n.nii.gz")
    image = nib.load(changed)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 2, image.affine, image.header), changed)
    again = complete_cohort(small, tmp_path / "out", model, SETTINGS, display=Display())
    assert again.skipped == ["Ann"]
    assert "Ann: finished before with other input files, and kept; --overwrite" in capsys.readouterr().out
