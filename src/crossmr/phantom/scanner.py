"""Scanner: the images that four sequences give of tissue fractions. Signal equations, coil, noise, arbitrary scale."""

from math import cos, exp, log, radians, sin
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from crossmr.phantom.anatomy import Tissue
from crossmr.phantom.canvas import Array, Axes, noise

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
GADOLINIUM_R1 = 4.5
"""Longitudinal relaxivity of a gadolinium chelate in plasma, 1/(mmol/l)/s (Rohrer et al. 2005)."""


class Relaxation(NamedTuple):
    """One tissue at 3 T: T1 and T2 in ms, proton density (water = 1), contrast agent in it in mmol/l."""

    t1: float
    t2: float
    density: float
    gadolinium: float = 0.0


RELAXATION = {
    Tissue.AIR: Relaxation(1000, 10, 0.0),
    Tissue.CSF: Relaxation(4300, 1500, 1.0),
    Tissue.GREY: Relaxation(1400, 108, 0.82, 0.01),
    Tissue.WHITE: Relaxation(850, 72, 0.70),
    Tissue.DEEP_GREY: Relaxation(1250, 84, 0.79, 0.01),
    Tissue.PALLIDUM: Relaxation(1000, 66, 0.74),
    Tissue.CHOROID: Relaxation(1600, 160, 0.90, 0.5),
    Tissue.DURA: Relaxation(1000, 35, 0.55, 0.3),
    Tissue.VESSEL: Relaxation(1900, 14, 0.75, 1.0),
    Tissue.BONE: Relaxation(500, 3, 0.12),
    Tissue.MARROW: Relaxation(550, 60, 0.50),
    Tissue.FAT: Relaxation(370, 110, 0.85),
    Tissue.MUSCLE: Relaxation(1410, 45, 0.75, 0.04),
    Tissue.SKIN: Relaxation(900, 40, 0.60, 0.1),
    Tissue.MUCOSA: Relaxation(1300, 110, 0.80, 0.35),
    Tissue.GLIOSIS: Relaxation(1250, 145, 0.80),
    Tissue.OEDEMA: Relaxation(1550, 170, 0.87),
    Tissue.ENHANCING: Relaxation(1450, 115, 0.85, 0.45),
    Tissue.NECROSIS: Relaxation(2900, 250, 0.94),
}
"""Brain, muscle and blood within Wansapura et al. 1999 and Stanisz et al. 2005, fat as Gold et al. 2004; the
rest (tumour, gadolinium, the short T2 that stands for flow void) set to look as it does in clinical scans."""


def spin_echo(tissue: Relaxation, tr: float, te: float) -> float:
    """S = PD (1 - e^(-TR/T1)) e^(-TE/T2), times in ms (Bernstein et al. 2004, ch. 14)."""
    return tissue.density * (1 - exp(-tr / tissue.t1)) * exp(-te / tissue.t2)


def spoiled_gradient_echo(tissue: Relaxation, tr: float, te: float, flip_degrees: float) -> float:
    """S = PD sin a (1 - E1) / (1 - cos a E1) e^(-TE/T2*), E1 = e^(-TR/T1), with T2* taken as T2 (Ernst)."""
    e1, flip = exp(-tr / tissue.t1), radians(flip_degrees)
    return tissue.density * sin(flip) * (1 - e1) / (1 - cos(flip) * e1) * exp(-te / tissue.t2)


def inversion_recovery(tissue: Relaxation, tr: float, te: float, ti: float) -> float:
    """S = PD |1 - 2 e^(-TI/T1) + e^(-TR/T1)| e^(-TE/T2), magnitude image (Hajnal et al. 1992)."""
    recovered = abs(1 - 2 * exp(-ti / tissue.t1) + exp(-tr / tissue.t1))
    return tissue.density * recovered * exp(-te / tissue.t2)


def enhanced(tissue: Relaxation) -> Relaxation:
    """The tissue after contrast agent: 1/T1' = 1/T1 + r1 C."""
    return tissue._replace(t1=1 / (1 / tissue.t1 + GADOLINIUM_R1 * tissue.gadolinium / 1000))


def _tissues(rng: np.random.Generator) -> list[Relaxation]:
    """This patient's tissues at 1.5 or 3 T (T1 ~ B0^0.38 but for fluids; Rooney et al. 2007), in `Tissue` order."""
    factor = (rng.choice([1.5, 3.0]) / 3) ** 0.38
    table = np.array([RELAXATION[tissue] for tissue in Tissue])
    table *= np.exp(rng.normal(0, [0.03, 0.05, 0.015, 0.2], table.shape))
    table[:, 0] *= np.where(np.arange(len(Tissue)) == Tissue.CSF, 1, factor)
    return [Relaxation(*row) for row in table.tolist()]


def _signals(rng: np.random.Generator) -> Array:
    """One scanner and protocol: the signal of every tissue in every contrast, (modalities, tissues)."""
    tissues = _tissues(rng)
    gradient_echo = rng.random() < 0.6
    tr, te, flip = rng.uniform([18, 2.5, 22], [28, 5, 30])
    tr_se, te_se = rng.uniform([450, 9], [600, 14])
    tr_t2, te_t2 = rng.uniform([4200, 85], [6000, 105])
    tr_ir, te_ir, miss = rng.uniform([8500, 95, 0.98], [10500, 130, 1.02])
    csf = tissues[Tissue.CSF].t1
    null = csf * log(2 / (1 + exp(-tr_ir / csf)))  # the TI at which the CSF's magnetisation crosses zero

    def t1_weighted(tissue: Relaxation) -> float:
        return spoiled_gradient_echo(tissue, tr, te, flip) if gradient_echo else spin_echo(tissue, tr_se, te_se)

    columns = [
        (
            t1_weighted(tissue),
            t1_weighted(enhanced(tissue)),
            spin_echo(tissue, tr_t2, te_t2),
            inversion_recovery(tissue, tr_ir, te_ir, miss * null),
        )
        for tissue in tissues
    ]
    return np.array(columns, np.float32).T


def scan(scanner: np.random.Generator, receiver: np.random.Generator, fractions: Array, axes: Axes) -> dict[str, Array]:
    """Modality -> magnitude image (X, Y, Z) in arbitrary units >= 0, of fractions (tissues, X, Y, Z).

    Each sequence has its own point spread, bias field (mostly the coil's), Rician noise and scale. The generator
    `receiver` draws the noise and the strength of each of these, `scanner` all else.
    """
    signals = _signals(scanner)
    ideal = np.tensordot(signals, fractions, axes=1)  # (modalities, X, Y, Z)
    ideal *= 1 + 0.03 * noise(scanner, axes, 5.0)  # no tissue is all of one kind
    coil = noise(scanner, axes, 75.0)
    images = {}
    for modality, signal, white in zip(MODALITIES, ideal, signals[:, Tissue.WHITE], strict=True):
        image = ndimage.gaussian_filter(signal, receiver.uniform(0.25, 0.5))
        image *= np.exp(receiver.uniform(0.05, 0.14) * coil + 0.05 * noise(scanner, axes, 75.0))
        sigma = np.float32(white * receiver.uniform(0.012, 0.035))
        real, imaginary = sigma * receiver.standard_normal((2, *image.shape), dtype=np.float32)
        scale = np.exp(receiver.uniform(log(150), log(2500))) / white
        images[modality] = np.asarray(np.hypot(image + real, imaginary) * scale, np.float32)
    return images
