"""How much privacy a history of noisy steps has spent: ε for a given δ.

One step of DP-SGD takes every record with probability q (Poisson sampling), clips its gradient to C and adds
N(0, (σC)²) to the sum. A history counts such steps by (σ, q); in any order they compose to one (ε, δ) guarantee between
neighbours, which are of one of two kinds (the adjacency):

* `add_remove`: a record is there, or it adds nothing to any sum, which then moves by C at most;
* `replace`: a record is there, or another one in its place, and the sum moves by 2C at most.

Three upper bounds for `add_remove`, all valid for any history:

* `prv` (the default): composes the distributions of the privacy loss numerically (Gopi, Lee and Wutschitz, 2021), with
  parts of Opacus; the exact ε plus 0.010;
* `rdp`: Rényi moments (Mironov, Talwar and Zhang, 2019), with Opacus' formulas; fast and 8 to 29 % looser;
* `gaussian`: exact for q = 1, and for q < 1 a bound that gives away the amplification by sampling.

For `replace`: `pairs.replace`, and for q = 1 exactly `gaussian` at half of σ.

The Gaussian-DP (central limit) accountant is not here: it understates ε.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
import warnings
from collections.abc import Mapping

import numpy as np

from fedlora import check
from fedlora.check import ConfigError
from fedlora.privacy import pairs
from fedlora.privacy.pairs import OutOfReach

History = dict[tuple[float, float], int]  # (noise multiplier σ, sampling rate q) → steps

ACCOUNTANTS = ("prv", "rdp")
ADJACENCIES = ("add_remove", "replace")
LARGEST = 1e6  # a σ above it counts as this one, which spends more: the squares of larger ones leave floats
MOST_STEPS = 2**53  # whole numbers above it are rounded in floats; no run takes as many
PRV_ERROR = 0.01  # what PRV adds to ε for its own discretisation
PRV_GRID = 2**22  # most points of one PRV grid; four times as many for all keys of a history together
HIGH_ORDERS = (72, 96, 128, 192, 256, 384, 512)  # above Opacus' 63: they matter for ε below 0.3
ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 64), *HIGH_ORDERS)
WHOLE_ORDERS = (*range(2, 17), 20, 24, 28, 32, 40, 48, 63)  # for the range of a grid: few and quick


class LooserBound(UserWarning):
    """ε comes from a looser, still valid bound, because the usual one cannot be computed for this history."""


def epsilon(
    history: Mapping[tuple[float, float], int], delta: float, accountant: str = "prv", adjacency: str = "add_remove"
) -> float:
    """The ε that `history` has spent at `delta`, between neighbours of this `adjacency`.

    Guarantee: the steps of `history` are (ε, δ)-DP for adding or removing one record, or for replacing one, if each was the
    Poisson-sampled Gaussian mechanism of its key. ε grows with steps and q and falls with σ (for "prv" up to 1e-3 of
    numerics).

    | history                             | ε                                                                     |
    |-------------------------------------|-----------------------------------------------------------------------|
    | empty, or nothing but 0 steps       | 0                                                                     |
    | σ = 0 with steps                    | inf                                                                   |
    | σ = inf                             | 0                                                                     |
    | σ above 10⁶                         | as for 10⁶, an upper bound                                            |
    | so little that ε = 0 holds at δ     | 0 to 0.01 for "prv"; never below 0                                    |
    | keys with the same (σ, q)           | as their sum: steps compose                                           |
    | several (σ, q)                      | their heterogeneous composition                                       |
    | beyond PRV (see `prv`)              | the smaller of `rdp` and `gaussian`, with a `LooserBound` warning     |
    | replace, all q = 1                  | exactly `gaussian` at σ/2                                             |
    | replace, beyond `pairs.replace`     | `gaussian` at σ/2, with a `LooserBound` warning                       |
    | replace with "rdp"                  | ConfigError: no such bound is here                                    |
    | σ < 0, q outside (0, 1], δ outside  | ConfigError                                                           |
    | (0, 1), NaN anywhere                |                                                                       |
    | steps below 0 or above 2⁵³          | ConfigError                                                           |
    """
    check.one_of(ACCOUNTANTS, **{"privacy.accountant": accountant})
    check.one_of(ADJACENCIES, **{"privacy.adjacency": adjacency})
    if adjacency == "replace" and accountant == "rdp":
        raise ConfigError("privacy.accountant=rdp bounds no privacy.adjacency=replace; set privacy.accountant=prv")
    spent: History = {}
    for (sigma, rate), steps in checked(history, delta).items():
        key = min(sigma, LARGEST), rate
        spent[key] = spent.get(key, 0) + steps
    if not spent:
        return 0.0
    if min(sigma for sigma, _ in spent) == 0:
        return math.inf
    value, reason = _epsilon(tuple(sorted(spent.items())), float(delta), accountant, adjacency)
    if reason:
        warnings.warn(f"PRV is out of reach ({reason}): ε is a looser, still valid bound", LooserBound, stacklevel=2)
    return value


def checked(history: Mapping[tuple[float, float], int], delta: float) -> History:
    """The part of `history` that spends anything; raises ConfigError for values that no mechanism has."""
    check.positive(**{"privacy.delta": delta})
    check.below_one(**{"privacy.delta": delta})
    spent: History = {}
    for (sigma, rate), steps in history.items():
        check.not_negative(**{"privacy.noise_multiplier": sigma})
        check.fraction(**{"sampling rate": rate})
        check.between(0, MOST_STEPS, steps=operator.index(steps))
        if steps > 0 and sigma < math.inf:
            spent[float(sigma), float(rate)] = operator.index(steps)
    return spent


def prv(history: History, delta: float) -> float:
    """ε by composing privacy loss distributions on a grid, as Opacus' PRVAccountant does, partly with its parts.

    Guarantee: exact ≤ prv ≤ exact + 0.012 where 2²² points make a grid that is fine enough; beyond, a coarser one is taken
    and its larger error is in the answer, so that it stays an upper bound. What is followed is the removing of a record;
    adding one costs less in every case that the tests compare with dp-accounting, which takes both. Where numerics would
    void the bound it raises `OutOfReach`:

    | case                                                  | why                                                      |
    |-------------------------------------------------------|----------------------------------------------------------|
    | δ < 1000 · steps · 2⁻⁵²                               | the FFT rounds δ by steps · 2⁻⁵³; Opacus asks for its    |
    |                                                       | error in δ to stay below δ / 1000, and then understates  |
    | range of the loss above 700 (ε of several hundred)    | e^709 overflows; Opacus returns inf after a minute       |
    | error of the grid above 1                             | Opacus' range of the loss is right for errors below 1    |
    | a result that is no number                            | the integral failed                                      |
    """
    from opacus.accountants.analysis.prv import DiscretePRV, Domain
    from scipy.fft import fftshift, irfft, next_fast_len, rfft

    steps, slack = list(history.values()), delta / 1000  # slack: the share of δ that the numerics may use
    total = sum(steps)
    if total * sys.float_info.epsilon > slack:
        raise OutOfReach(f"privacy.delta={delta:g} is within the rounding of {total} steps")
    losses = [_range({key: 1}, slack / (8 * total)) for key in history]
    half = 3 + max(_range(history, slack / 4), *losses, PRV_ERROR)
    fineness = math.sqrt(total * math.log(12 / slack) / 2)  # error in ε = mesh · fineness
    error = max(PRV_ERROR, 2 * half * fineness * max(1, len(history) / 4) / PRV_GRID)
    if half > pairs.LARGEST or error > 1:
        raise OutOfReach(f"a privacy loss of up to {half:.0f} is too large for its grid")
    mesh = error / fineness
    points = next_fast_len(math.ceil(half / mesh) + 1, real=True)  # on either side of zero
    pieces = [_discretise(*key, mesh, points) for key in history]
    shift = sum(count * shifted for count, (_, shifted) in zip(steps, pieces, strict=True))
    spectrum = math.prod(_power(rfft(piece), count) for count, (piece, _) in zip(steps, pieces, strict=True))
    domain = Domain(shift - points * mesh, shift + (points - 1) * mesh, 2 * points)
    try:
        with np.errstate(all="ignore"):
            composed = DiscretePRV(fftshift(irfft(spectrum, 2 * points)), domain)
            upper = float(composed.compute_epsilon(delta, slack, error)[2])
    except (RuntimeError, ValueError, IndexError) as failure:
        raise OutOfReach(str(failure)) from failure
    if not math.isfinite(upper):
        raise OutOfReach("its integral has no finite value")
    return max(upper, 0.0)


def rdp(history: History, delta: float) -> float:
    """ε by Rényi moments over Opacus' orders and seven higher ones, up to 512, which matter for ε below 0.3.

    Guarantee: an upper bound. For σ < 0.01 it gives away the amplification by sampling (Opacus' series does not end for
    the smallest σ); ε is above 5000 there.
    """
    return max(_rdp(history, delta, ORDERS), 0.0)


def gaussian(history: History, delta: float) -> float:
    """The exact ε of `history` as if every step had taken every record: Gaussian noise alone, μ = √Σ steps / σ².

    δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (Balle and Wang, 2018), solved for ε.

    Guarantee: exact for q = 1, and an upper bound for q < 1, since sampling is a post-processing of the pair of outputs.

    Records that are replaced move the sum twice as far: `halved(history)` is what they spend.

    | case            | ε   |
    |-----------------|-----|
    | δ(0) ≤ δ        | 0   |
    | σ² underflows   | inf |
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    mu = math.sqrt(sum(steps * (1 / sigma) ** 2 for (sigma, _), steps in history.items() if sigma > 1e-150))
    if any(sigma <= 1e-150 for sigma, _ in history):
        return math.inf

    def excess(epsilon: float) -> float:
        return float(np.exp(log_ndtr(mu / 2 - epsilon / mu)) - np.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))) - delta

    if excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta)), xtol=1e-12, rtol=1e-14))


