"""What names of files say together: layouts of public cohorts, masks, copies."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_naming import names, study, touch

from crossmr.data.formats import stem_of
from crossmr.data.naming import StudyFiles, find_studies, recognise
from crossmr.data.tree import NamesInTree, folder_names
from crossmr.errors import NamingError

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
    "OASIS-3, as its archive has it": (
        "OAS30001_MR_d0129/anat2/NIFTI/sub-OAS30001_sess-d0129_T1w.nii.gz "
        "OAS30001_MR_d0757/anat2/NIFTI/sub-OAS30001_sess-d0757_acq-TSE_T2w.nii.gz",
        {"sub-OAS30001_sess-d0129": "t1n", "sub-OAS30001_sess-d0757": "t2w"},
    ),
    "RHUH-GBM": (
        "RHUH-0001/0/RHUH-0001_0_{t1,t1ce,t2,flair,adc,segmentations}.nii.gz "
        "RHUH-0001/1/RHUH-0001_1_{t1,t1ce,t2,flair,adc,segmentations}.nii.gz",
        {"RHUH-0001_0": "t1n t1c t2w t2f seg", "RHUH-0001_1": "t1n t1c t2w t2f seg"},
    ),
    "BraTS-Reg": (
        "BraTSReg_002/BraTSReg_002_{00_0000,01_0262}_{t1,t1ce,t2,flair}.nii.gz",
        {"BraTSReg_002_00_0000": "t1n t1c t2w t2f", "BraTSReg_002_01_0262": "t1n t1c t2w t2f"},
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
    "BraTS-Reg": "BraTSReg_002 BraTSReg_002",
    "LUMIERE": "Patient-001 Patient-001",
    "RHUH-GBM": "RHUH-0001 RHUH-0001",
    "OASIS-3, as its archive has it": "sub-OAS30001 sub-OAS30001",
    "MSLesSeg": "P1 P1 P2 P54",
    "Yale metastases": "YG_0BCZ YG_0BCZ",
}


def expand(text: str) -> list[str]:
    """Names with every {a,b} written out."""
    found = []
    for name in re.findall(r"(?:\{[^}]*\}|\S)+", text):
        before, brace, rest = name.partition("{")
        options, _, after = rest.partition("}")
        found += expand(" ".join(before + option + after for option in options.split(","))) if brace else [name]
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
            ("P1/P1_{pre_T1ce,post_T1ce}.nii", "P1_pre P1_post"),
            ("P1/{Pre_T1Gd,Post_T1Gd}.nii", "P1_Pre P1_Post"),
            ("P1/P1_{post_T1ce,post_FLAIR}.nii", "P1_post"),
            ("P1/P1_{T1,T2,post_T1ce}.nii", "P1"),
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
            # what several folders share and has no digit is no patient's name, unless a folder has it
            ("P1/final_{T1,seg}.nii P1/T2.nii P2/final_T2.nii", "P1 P2"),
            ("P1/SRI24_T1.nii P2/SRI24_T2.nii", "P1 P2"),
            ("P1/{baseline,followup}/scan_T1.nii P2/baseline/scan_T2.nii", "P1_baseline P1_followup P2_baseline"),
            ("P1_2019-03-01/final_T1.nii P2/final_T2.nii", "P1_2019-03-01 P2"),
            ("{P1,P2}/{T1,T2}/final_scan.nii", "P1 P2"),
            ("P1-T1/final_T1.nii P1-T2/final_T2.nii P2-T1/final_T1.nii", "P1 P2"),
            ("{HGG,LGG}/{Ann,Bob}_T1.nii", "HGG_Ann HGG_Bob LGG_Ann LGG_Bob"),
            ("Ann_T1.nii x/Ann_T2.nii", "Ann x"),
            ("Ann/Ann_T1.nii raw/Ann/deep/Ann_T2.nii", "Ann"),
            ("set-T1/{Ann,Bob}_T1.nii set-T2/{Ann,Bob}_T2.nii", "Ann Bob"),
            # nor is what says a series, a scanner or a form
            ("PAT_A/MNI152NLin2009_T1.nii PAT_B/MNI152NLin2009_FLAIR.nii", "PAT_A PAT_B"),
            ("PAT_A/{Series3_T1,Series4_T2,Series7_FLAIR}.nii PAT_B/{Series3_T1,Series4_FLAIR}.nii", "PAT_A PAT_B"),
            *(
                (f"PAT_A/{head}_T1.nii PAT_B/{head}_FLAIR.nii", "PAT_A PAT_B")
                for head in [
                    "3.000000",
                    "IM-0001",
                    "S003",
                    "ser3",
                    "brain1",
                    "iso1mm",
                    "MNI152NLin2009",
                    "MRI_3T",
                    "1.5T",
                    "hdbet2",
                ]
            ),
            (
                "site1/{S3_T1,S4_T1,S5_T2}.nii site2/{S3_T1,S4_FLAIR}.nii",
                "site1_S3 site1_S4 site1_S5 site2_S3 site2_S4",
            ),
            ("T1/{S3,S4}_T1.nii FLAIR/{S3,S4}_FLAIR.nii", "S3 S4"),
            ("x/{S3,S4}_T1.nii x/S3_T2.nii", "S3 S4"),
            ("{baseline,followup}/{Ann,Bob}_T1.nii", "Ann_baseline Ann_followup Bob_baseline Bob_followup"),
        ],
    )
    def test_cases(self, files: str, cases: str) -> None:
        assert sorted(found_in(*files.split())) == sorted(cases.split())

    @pytest.mark.parametrize(
        ("files", "t1c", "cases"),
        [
            # after a T1, pre or post with a number or a date is of the agent, unless another contrast has it
            ("P1/{T1_1,T1_post_1,T2_1,FLAIR_1}.nii", "T1_post_1", "P1"),
            ("P1/{T1_20190101,T1_post_20190101,T2_20190101}.nii", "T1_post_20190101", "P1_20190101"),
            ("P1_{T1_post1,T1_pre1,T2}.nii", "P1_T1_post1", "P1"),
            ("P1/{T1_post_1,T2_post_1,T1_pre_1,T2_pre_1}.nii", "", "P1_post_1 P1_pre_1"),
            ("P1_{T1_post1,T1_pre1,T2_post1,T2_pre1}.nii", "", "P1_post1 P1_pre1"),
            # as dcm2niix names them, with the series at the end
            (
                "P1/P1_{t1_sag_20200101101010_3,t1_sag_post_20200101101010_7,t2_tirm_dark-fluid_20200101101010_6}.nii",
                "P1_t1_sag_post_20200101101010_7",
                "P1_20200101101010",
            ),
            # what is denied before the contrast
            ("{P1,P2}/{non_contrast_T1,T2,FLAIR}.nii", "", "P1 P2"),
            ("{P1,P2}/{no_gad_T1,wo_contrast_T2}.nii", "", "P1 P2"),
            ("P1_{without_contrast_T1,T1}.nii", "", "P1"),
            # folders named after the agent
            ("{P1,P2}/{T1_pre,T1_post}/T1.nii {P1,P2}/T2/T2.nii", "T1", "P1 P2"),
            ("{P1,P2}/{pre_contrast,post_contrast}/NIFTI/T1.nii {P1,P2}/T2/T2.nii", "T1", "P1 P2"),
            ("P1/{pre,post}/{T1,T2}.nii", "", "P1_pre P1_post"),
            ("P1/space-T1c/T1.nii", "", "P1_space-T1c"),
            ("{T1/P1_T1,FLAIR/P1_FLAIR}_{pre1,post1}.nii", "", "P1_pre1 P1_post1"),  # whichever folders they are in
            ("P1_{T1_post_20200101_3,FLAIR_post_20200101_3}.nii", "", "P1_post_20200101_3"),
            ("P1_T1_{pre1,post1,post2}.nii", "", "P1 P1_post1 P1_post2"),
        ],
    )
    def test_an_agent_before_or_after(self, files: str, t1c: str, cases: str) -> None:
        found = found_in(*files.split())
        assert sorted(found) == sorted(cases.split())
        assert {images.get("t1c", "").removesuffix(".nii") for images in found.values()} == {t1c}
        assert all(images.keys() & {"t1n", "t2w"} for images in found.values())

    def test_a_folder_of_an_agent_overrules_no_file_that_says_another(self) -> None:
        for files in ("P1/contrast/{T1_pre,T1_post}.nii", "P1/T1Gd/{T1_noGd,T1_Gd}.nii", "P1/T1c/{T1n,T1c}.nii"):
            (images,) = found_in(files).values()
            assert sorted(images) == ["t1c", "t1n"]
        assert found_in("{P1,P2}_T1.nii") == {"P1": {"t1n": "P1_T1.nii"}, "P2": {"t1n": "P2_T1.nii"}}

    def test_a_name_like_a_denial_is_a_patient_s_beside_another_contrast(self) -> None:
        assert found_in("{Sin,Kim}_{Gd_T1,T2}.nii").keys() == {"Sin", "Kim"}

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


def test_a_name_without_its_suffix():
    assert [stem_of(name) for name in ("a.nii", "a.nii.gz", "a.NII.GZ", "a.b.nii", "a.json")] == [
        *"aaa",
        "a.b",
        "a.json",
    ]
    assert stem_of("a.nii.gz.part") == "a.nii.gz.part"


class TestFoldersOfOneContrast:
    @pytest.mark.parametrize(
        ("files", "cases"),
        [
            ("{T1,T2,FLAIR}/{P1,P2}.nii", {"P1": "t1n t2w t2f", "P2": "t1n t2w t2f"}),
            ("{t1,t1ce}/{001,002}.nii t2/001.nii", {"001": "t1n t1c t2w", "002": "t1n t1c"}),
            ("P1/{T1,T2}/{scan1,scan2}.nii", {"P1_scan1": "t1n t2w", "P1_scan2": "t1n t2w"}),
            ("T1/P1.nii T2/P2.nii", {"c": "t1n t2w"}),
            ("P1/T1/scan.nii P1/T2/scan.nii P2/T1/scan.nii", {"P1": "t1n t2w", "P2": "t1n"}),
        ],
    )
    def test_files_of_the_same_name_in_them_are_of_one_patient(self, files: str, cases: dict[str, str]) -> None:
        assert {case: " ".join(images) for case, images in found_in(*files.split()).items()} == cases


def test_the_way_to_a_template_is_no_image() -> None:
    """SPM's y_T1 of T1, in whichever folder; y_T1 alone is of a patient called y."""
    assert found_in("P1/{T1,y_T1,iy_T1}.nii", "P2/{T1,mri/y_T1}.nii") == {
        "P1": {"t1n": "T1.nii"},
        "P2": {"t1n": "T1.nii"},
    }
    assert found_in("y_T1.nii").keys() == {"y"}


