"""User-level ε: against a second library, against attacks that are computed exactly, and every row of the edge table."""

from __future__ import annotations

import math
import warnings

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.stats import norm

from fedlora.check import ConfigError
from fedlora.privacy import calibration, user_level
from fedlora.privacy.accounting import LooserBound
from fedlora.privacy.user_level import SAMPLING, user_epsilon, user_noise_multiplier

K, M, R, Z, DELTA = 50, 10, 20, 1.0, 1e-3
Q = M / K
GAUSSIAN = dp_accounting.GaussianDpEvent(Z)
Mixture = list[tuple[float, float]]  # (weight, mean)


def attack(P: Mixture, others: Mixture, rounds: int = R, delta: float = DELTA, mesh: float = 1e-3) -> float:
    """ε of telling P from `others` (Gaussians of deviation Z on a line) in `rounds` rounds, with losses rounded down.

    So it is a lower bound: what an adversary who knows these two distributions reaches.
    """
    x = np.linspace(-12, 12, 400_001)
    p, q = (sum(weight * norm.pdf(x, mean, Z) for weight, mean in mixture) for mixture in (P, others))
    losses = np.floor(np.log(p / q) / mesh).astype(int)
    one = np.bincount(losses - losses.min(), weights=p * (x[1] - x[0]))
    size = (len(one) - 1) * rounds + 1
    composed = np.fft.irfft(np.fft.rfft(one, 1 << size.bit_length()) ** rounds)[:size]
    loss = (losses.min() * rounds + np.arange(size)) * mesh
    low, high = 0.0, 100.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        reached = composed @ np.maximum(0, 1 - np.exp(np.minimum(middle - loss, 0))) > delta
        low, high = (middle, high) if reached else (low, middle)
    return low


# ---- oracles


def test_the_three_samplings() -> None:
    by_sampling = [user_epsilon(Z, K, M, R, DELTA, sampling) for sampling in SAMPLING]
    assert by_sampling == pytest.approx([4.333, 8.520, 23.064], abs=2e-3)


def test_poisson_and_none_against_a_second_library() -> None:
    for sampling, event in (("poisson", dp_accounting.PoissonSampledDpEvent(Q, GAUSSIAN)), ("none", GAUSSIAN)):
        by_loss, by_moments = PLDAccountant(), RdpAccountant()
        found = user_epsilon(Z, K, M, R, DELTA, sampling)
        assert found == pytest.approx(by_loss.compose(event, R).get_epsilon(DELTA), abs=0.02)
        looser = by_moments.compose(event, R).get_epsilon(DELTA)
        assert found < looser == pytest.approx({"poisson": 5.2, "none": 25.1}[sampling], abs=0.06)


def test_fixed_cohorts_against_the_worst_others() -> None:
    """All other clients send −S and one sends S or nothing: an attack that reaches 8.195, where the answer is 8.520."""
    reached = attack([(Q, 1), (1 - Q, -1)], [(Q, 0), (1 - Q, -1)])
    assert reached == pytest.approx(8.195, abs=2e-3)
    assert reached < user_epsilon(Z, K, M, R, DELTA, "fixed") < reached + 0.5
    for other in (-0.5, 0.0, 0.5, 1.0):  # others that are not the worst
        assert attack([(Q, 1), (1 - Q, other)], [(Q, 0), (1 - Q, other)]) < reached


def test_one_round_of_fixed_cohorts_is_exact() -> None:
    worst = attack([(Q, 1), (1 - Q, -1)], [(Q, 0), (1 - Q, -1)], rounds=1, mesh=1e-4)
    assert worst == pytest.approx(user_epsilon(Z, K, M, 1, DELTA, "fixed"), abs=1e-3)


def test_why_the_renyi_bound_of_fixed_cohorts_is_not_used() -> None:
    """It claims 9.3 for replacing a client; replacing S by −S among clients that send −S is told apart at 17.0."""
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp_accounting.SampledWithoutReplacementDpEvent(K, M, GAUSSIAN), R)
    claimed = accountant.get_epsilon(DELTA)
    assert claimed == pytest.approx(9.298, abs=1e-3)
    assert attack([(Q, 1), (1 - Q, -1)], [(1, -1)]) > 17.0 > claimed


