"""Simulated heads with gliomas: brain MRI in four contrasts for tests, demonstrations and training.

    cohort.py    one patient from a seed, many patients as the files of BraTS
    scanner.py   fractions, signal equations, coil, noise  ->  t1n, t1c, t2w, t2f
    anatomy.py   tissues, structures, lesion  ->  fractions of tissues in every voxel
    canvas.py    random fields, shapes, partial volumes

Imports run downwards only, in this order. The anatomy is not accurate enough to measure anything on it.
"""

from crossmr.phantom.cohort import Phantom, make_phantom, write_cohort

__all__ = ["Phantom", "make_phantom", "write_cohort"]