def test_of_two_planes_the_one_of_most_files_is_taken() -> None:
    found = study(*(f"P1/{name}.nii" for name in ("SAG_T1", "AX_T1_POST", "AX_T2", "COR_T2", "AX_FLAIR")))
    assert names(found)["t2w"] == "AX_T2.nii"
    assert [path.name for path in found.passed_over] == ["COR_T2.nii"]
    found = study("P1/AX_T2.nii", "P1/COR_T2.nii")
    with pytest.raises(NamingError, match="2 files claim to be t2w"):
        found.images()


def test_folders_are_named_by_as_much_as_makes_them_unique():
    folders = [Path(f"/c/{name}") for name in ("P1/a", "P2/a", "P2/b")]
    assert folder_names(folders, Path("/c")) == dict(zip(folders, ("P1_a", "P2_a", "b"), strict=True))


def test_folders_whose_names_would_be_one_are_told_apart():
    found = recognise([Path("c/A_B/C/T1.nii"), Path("c/A/B_C/T2.nii")], root=Path("c"))
    assert [re.sub("_[0-9a-f]{6}$", "", study.case) for study in found] == ["A_B_C", "A_B_C"]
    assert sorted(str(path) for study in found for path in study.images().values()) == [
        "c/A/B_C/T2.nii",
        "c/A_B/C/T1.nii",
    ]
    assert len({study.case for study in found}) == len({study.patient for study in found}) == 2


