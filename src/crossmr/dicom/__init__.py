"""DICOM: which series a folder holds, which contrast each is, conversion to NIfTI, and derived series out."""