@pytest.mark.parametrize("seed", range(6))
def test_no_updates_in_the_plane_are_worse_than_the_worst_on_a_line(seed) -> None:
    """Kahane's inequality at work: any x and any others in the unit disc, both directions, a round's divergence on a grid."""
    random = np.random.default_rng(seed)
    x, *others = random.normal(size=(4, 2))
    x, *others = (v / max(1.0, float(np.linalg.norm(v))) for v in (3 * x, *others))
    z, rate = random.uniform(0.5, 2), random.uniform(0.05, 0.9)
    axis = np.linspace(-9 * z, 9 * z, 601)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)

    def density(mean: np.ndarray) -> np.ndarray:
        return np.exp(-((grid - mean) ** 2).sum(-1) / (2 * z * z)) / (2 * np.pi * z * z) * (axis[1] - axis[0]) ** 2

    absent = (1 - rate) * sum(density(y) for y in others) / len(others)
    P, P0 = rate * density(x) + absent, rate * density(np.zeros(2)) + absent
    losses = np.array([0.0, 0.1, 0.5, 1.0, 2.0, 4.0])
    remove, add = user_level._divergences(losses, z, rate, "add_remove")
    for loss, largest, largest_back in zip(losses, remove, add, strict=True):
        assert np.maximum(P - np.exp(loss) * P0, 0).sum() <= largest + 1e-6
        assert np.maximum(P0 - np.exp(loss) * P, 0).sum() <= largest_back + 1e-6


# ---- properties


@pytest.mark.parametrize("z", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("clients", "cohort", "rounds"), [(50, 10, 20), (50, 49, 3), (1000, 20, 300), (2, 1, 1)])
def test_the_samplings_come_in_their_order(z, clients, cohort, rounds) -> None:
    poisson, fixed, none = (user_epsilon(z, clients, cohort, rounds, DELTA, sampling) for sampling in SAMPLING)
    assert poisson <= fixed + 0.02 and fixed <= none


@pytest.mark.parametrize("sampling", SAMPLING)
def test_more_rounds_more_clients_less_noise_cost_more(sampling) -> None:
    before = user_epsilon(Z, K, M, R, DELTA, sampling)
    assert user_epsilon(Z, K, M, 2 * R, DELTA, sampling) > before
    assert user_epsilon(Z / 1.1, K, M, R, DELTA, sampling) > before
    assert user_epsilon(Z, K, M, R, DELTA / 10, sampling) > before
    assert user_epsilon(Z, K, 2 * M, R, DELTA, sampling) >= before


# ---- the edge table


@pytest.mark.parametrize("sampling", SAMPLING)
def test_edges(sampling) -> None:
    assert user_epsilon(Z, K, M, 0, DELTA, sampling) == 0.0
    assert user_epsilon(math.inf, K, M, R, DELTA, sampling) == 0.0
    assert user_epsilon(0.0, K, M, R, DELTA, sampling) == math.inf
    assert user_epsilon(0.0, K, M, 0, DELTA, sampling) == 0.0
    assert user_epsilon(Z, M, M, R, DELTA, sampling) == user_epsilon(Z, K, M, R, DELTA, "none")


def test_fixed_cohorts_with_hardly_any_noise_get_a_looser_bound() -> None:
    with pytest.warns(LooserBound, match=r"privacy\.noise_multiplier=0\.05 .* privacy\.sampling=none"):
        assert user_epsilon(0.05, K, M, R, DELTA, "fixed") == user_epsilon(0.05, K, M, R, DELTA, "none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert user_epsilon(0.08, K, M, R, DELTA, "fixed") < user_epsilon(0.08, K, M, R, DELTA, "none")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"noise_multiplier": -1.0}, "privacy.noise_multiplier=-1.0"),
        ({"noise_multiplier": math.nan}, "privacy.noise_multiplier=nan"),
        ({"cohort": 0}, "clients_per_round=0"),
        ({"cohort": 51}, "clients_per_round=51 is more than there are; it must be at most clients=50"),
        ({"rounds": -1}, "steps=-1"),
        ({"delta": 0.0}, "privacy.delta=0.0"),
        ({"delta": 1.0}, "privacy.delta=1.0"),
        ({"sampling": "fix"}, "privacy.sampling=fix is not known; did you mean fixed?"),
    ],
)
def test_wrong_values_are_named(change, named) -> None:
    settings = {"noise_multiplier": Z, "clients": K, "cohort": M, "rounds": R, "delta": DELTA, "sampling": "fixed"}
    with pytest.raises(ConfigError) as error:
        user_epsilon(**settings | change)
    assert named in str(error.value)


# ---- calibration


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("target", [0.3, 1.0, 4.0, 20.0, 100.0])
def test_calibrated_noise_spends_the_target(target, sampling) -> None:
    z = user_noise_multiplier(target, K, M, R, DELTA, sampling)
    assert target - calibration.tolerance(target) <= user_epsilon(z, K, M, R, DELTA, sampling) <= target


def test_calibration_edges() -> None:
    assert user_noise_multiplier(math.inf, K, M, R, DELTA, "fixed") == 0.0
    for arguments, named in (
        ((0.0, K, M, R, DELTA, "fixed"), "privacy.epsilon=0.0"),
        ((1.0, K, M, 0, DELTA, "fixed"), "rounds=0"),
        ((1.0, K, 60, R, DELTA, "fixed"), "clients_per_round=60"),
        ((math.inf, K, M, R, 0.0, "none"), "privacy.delta=0.0"),
        ((0.005, K, M, R, DELTA, "poisson"), "privacy.epsilon=0.005 is out of reach"),
    ):
        with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
            user_noise_multiplier(*arguments)