def test_each_name_is_read_once_with_its_folder():
    names = NamesInTree([Path("/c/P1/T1.nii"), Path("/c/P1/P2_T1.nii")], None, Path("/c"))
    assert [names.case(path, reading) for path, reading in names.readings] == ["P2", "P1"]


def test_all_cases_of_sites_that_share_a_name_are_called_after_their_site() -> None:
    found = recognise(
        [Path("c", f"{name}.nii") for name in ["A/P1_T1", "A/P1_T2", "A/P1_seg", "A/P1_x", "A/P1_fu_T1", "A/P2_T1"]]
        + [Path("c", f"{name}.nii") for name in ["B/P1_T1", "B/P1_T2", "B/P1_seg", "B/P2_T2", "B/P3_T1"]],
        root=Path("c"),
    )
    cases = {study.case: (study.patient, [path.name for path in study.paths()]) for study in found}
    assert cases == {
        "A_P1": ("A_P1", ["P1_T1.nii", "P1_T2.nii", "P1_seg.nii", "P1_x.nii"]),
        "A_P1_fu": ("A_P1", ["P1_fu_T1.nii"]),
        "B_P1": ("B_P1", ["P1_T1.nii", "P1_T2.nii", "P1_seg.nii"]),
        "A_P2": ("A_P2", ["P2_T1.nii"]),
        "B_P2": ("B_P2", ["P2_T2.nii"]),
        "B_P3": ("B_P3", ["P3_T1.nii"]),
    }


