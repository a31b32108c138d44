"""What DP-FedAvg spends: whole clients are protected, by noise that the server adds to a round's clipped sum.

A round adds up the updates of a cohort of m out of K clients, each clipped to norm S, and noise N(0, (zS)²). Two
federations are neighbours if in one of them some client sends nothing (zero) wherever it is drawn (`add_remove`), or any
other updates of norm up to S (`replace`). How the cohort is drawn decides what a round reveals:

* `poisson`: every client by itself with probability q = m / K: amplified by sampling, `accounting.prv`;
* `fixed`: exactly m of K without replacement: amplified less, because another client takes the place of one that is not
  drawn, and its update may point the other way;
* `none`: any cohort, even a known one: the Gaussian mechanism, exactly (of sums 2S apart for `replace`: half of z).

For `fixed` the usual Rényi bound (Wang, Balle and Kasiviswanathan, 2019; dp-accounting) would understate: it takes sums of
neighbouring cohorts to differ by S at most, but the updates of two clients differ by up to 2S. What stands here is, for
one round, the largest divergence there is. Let x be the client's update, ν the output where it is not drawn, N(x) and
N(0) those where it is, given the others. By advanced joint convexity (Balle, Barthe and Gaboardi, 2018), for ε ≥ 0 and
e^ε' = 1 + q (e^ε − 1), β = e^(ε' − ε),

    H_ε'(q N(x) + (1−q) ν ‖ q N(0) + (1−q) ν)  =  q H_ε(N(x) ‖ (1−β) ν + β N(0)),

where ν is a mixture of N(y), ‖y‖ ≤ S, and H_ε(P ‖ Q) = E_P (1 − e^ε dQ/dP)₊. That is a convex function of a mixture of
log-normal likelihood ratios whose covariances are scalar products of the means' distances from x. By Kahane's inequality
(1985) it is largest where these are: at x = S, y = −S. The other direction is largest at x = y = S.

Where x' takes the place of 0, it is q H_ε(N(x) ‖ (1−β) ν + β N(x')), largest at x = S, x' = y = −S, where all scalar products
are 4S²: q H_ε(N(S) ‖ N(−S)), in both directions.
"""

from __future__ import annotations

import math
import warnings

import numpy as np

from fedlora import check
from fedlora.check import ConfigError
from fedlora.privacy import accounting, calibration, pairs

SAMPLING = ("poisson", "fixed", "none")
POINTS = 2**14  # of the grid of one round's losses, on either side of zero


def user_epsilon(
    noise_multiplier: float,
    clients: int,
    cohort: int,
    rounds: int,
    delta: float,
    sampling: str,
    adjacency: str = "add_remove",
) -> float:
    """ε at `delta` after `rounds` rounds of `cohort` out of `clients` clients, at noise multiplier z.

    Guarantee: an upper bound for one client's updates against zeros (`add_remove`), or against any others (`replace`);
    poisson ≤ fixed ≤ none, up to PRV's 0.01.

    | case                                 | ε                                            |
    |--------------------------------------|----------------------------------------------|
    | rounds = 0, or z = inf               | 0                                            |
    | z = 0                                | inf                                          |
    | cohort = clients                     | that of `none`, whatever the sampling        |
    | `fixed` with z below about 0.07      | that of `none`, with a `LooserBound` warning |
    | z < 0, rounds < 0, δ outside (0, 1), |                                              |
    | cohort outside 1 … clients, NaN      | ConfigError                                  |
    """
    check.one_of(SAMPLING, **{"privacy.sampling": sampling})
    check.one_of(accounting.ADJACENCIES, **{"privacy.adjacency": adjacency})
    check.positive(clients_per_round=cohort)
    if cohort > clients:
        raise ConfigError(f"clients_per_round={cohort} is more than there are; it must be at most clients={clients}")
    rate = cohort / clients
    spent = accounting.checked({(noise_multiplier, rate): rounds}, delta)
    if not spent or noise_multiplier == 0:
        return math.inf if spent else 0.0
    if sampling == "poisson" and rate < 1:
        return accounting.epsilon(spent, delta, adjacency=adjacency)
    # This holds for every sampling.
    anyhow = accounting.gaussian(accounting.halved(spent) if adjacency == "replace" else spent, delta)
    if sampling == "none" or rate == 1:
        return anyhow
    try:
        return min(_fixed(noise_multiplier, rate, rounds, delta, adjacency), anyhow)
    except accounting.OutOfReach as reason:
        warnings.warn(f"{reason}: ε is that of privacy.sampling=none", accounting.LooserBound, stacklevel=2)
        return anyhow


