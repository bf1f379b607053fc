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

import math
import re
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
LARGEST, OF_ONE_VALUE, OUTSIDE = 0.6, 0.4, 0.1
"""More of the head than this is no lesion, nor, if all labels have one value, more than that; nor is what lies outside
it by this share. Real ones: .1 and .001, and .45 in a tight crop of a large tumour with its oedema."""
RULE = 2
"""Counts the rules of `not_a_lesion`: labels that went by an earlier one are prepared again."""
CLOSED_MM, NEAR_MM, FEWEST = 20.0, 6.0, 50
"""Outside lies, in as many voxels or more, what is farther than the second from the head, closed by balls of the first:
the cavity of a resection opens to the surface, and small lesions lie at it."""
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


def not_a_lesion(labels: Labels, head: Mask, spacing_mm: Sequence[float]) -> str:
    """Why labels, as they are counted, cannot be of a lesion of this head; '' where they can."""
    lesion = labels > 0
    size = int(lesion.sum())
    largest = OF_ONE_VALUE if size and (labels[lesion] == labels.max()).all() else LARGEST
    if size > largest * head.sum():
        return f"it covers more than {largest:.0%} of the head, as masks of the brain or of its tissues do"
    outside = lesion & ~head
    if outside.sum() < max(OUTSIDE * size, FEWEST):
        return ""
    if _far(outside, head, spacing_mm) < max(OUTSIDE * size, FEWEST):
        return ""
    return f"{OUTSIDE:.0%} or more of it lies outside the head"


def _far(outside: Mask, head: Mask, spacing_mm: Sequence[float]) -> int:
    """How many voxels of a part outside the head lie farther than NEAR_MM from the closed head."""
    from scipy.ndimage import distance_transform_edt

    margins = [math.ceil(CLOSED_MM / size) + 1 for size in spacing_mm]
    where = np.argwhere(outside)
    box = tuple(
        slice(max(0, int(low) - 2 * margin), int(high) + 2 * margin + 1)
        for low, high, margin in zip(where.min(0), where.max(0), margins, strict=True)
    )
    if not head[box].any():
        return len(where)
    padded = [(margin, margin) for margin in margins]
    dilated = distance_transform_edt(~np.pad(head[box], padded), sampling=spacing_mm) <= CLOSED_MM
    depth = distance_transform_edt(dilated, sampling=spacing_mm)
    return int((depth[np.pad(outside[box], padded)] <= CLOSED_MM - NEAR_MM).sum())


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