@pytest.mark.parametrize(
    ("files", "cases"),
    [
        ("A/{P1,P2}_T1.nii B/P1_FLAIR.nii B/P2_T1.nii", "A_P1 A_P2 B_P1 B_P2"),
        ("siteA/P1_{T1,T2}.nii siteB/P1_{T1_MPRAGE,FLAIR}.nii", "siteA_P1 siteB_P1"),
        (
            "data/siteA/{P1,P2}_T1.nii data/siteB/P1_FLAIR.nii data/siteB/P2_T1.nii",
            "siteA_P1 siteA_P2 siteB_P1 siteB_P2",
        ),
        ("{A,B}_nifti/P1_T1.nii A_nifti/P2_T1.nii B_nifti/P2_T2.nii", "A_nifti_P1 A_nifti_P2 B_nifti_P1 B_nifti_P2"),
        ("Norman/{P1,P2}_T1.nii Origami/P1_T1.nii Origami/P2_T2.nii", "Norman_P1 Norman_P2 Origami_P1 Origami_P2"),
        ("{x,y}/{A,B}/P1_T1.nii", "x_A_P1 x_B_P1 y_A_P1 y_B_P1"),
        ("site1/P1/P1_T1.nii site10/P1_T1.nii", "site1_P1 site10_P1"),
        ("{Hospital_A,Hospital_C}/P1_T1.nii", "Hospital_A_P1 Hospital_C_P1"),
        ("{A,B,A_n4}/P1_T1.nii", "A_P1 B_P1"),
        # folders of one contrast each, and visits
        ("T1/A/P1_T1.nii T1/B/P1_T1.nii FLAIR/{A,B}/P1_FLAIR.nii", "A_P1 B_P1"),
        ("one/{P1,P2}_T1.nii two/{P1,P2}_FLAIR.nii", "P1 P2"),
        ("train/P1_baseline_T1.nii test/P1_followup_T1.nii", "P1_baseline P1_followup"),
    ],
)
def test_folders_are_sites_where_one_case_has_one_contrast_in_several(files: str, cases: str) -> None:
    assert cases_in(files) == sorted(cases.split())


