"""A head with a glioma, made of code: four-contrast brain MRI for tests, demonstrations and training.

    cohort.py    one patient from a seed, many patients as the files of BraTS
    scanner.py   fractions, signal equations, coil, noise  ->  t1n, t1c, t2w, t2f
    anatomy.py   tissues, structures, lesion  ->  fractions of tissues in every voxel
    canvas.py    random fields, shapes, paint that mixes in a voxel

Imports run downwards only, in this order. Nothing here is anatomy to measure on.
"""

from crossmr.phantom.cohort import Phantom, make_phantom, write_cohort

__all__ = ["Phantom", "make_phantom", "write_cohort"]
