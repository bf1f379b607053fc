"""Lesion labels, whose meaning BraTS changed from year to year, as crossmr counts them.

        1                      2        3                     4
-2015   necrosis               oedema   non-enhancing         enhancing
-2021   necrosis, non-enh.     oedema   -                     enhancing
2023    necrosis, non-enh.     oedema   enhancing             -
2024-   necrosis, non-enh.     oedema   enhancing             cavity left by a resection

Which year it is, names and values tell: no file says it. Labels above 4, such as a mask's 255, are lesion of which
nobody says that it enhances.

A mask of the brain, or a segmentation of its tissues, may have the name of a lesion's: `not_a_lesion` tells by voxels.
"""

import re
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
LARGEST, OUTSIDE = 0.4, 0.1
"""More of the head than this is no lesion, nor is what lies outside it by this share. Real ones: .1 and .001."""
ENHANCING = 3
"""Smallest label of enhancing tumour, as crossmr counts them."""
LAST = 4
"""Largest label of which a meaning is known."""
_SINCE_2023 = re.compile(r"BraTS-(GLI|MET|SSA|GoAT)-", re.I)


def cavity_is_labelled(case: str) -> bool:
    """Whether 4 is a cavity in this case's labels, by its name: `BraTS-GLI-00005-100`."""
    return bool(_SINCE_2023.search(case))


def as_counted(labels: Labels, case: str) -> Labels:
    """Labels of which 1 and 2 do not enhance, and 3 and 4 do; a cavity is no lesion."""
    labels = np.where(labels > LAST, np.uint8(1), labels)
    if not (labels == 4).any():
        return labels
    if cavity_is_labelled(case):
        return np.where(labels == 4, np.uint8(0), labels)
    return np.where(labels == ENHANCING, np.uint8(1), labels)


def not_a_lesion(labels: Labels, head: Mask) -> str:
    """Why labels, as they are counted, cannot be of a lesion of this head; '' where they can."""
    lesion = labels > 0
    if lesion.sum() > LARGEST * head.sum():
        return f"it covers more than {LARGEST:.0%} of the head, as masks of the brain or of its tissues do"
    if lesion.any() and (lesion & ~head).sum() >= OUTSIDE * lesion.sum():
        return f"{OUTSIDE:.0%} or more of it lies outside the head"
    return ""


def note_on(values: Collection[int], case: str) -> str:
    """What to say of labels that may mean something else than they are taken for; '' of all others."""
    if unknown := [int(value) for value in values if value > LAST]:
        return f"its labels above {LAST} ({', '.join(map(str, unknown[:3]))}) count as lesion that does not enhance."
    if cavity_is_labelled(case) or not (3 in values and 4 in values):
        return ""
    return (
        "its labels 3 and 4 are read as BraTS had them until 2015: 3 does not enhance, 4 does. If 4 is the cavity of a "
        "resection, as since 2024, the study's name has to begin with BraTS-GLI-."
    )