def test_one_case_of_two_folders_of_several_contrasts_is_doubtful() -> None:
    """Nothing tells whether these are sites; folders of one contrast each are none."""
    (found, _) = recognise([Path("c", file) for file in expand("A/P1_T1.nii A/P2_{T1,T2}.nii B/P1_FLAIR.nii")])
    assert found.notes == ("its images lie in A and in B: are they of one patient?",)
    for files in ("one/{P1,P2}_T1.nii two/{P1,P2}_FLAIR.nii", "P1/x/P1_T1.nii P1/y/P1_T2.nii P2/x/P2_T1.nii"):
        assert not any(s.notes for s in recognise([Path("c", file) for file in expand(files)], root=Path("c")))


def cases_in(files: str) -> list[str]:
    return [s.case for s in recognise([Path("c", file) for file in expand(files)], root=Path("c"))]


@pytest.mark.parametrize(
    "folders",
    [
        "rawdata|B",
        "A|preproc",
        "T1w|T1",
        "imgs|imgs_smoothed",
        "imgs|imgs_denoised",
        "imgs|imgs_denoised|Ann",
        "structural|structural_unstripped|S003",
        "cases|cases_cropped",
        "images_cropped|images_full",
        "cohort|cohort_completed",
        "siteA_raw|siteA_n4",
        "T1_images|T1gd_images",
        "Gado|Nativ",
        "mit KM|ohne KM",
        "CE|nonCE",
        "axial|sagittal",
        "3T|7T",
        "x/P1/1|x/P1/2",
        "P1_a|P1_b",
    ],
)
def test_copies_planes_and_agents_are_no_sites(folders: str) -> None:
    """Two files of one contrast are refused, not taken for two patients."""
    one, other, *who = folders.split("|")
    name = who[0] if who else "P1"
    (found,) = recognise([Path("c", folder, f"{name}_T1.nii") for folder in (one, other)], root=Path("c"))
    assert (found.case, found.patient) == (name, name)
    with pytest.raises(NamingError, match="2 files claim to be t1n"):
        found.images()


def test_visits_are_no_sites() -> None:
    for first, other in (
        *(("baseline", "followup"), ("scan1", "scan2"), ("V1", "V2"), ("MR1", "MR2"), ("T0", "T3")),
        *(("M00", "M12"), ("d0129", "d0757")),
    ):
        visits = [Path("c", folder, f"{who}_T1.nii") for folder in (first, other) for who in ("P1", "P2")]
        studies = recognise(visits, root=Path("c"))
        assert [s.case for s in studies] == [f"{who}_{visit}" for who in ("P1", "P2") for visit in (first, other)]
        assert [s.patient for s in studies] == ["P1", "P1", "P2", "P2"]


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
            ("P1/P1_T1_bet_mask.nii", ""),  # HD-BET
            ("P1/P1_T1_seg.nii P1/P1_T1_pve_0.nii P1/P1_T1_pve_1.nii", ""),  # FSL FAST
            ("P1/P1_T1_seg.nii P1/P1_T1_pve_0.nii P1/P1_lesion.nii", "P1_lesion.nii"),
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
    assert all(re.search("seg|mask", str(path)) for path in {*paths} - {*listed})
    assert recognise(paths[::-1], root=Path("c")) == found


def recognised(*files: str) -> list[StudyFiles]:
    """The studies of files below one root; braces are alternatives."""
    return recognise([Path("/r") / file for text in files for file in expand(text)], root=Path("/r"))