def halved(history: History) -> History:
    """The same steps at half of their σ: noise that stands against sums twice as far apart."""
    return {(sigma / 2, rate): steps for (sigma, rate), steps in history.items()}


@functools.lru_cache(maxsize=4096)
def _epsilon(
    spent: tuple[tuple[tuple[float, float], int], ...], delta: float, accountant: str, adjacency: str
) -> tuple[float, str]:
    """ε, and why it is a looser bound than was asked for ('' if it is not)."""
    history = dict(spent)
    if adjacency == "replace":
        anyhow = gaussian(halved(history), delta)
        try:
            sampled = any(rate < 1 for _, rate in history)
            return (min(pairs.replace(history, delta), anyhow) if sampled else anyhow), ""
        except OutOfReach as reason:
            return anyhow, str(reason)
    if accountant == "rdp":
        return rdp(history, delta), ""
    try:
        return prv(history, delta), ""
    except OutOfReach as reason:
        return min(rdp(history, delta), gaussian(history, delta)), str(reason)


def _discretise(sigma: float, rate: float, mesh: float, points: int) -> tuple[np.ndarray, float]:
    """One step's loss, rounded to the grid, and the shift in [−mesh/2, mesh/2] that gives it back its mean.

    The grid is a ring of 2·points losses: 0, mesh, 2·mesh, …, then the negative ones, up to −mesh. Below log(1 − rate)
    there is nothing to compute.
    """
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

    least = math.log1p(-rate) if rate < 1 else -math.inf
    first = max(-points, math.floor(max(least / mesh, -points)) - 1)
    edges = mesh * (np.arange(first, points + 1) - 0.5)
    with np.errstate(all="ignore"):  # log(0) at the ends of the range is meant
        mass = np.diff(PoissonSubsampledGaussianPRV(rate, sigma).cdf(edges))
        mass /= mass.sum()
        # np.sum, for @ would wake the threads of BLAS
        shift = _mean_loss(sigma, rate) - mesh * float(np.sum(mass * np.arange(first, points)))
    if not abs(shift) < mesh / 2:
        raise OutOfReach("the mean of the discrete loss is not that of the loss")
    ring = np.zeros(2 * points)
    ring[:points], ring[first:] = mass[-first:], mass[:-first]
    return ring, shift