def user_noise_multiplier(
    epsilon: float, clients: int, cohort: int, rounds: int, delta: float, sampling: str, adjacency: str = "add_remove"
) -> float:
    """The smallest z that keeps `rounds` rounds within `epsilon`.

    Guarantee: user_epsilon(z, …) lies in [ε − calibration.tolerance(ε), ε]; ε = inf gives 0; ε ≤ 0 or rounds < 1 raise
    ConfigError.
    """
    check.positive(**{"privacy.epsilon": epsilon})
    check.positive(rounds=rounds)
    user_epsilon(0.0, clients, cohort, rounds, delta, sampling, adjacency)  # refuses the other settings
    if math.isinf(epsilon):
        return 0.0

    def curve(z: float) -> float:
        return user_epsilon(z, clients, cohort, rounds, delta, sampling, adjacency)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", accounting.LooserBound)
        return calibration.search(curve, epsilon, guess=1.0)


def _fixed(z: float, rate: float, rounds: int, delta: float, adjacency: str) -> float:
    """ε of fixed-size cohorts without replacement: a round's largest divergences, composed on a grid of losses."""
    largest = 2 / z**2 + 17 / z  # the loss of two means 2S apart, eight standard deviations out
    if largest > pairs.LARGEST:
        raise accounting.OutOfReach(f"privacy.noise_multiplier={z:g} is too small for fixed-size cohorts")
    mesh = largest / POINTS
    curves = _divergences(mesh * np.arange(POINTS + 1), z, rate, adjacency)
    return pairs.compose([(curves, rounds)], mesh, delta)


def _divergences(losses: np.ndarray, z: float, rate: float, adjacency: str) -> pairs.Curves:
    """The largest H_ε(P ‖ Q) and H_ε(Q ‖ P) of one round for each ε ≥ 0 of `losses`, S = 1 (see the head of this file).

    For `replace` both are those of two Gaussians 2 apart. For `add_remove`, P = q N(1) + (1−q) N(−1) and
    Q = q N(0) + (1−q) N(−1): dP/dQ > e^ε above the point t with w = e^(t/z²) the positive root of
    w² − e^(ε + 1/2z²) w = (e^ε − 1)(1 − q)/q. The other direction is that of q N(0) + (1−q) N(1) against N(1).
    """
    from scipy.special import log_ndtr, ndtr

    if adjacency == "replace":
        both = _apart(losses, z / 2, rate)
        return both, both
    constant = -np.expm1(-losses) * (1 - rate) / rate * np.exp(-losses - 1 / z**2)
    point = z**2 * (losses + np.log((1 + np.sqrt(1 + 4 * constant)) / 2)) + 0.5
    remove = rate * ndtr((1 - point) / z) + (1 - rate) * ndtr(-(1 + point) / z)
    remove -= rate * np.exp(losses + log_ndtr(-point / z)) + (1 - rate) * np.exp(losses + log_ndtr(-(1 + point) / z))
    return np.clip(remove, 0, 1), _apart(losses, z, rate)


def _apart(losses: np.ndarray, z: float, rate: float) -> np.ndarray:
    """q H_ε'(N(1) ‖ N(0)) at noise multiplier z, e^ε = 1 + q (e^ε' − 1), for each ε of `losses`."""
    from scipy.special import log_ndtr

    inner = np.log1p(np.expm1(losses) / rate)
    found = rate * (np.exp(log_ndtr(0.5 / z - inner * z)) - np.exp(inner + log_ndtr(-0.5 / z - inner * z)))
    clipped: np.ndarray = np.clip(found, 0, 1)
    return clipped