@pytest.mark.parametrize("case", ["B12", "AD_001", "MD_001", "DIR_01", "L1_baseline_3T", "WMH_001_MR1"])
def test_a_label_called_like_a_case_is_its_label_whatever_its_words_may_say(case: str) -> None:
    (found,) = recognised(f"images/{case}_{{T1,FLAIR}}.nii.gz", f"labels/{case}.nii.gz")
    assert found.labels == (Path(f"/r/labels/{case}.nii.gz"),)


@pytest.mark.parametrize(
    "folders", ["cohort external", "images external", "data data2", "scan rescan", "UCL UCLA", "pre-chemo post-chemo"]
)
def test_folders_that_are_no_forms_of_one_another_are_no_copies(folders: str) -> None:
    found = recognised(*(f"{folder}/P01/P01_{{T1,FLAIR}}.nii.gz" for folder in folders.split()))
    assert [len(study.images()) for study in found] == [2, 2]


@pytest.mark.parametrize("folders", ["imgs imgs_smoothed", "cohort cohort_completed", "cohort_cropped cohort_full"])
def test_folders_that_are_forms_of_one_another_are_copies(folders: str) -> None:
    (found,) = recognised(*(f"{folder}/P01/P01_{{T1,FLAIR}}.nii.gz" for folder in folders.split()))
    with pytest.raises(NamingError, match="2 files claim to be"):
        found.images()


def test_of_train_and_test_the_repeated_cases_alone_are_called_after_them() -> None:
    """So that the visits of a patient who lies in both are of one patient."""
    found = recognised(
        *(f"training/BraTS-GLI-0000{k}-000/BraTS-GLI-0000{k}-000-{{t1n,t2f}}.nii.gz" for k in (1, 2, 3)),
        *(f"validation/BraTS-GLI-0000{k}/BraTS-GLI-0000{k}-t1n.nii.gz" for k in ("1-001", "2-000", "4-000")),
    )
    by_patient = {}
    for one in found:
        by_patient.setdefault(one.patient, []).append(one.case)
    assert by_patient["BraTS-GLI-00001"] == ["BraTS-GLI-00001-000", "BraTS-GLI-00001-001"]
    assert {"training_BraTS-GLI-00002-000", "validation_BraTS-GLI-00002-000", "BraTS-GLI-00003-000"} <= {
        one.case for one in found
    }


@pytest.mark.parametrize("name", ["{0}/P01/T1.nii.gz", "{0}_P01_T1.nii.gz"])
def test_a_patient_of_many_dates_stays_one(name: str) -> None:
    dates = [f"2019-{month:02d}-01" for month in range(1, 13)]
    found = recognised(*map(name.format, dates), "2019-01-02/P02/T1.nii.gz", "2019-01-02/P03/T1.nii.gz")
    assert {one.patient for one in found} == {"P01", "P02", "P03"}


def test_series_of_people_whose_folder_s_name_holds_a_contrast_s_are_theirs() -> None:
    """PD is no contrast in UCSF-PDGM-0004."""
    found = recognised(*(f"UCSF-PDGM-000{k}/Series003_T1.nii.gz" for k in (4, 5)))
    assert len(found) == 2


def test_a_patient_called_u_has_images_whatever_others_are_called() -> None:
    found = recognised("u/u_T1.nii.gz", "Meier/T1.nii.gz")
    assert [[*one.images()] for one in found] == [["t1n"], ["t1n"]]


def test_many_folders_with_one_name_in_them_are_read_in_good_time() -> None:
    """Whether they are copies is not asked of each pair."""
    files = [f"Meier{k:04d}/AX7D_T1.nii.gz" for k in range(1500)]
    assert len(recognised(*files)) == 1500


def test_a_smooth_lesion_mask_is_not_taken_for_the_mask() -> None:
    (found,) = recognised("sub-01/anat/sub-01_{T1w,FLAIR,label-lesion_mask,label-lesion_desc-smooth_mask}.nii.gz")
    assert found.label() == Path("/r/sub-01/anat/sub-01_label-lesion_mask.nii.gz")