def _power(base: np.ndarray, exponent: int) -> np.ndarray:
    """base ** exponent by squaring, three times as quick as numpy's for complex numbers."""
    power = np.ones_like(base)
    while exponent:
        power = power * base if exponent & 1 else power
        base, exponent = base * base if exponent > 1 else base, exponent >> 1
    return power


def _mean_loss(sigma: float, rate: float) -> float:
    """E log dP/dQ of one step, P = q N(1, σ²) + (1−q) N(0, σ²), Q = N(0, σ²), to rounding: a trapezoid sum of an analytic
    integrand. It fixes the place of the grid, so its error counts `steps` times; Opacus' own integral, of the distribution
    function, is slower and off by 1e-8 for small σ.
    """
    step = min(sigma, sigma * sigma) / 4  # the integrand is analytic within π σ² of the real line
    x = np.arange(-12 * sigma, 1 + 12 * sigma, step)
    density = rate * np.exp(-(((x - 1) / sigma) ** 2) / 2) + (1 - rate) * np.exp(-((x / sigma) ** 2) / 2)
    loss = np.logaddexp(np.log1p(-rate), np.log(rate) + (x - 0.5) / sigma**2)
    return float(density @ loss) * step / (sigma * math.sqrt(2 * math.pi))


def _range(history: History, delta: float) -> float:
    """A privacy loss that `history` exceeds with probability δ at most; a tight one only where it is large."""
    loss = _rdp(history, delta, WHOLE_ORDERS)
    return loss if loss < 100 else _rdp(history, delta, ORDERS)


def _rdp(history: History, delta: float, orders: tuple[float, ...]) -> float:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    moments = sum(steps * _moments(*key, orders) for key, steps in history.items())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order")
        return float(get_privacy_spent(orders=list(orders), rdp=moments, delta=delta)[0])


@functools.lru_cache(maxsize=4096)
def _moments(sigma: float, rate: float, orders: tuple[float, ...]) -> np.ndarray:
    """The Rényi divergence of one step at each order."""
    if sigma < 0.01:
        return np.array(orders) * (0.5 / sigma / sigma)
    from opacus.accountants.analysis.rdp import compute_rdp

    return np.array(compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=list(orders)))
