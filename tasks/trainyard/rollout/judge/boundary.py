"""Two ways to reject with a score that is a Brownian motion in information time.

Under the null the score S behaves like a Brownian motion with drift <= 0 that is read at the
moments I_1 < I_2 < ... (the information so far). Both ways hold however often one looks:

* `boundary_constant`: Z = S / sqrt(I) against C (I / Imax)^(D - 1/2), for I between a first and a
  last moment. Narrow, but only for a planned horizon.
* `log_mixture`: an e-process that never ends. Wider.
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

Floats = NDArray[np.float64]

_GRID = 400


@lru_cache(maxsize=256)
def boundary_constant(alpha: float, exponent: float, start: float) -> float:
    """Return the C for which a Brownian motion crosses C v^exponent somewhere in [start, 1] with
    probability `alpha`.

    That is the continuous crossing probability, so looking at some moments only errs on the safe
    side. C comes from root finding on `crossing_probability`.

    Args:
        alpha: error probability, in (0, 0.5).
        exponent: D; 0 is O'Brien and Fleming's shape, 0.5 is Pocock's.
        start: first moment that counts, as a share of the horizon, in (0, 1).
    """
    return float(
        brentq(lambda c: crossing_probability(c, exponent, start) - alpha, 0.2, 12.0, xtol=1e-6)
    )


def crossing_probability(constant: float, exponent: float, start: float) -> float:
    """Return P(B(v) >= constant * v^exponent for some v in [start, 1]), B a Brownian motion.

    The density g of the first crossing solves the Volterra equation of Buonocore, Nobile and
    Ricciardi (1987), g(v) = -2 psi(v | start) + 2 int g(u) psi(v | b(u), u) du, whose kernel
    vanishes at u = v. Here the start is not a point but the normal law of B(start) below the
    boundary, for which psi has a closed form. With v = start + w^2 the density is bounded at its
    left end; the midpoint rule on w turns the equation into one triangular system. Compared with
    the reflection principle (exponent 0) the error is below 1e-4 of the value.
    """
    step = sqrt(1.0 - start) / _GRID
    w = (np.arange(_GRID) + 0.5) * step
    v = start + w**2
    b = constant * v**exponent
    slope = constant * exponent * v ** (exponent - 1.0)
    first = constant * start**exponent

    mean = b * start / v
    sd = np.sqrt(start * (v - start) / v)
    u = (first - mean) / sd
    mass = ndtr(u)
    gap = (b - mean) * mass + sd * _normal_pdf(u)
    psi_start = 0.5 * _normal_pdf(b / np.sqrt(v)) / np.sqrt(v) * (slope * mass - gap / (v - start))

    later, earlier = np.tril_indices(_GRID, -1)
    dv = v[later] - v[earlier]
    rise = b[later] - b[earlier]
    psi = 0.5 * (slope[later] - rise / dv) * _normal_pdf(rise / np.sqrt(dv)) / np.sqrt(dv)
    system = np.eye(_GRID)
    system[later, earlier] = -4.0 * w[later] * psi * step
    density_in_w = solve_triangular(system, -4.0 * w * psi_start, lower=True)
    return float(ndtr(-first / sqrt(start)) + density_in_w.sum() * step)


def log_mixture(score: Floats, information: Floats, variance: float) -> Floats:
    """Return ln of the mean of exp(theta S - theta^2 I / 2) over theta ~ |N(0, variance)|.

    Every theta > 0 gives a supermartingale that starts at 1 as long as the drift of S is <= 0, and
    so does their mean: P(it ever reaches 1 / alpha) <= alpha.

    Args:
        score: S after each look.
        information: I after each look, >= 0.
        variance: of the mixing law, in 1 / information; it sets where the test is sharpest, not
            whether it is valid.
    """
    spread = 1.0 + variance * information
    reach = score * np.sqrt(variance / spread)
    return np.asarray(np.log(2.0) - 0.5 * np.log(spread) + 0.5 * reach**2 + log_ndtr(reach))


def _normal_pdf(x: Floats) -> Floats:
    return np.asarray(np.exp(-0.5 * x**2) / sqrt(2.0 * np.pi))
