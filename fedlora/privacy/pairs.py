"""Dominating pairs: two distributions P and Q that no two neighbours are told apart better than, and their composition.

A pair is given by its hockey-stick divergences H_ε(P ‖ Q) = E_P (1 − e^ε dQ/dP)₊ at the losses ε = 0, mesh, 2·mesh, ….
If those of a mechanism are nowhere larger, neither are they after any number of steps, adaptive ones too (Zhu, Dong and
Wang, 2022). Connecting the dots between the losses of a grid gives a pair again, a slightly larger one (Doroshenko et
al., 2022), which dp-accounting composes.

One record that becomes another (`replace`). A step of DP-SGD takes it with probability q; x and x', ‖·‖ ≤ C, are its
clipped gradients. By advanced joint convexity (see `fedlora.privacy.user_level`), for ε ≥ 0 and e^ε' = 1 + q (e^ε − 1),

    H_ε'(q N(x) + (1−q) N(0) ‖ q N(x') + (1−q) N(0))  =  q H_ε(N(x) ‖ (1−β) N(0) + β N(x')),

which Kahane's inequality makes largest at x = C, x' = −C: there ‖x‖², ‖x − x'‖² and x·(x − x') all are. With x and x'
exchanged it is the same, so that one curve serves both directions, and by H_−ε(P ‖ Q) = 1 − e^−ε (1 − H_ε(Q ‖ P)) negative
ε too. Half of σ in the pair of adding and removing would not do: its divergences at ε < 0 are smaller.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np

LARGEST = 700.0  # privacy loss on a grid: e^709 is the last that a float64 can hold
MOST_POINTS = 2**18  # of one step's losses, on either side of zero; a coarser mesh is a looser bound
FINENESS = 20  # points within a standard deviation of one step's loss: ε is then too large by a thousandth at most
TAIL = 9.0  # standard deviations of the noise beyond which a step counts as laid open (probability 1e-19)

Curves = tuple[np.ndarray, np.ndarray]  # H(P ‖ Q) and H(Q ‖ P) at 0, mesh, 2·mesh, …


class OutOfReach(ArithmeticError):
    """A numerical bound cannot be computed here; the text says why."""


def compose(steps: Sequence[tuple[Curves, int]], mesh: float, delta: float) -> float:
    """ε at `delta` of steps with these curves, each taken so many times.

    Guarantee: an upper bound, too large by the coarseness of the mesh; a thousandth of δ is kept for rounding. Raises
    `OutOfReach` where rounding would take more.
    """
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    slack, total = delta / 1000, sum(count for _, count in steps)
    if total * sys.float_info.epsilon > slack:
        raise OutOfReach(f"privacy.delta={delta:g} is within the rounding of {total} steps")
    whole: PrivacyLossDistribution | None = None
    for (ahead, back), count in steps:
        other = None if back is ahead else _losses(back, ahead, mesh)
        part = PrivacyLossDistribution(_losses(ahead, back, mesh), other).self_compose(count)
        whole = part if whole is None else whole.compose(part)
    assert whole is not None  # a history that spends nothing comes to no accountant
    with np.errstate(over="ignore"):
        return float(whole.get_epsilon_for_delta(delta - slack))


def replace(history: Mapping[tuple[float, float], int], delta: float) -> float:
    """ε of steps {(σ, q): count} where neighbours differ in one record that has become another.

    Guarantee: an upper bound, and the exact ε for the pair of the head of this file but for a thousandth. Raises
    `OutOfReach` for σ below about 0.07, and for δ within the rounding of so many steps.
    """
    largest = {key: float(_loss(np.array(1 + TAIL * key[0]), *key)) for key in history}
    if max(largest.values()) > LARGEST:
        raise OutOfReach(f"a privacy loss of up to {max(largest.values()):.0f} is too large for its grid")
    mesh = min(max(_deviation(*key) / FINENESS, largest[key] / MOST_POINTS) for key in history)
    mesh = max(mesh, max(largest.values()) / MOST_POINTS)
    steps = []
    for key, count in history.items():
        curve = replaced(mesh * np.arange(math.ceil(largest[key] / mesh) + 1), *key)
        steps.append(((curve, curve), count))
    return compose(steps, mesh, delta)


def replaced(losses: np.ndarray, sigma: float, rate: float) -> np.ndarray:
    """H_ε(P ‖ Q) for each ε ≥ 0 of `losses`, P = q N(1) + (1−q) N(0), Q = q N(−1) + (1−q) N(0), C = 1.

    dP/dQ > e^ε above the point t with w = e^(t/σ²) the positive root of w² − a e^ε w − e^ε = 0,
    a = e^(1/2σ²) (1 − e^−ε) (1−q)/q.
    """
    from scipy.special import log_ndtr, ndtr

    a = -np.expm1(-losses) * (1 - rate) / rate * np.exp(0.5 / sigma**2)
    point = sigma**2 * (losses + np.log((a + np.sqrt(a * a + 4 * np.exp(-losses))) / 2))
    apart = ndtr((1 - point) / sigma) - np.exp(losses + log_ndtr(-(1 + point) / sigma))
    alike = (1 - np.exp(-losses)) * np.exp(losses + log_ndtr(-point / sigma))
    return np.clip(rate * apart - (1 - rate) * alike, 0, 1)


def _losses(ahead: np.ndarray, back: np.ndarray, mesh: float):  # type: ignore[no-untyped-def]  # of dp-accounting
    """The distribution of P's loss against Q, from H(P ‖ Q) and H(Q ‖ P) at losses ≥ 0."""
    from dp_accounting.pld import pld_pmf

    points = len(ahead) - 1
    below = 1 - np.exp(-mesh * np.arange(points, 0, -1)) * (1 - back[:0:-1])
    curve = np.append(below, ahead)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(mesh, -points, points, curve)


def _loss(x: np.ndarray, sigma: float, rate: float) -> np.ndarray:
    """log dP/dQ at x of the pair of `replaced`."""
    out = math.log1p(-rate) if rate < 1 else -math.inf
    ahead, back = (np.logaddexp(out, math.log(rate) + (sign * x - 0.5) / sigma**2) for sign in (1, -1))
    loss: np.ndarray = ahead - back
    return loss


def _deviation(sigma: float, rate: float) -> float:
    """About the root mean square of that loss under P."""
    x = np.linspace(-TAIL * sigma, 1 + TAIL * sigma, 2001)
    density = rate * np.exp(-(((x - 1) / sigma) ** 2) / 2) + (1 - rate) * np.exp(-((x / sigma) ** 2) / 2)
    return math.sqrt(float(np.sum(density * _loss(x, sigma, rate) ** 2) / np.sum(density)))
