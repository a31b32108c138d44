"""ε against closed forms, published numbers and a second library; σ put back into ε; every row of the edge tables."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
import warnings

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.check import ConfigError
from fedlora.privacy import accounting, calibration
from fedlora.privacy.accounting import LooserBound, epsilon
from fedlora.privacy.calibration import calibrate, noise_multiplier

DELTA = 1e-5
EXACT = [  # (σ, steps, δ) → ε of the Gaussian mechanism, q = 1
    (1.0, 1, 1e-5, 4.377178),
    (5.0, 20, 1e-5, 3.848610),
    (10.0, 100, 1e-6, 4.886554),
]
PUBLISHED = [  # (q, σ, steps) → ε by RDP, by PLD; δ = 1e-5
    (0.04, 1.5, 1000, 4.67069, 4.28545),
    (0.016, 1.0, 1250, 3.7870, 3.41465),
    (0.25, 2.0, 100, 7.0334, 6.44915),
    (0.01, 0.8, 1000, 3.6954, 3.14102),
]
quick = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sigmas = st.floats(0.6, 8.0)
rates = st.floats(1e-3, 1.0)
steps_taken = st.integers(1, 100)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_memory", {})
    return tmp_path / "cache" / "calibration.json"


def pld(history: accounting.History, delta: float) -> float:
    """An independent upper bound, the larger of adding and removing a record; a little above the exact ε."""
    accountant = PLDAccountant()
    for (sigma, rate), steps in history.items():
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), steps)
    return accountant.get_epsilon(delta)


# ---- oracles


@pytest.mark.parametrize(("sigma", "steps", "delta", "exact"), EXACT)
def test_full_batches_against_the_exact_gaussian(sigma, steps, delta, exact) -> None:
    history = {(sigma, 1.0): steps}
    assert accounting.gaussian(history, delta) == pytest.approx(exact, abs=1e-6)
    assert exact <= epsilon(history, delta) <= exact + 0.012
    assert epsilon(history, delta, "rdp") > exact


def test_gaussian_solves_its_own_equation_and_composes_by_the_root_of_the_sum() -> None:
    """μ² = 9/3² + 4/4² = 1.25; δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)."""
    found = accounting.gaussian({(3.0, 1.0): 9, (4.0, 1.0): 4}, 1e-4)
    mu = math.sqrt(1.25)
    assert found == pytest.approx(accounting.gaussian({(1 / mu, 1.0): 1}, 1e-4), abs=1e-9)
    normal = lambda x: math.erfc(-x / math.sqrt(2)) / 2  # noqa: E731
    assert normal(mu / 2 - found / mu) - math.exp(found) * normal(-mu / 2 - found / mu) == pytest.approx(1e-4, rel=1e-6)


def test_rdp_as_published() -> None:
    assert epsilon({(1.3, 150 / 60000): 15 * 400}, 1e-5, "rdp") == pytest.approx(0.7242234026109595, rel=1e-9)
    assert epsilon({(1.0, 100 / 100000): 30 * 1000}, 1e-7, "rdp") == pytest.approx(1.4154988495444845, rel=1e-9)


@pytest.mark.parametrize(("rate", "sigma", "steps", "by_rdp", "by_pld"), PUBLISHED)
def test_rdp_and_prv_as_published(rate, sigma, steps, by_rdp, by_pld) -> None:
    history = {(sigma, rate): steps}
    assert epsilon(history, DELTA, "rdp") == pytest.approx(by_rdp, abs=6e-5)
    assert by_pld - 1e-4 <= epsilon(history, DELTA) <= by_pld + 0.02


@pytest.mark.parametrize(
    "history",
    [
        {(0.5, 0.001): 200},
        {(0.7, 0.05): 30},
        {(1.0, 0.5): 5},
        {(1.0, 0.9): 1},
        {(4.0, 0.3): 400},
        {(20.0, 0.2): 100},
        {(1.0, 0.02): 100, (2.0, 0.2): 50, (1.5, 0.1): 7},
        {(0.8, 0.01): 1, (1.2, 1.0): 1},
    ],
    ids=str,
)
def test_prv_against_a_second_library(history) -> None:
    """PRV follows the removing of a record only; dp-accounting takes the worse of removing and adding."""
    other = pld(history, DELTA)
    assert other - 1e-4 <= epsilon(history, DELTA) <= other + 0.02


def test_prv_is_that_of_opacus() -> None:
    from opacus.accountants import PRVAccountant

    for history in ({(1.5, 0.04): 1000}, {(1.0, 0.02): 100, (2.0, 0.2): 50}):
        accountant = PRVAccountant()
        accountant.history = [(sigma, rate, steps) for (sigma, rate), steps in history.items()]
        assert epsilon(history, DELTA) == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-4)


# ---- properties


@quick
@given(sigmas, rates, steps_taken, st.sampled_from(accounting.ACCOUNTANTS))
def test_more_steps_more_records_less_noise_cost_more(sigma, rate, steps, accountant) -> None:
    before = epsilon({(sigma, rate): steps}, DELTA, accountant)
    for costlier in ({(sigma, rate): 2 * steps}, {(sigma, min(1.0, 1.2 * rate)): steps}, {(0.9 * sigma, rate): steps}):
        assert epsilon(costlier, DELTA, accountant) >= before - 1e-3
    assert epsilon({(sigma, rate): steps}, DELTA / 10, accountant) >= before - 1e-3


@quick
@given(sigmas, rates, steps_taken)
def test_the_bounds_come_in_their_order(sigma, rate, steps) -> None:
    history = {(sigma, rate): steps}
    assert epsilon(history, DELTA) <= accounting.rdp(history, DELTA) + 0.012
    assert epsilon(history, DELTA) <= accounting.gaussian(history, DELTA) + 0.012


@quick
@given(sigmas, rates, st.integers(2, 100), st.sampled_from(accounting.ACCOUNTANTS))
def test_keys_that_are_almost_equal_cost_what_merged_ones_do(sigma, rate, steps, accountant) -> None:
    split = {(sigma, rate): steps // 2, (sigma * (1 + 1e-12), rate): steps - steps // 2}
    assert len(split) == 2
    assert epsilon(split, DELTA, accountant) == pytest.approx(epsilon({(sigma, rate): steps}, DELTA, accountant), abs=2e-3)


def test_the_order_of_steps_does_not_matter() -> None:
    history = {(1.0, 0.02): 100, (2.0, 0.2): 50}
    assert epsilon(history, DELTA) == epsilon(dict(reversed(history.items())), DELTA)


# ---- the edge table of epsilon()


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ({}, 0.0),
        ({(1.0, 0.1): 0}, 0.0),
        ({(0.0, 0.1): 0}, 0.0),
        ({(0.0, 0.1): 1}, math.inf),
        ({(0.0, 0.1): 1, (5.0, 0.1): 9}, math.inf),
        ({(math.inf, 0.1): 5}, 0.0),
    ],
    ids=str,
)
def test_edges(history, expected, accountant) -> None:
    assert epsilon(history, DELTA, accountant) == expected


def test_where_nothing_is_spent_epsilon_is_small_and_never_negative() -> None:
    assert accounting.gaussian({(10.0, 1.0): 1}, 0.5) == 0.0
    assert 0.0 <= epsilon({(10.0, 1.0): 1}, 0.5) <= 0.01  # Opacus: −0.11
    assert epsilon({(10.0, 1.0): 1}, 0.5, "rdp") == 0.0
    assert 0.0 <= epsilon({(1e5, 0.01): 10}, DELTA) <= 0.01


@pytest.mark.parametrize(
    ("history", "delta", "accountant", "named"),
    [
        ({(-1.0, 0.1): 1}, DELTA, "prv", "privacy.noise_multiplier=-1.0"),
        ({(math.nan, 0.1): 1}, DELTA, "prv", "privacy.noise_multiplier=nan"),
        ({(1.0, 0.0): 1}, DELTA, "prv", "sampling rate=0.0"),
        ({(1.0, 1.1): 1}, DELTA, "prv", "sampling rate=1.1"),
        ({(1.0, 0.1): -1}, DELTA, "prv", "steps=-1"),
        ({(1.0, 0.1): 1}, 0.0, "prv", "privacy.delta=0.0"),
        ({(1.0, 0.1): 1}, 1.0, "prv", "privacy.delta=1.0"),
        ({(1.0, 0.1): 1}, math.nan, "prv", "privacy.delta=nan"),
        ({(1.0, 0.1): 1}, DELTA, "gdp", "privacy.accountant=gdp"),
    ],
)
def test_wrong_values_are_named(history, delta, accountant, named) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        epsilon(history, delta, accountant)


# ---- where PRV ends: the table of prv()


@pytest.mark.parametrize("delta", [1e-11, 1e-20])
def test_a_delta_within_rounding_gets_a_looser_bound(delta) -> None:
    """Opacus answers 0.0014 *below* the exact ε for the first, and refuses the second."""
    history = {(math.sqrt(10000) / 1.5, 1.0): 10000}
    with pytest.raises(accounting.OutOfReach, match=r"privacy\.delta=1e-"):
        accounting.prv(history, delta)
    with pytest.warns(LooserBound, match="still valid"):
        found = epsilon(history, delta)
    assert found == accounting.gaussian(history, delta)


@pytest.mark.parametrize("sigma", [0.15, 0.05, 0.001, 1e-160, 1e-300])
@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_a_huge_epsilon_gets_a_looser_bound_at_once(sigma, rate) -> None:
    """Opacus takes a minute and answers inf for σ = 0.1, and its series for RDP does not end for σ = 1e-160."""
    history, start = {(sigma, rate): 300}, time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LooserBound)
        found = epsilon(history, DELTA)
    assert 30 < found <= accounting.gaussian(history, DELTA)
    assert found <= epsilon(history, DELTA, "rdp") + 0.012
    assert time.process_time() - start < 15


def test_a_coarser_grid_stays_an_upper_bound(monkeypatch) -> None:
    exact = accounting.gaussian({(8.0, 1.0): 300}, DELTA)
    monkeypatch.setattr(accounting, "PRV_GRID", 2**14)
    coarse = accounting.prv({(8.0, 1.0): 300}, DELTA)
    assert exact + 0.02 < coarse < exact + 0.4
    monkeypatch.setattr(accounting, "PRV_GRID", 2**10)
    with pytest.raises(accounting.OutOfReach, match="too large for its grid"):
        accounting.prv({(8.0, 1.0): 300}, DELTA)


def test_a_failed_integral_is_no_answer(monkeypatch) -> None:
    from opacus.accountants.analysis.prv import DiscretePRV

    monkeypatch.setattr(DiscretePRV, "compute_epsilon", lambda *_: (0.0, 0.0, math.nan))
    with pytest.raises(accounting.OutOfReach, match="no finite value"):
        accounting.prv({(1.0, 0.5): 3}, DELTA)


def test_a_grid_that_loses_the_mean_is_no_answer(monkeypatch) -> None:
    monkeypatch.setattr(accounting, "_mean_loss", lambda sigma, rate: 0.5)
    with pytest.raises(accounting.OutOfReach, match="not that of the loss"):
        accounting.prv({(1.0, 0.5): 3}, DELTA)


@pytest.mark.parametrize("exponent", [1, 2, 3, 13, 64, 1000])
def test_powers_by_squaring(exponent) -> None:
    base = np.exp(1j * np.linspace(0, 3, 50)) * np.linspace(0.9, 1, 50)
    np.testing.assert_allclose(accounting._power(base, exponent), base**exponent, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("rate", [1e-12, 0.05, 0.9, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("sigma", [0.5, 3.0])
def test_one_step_on_the_grid_is_its_distribution(rate, sigma) -> None:
    """Ring order: losses 0, mesh, … up, then from the lowest to −mesh; the mean is kept to rounding, by a small shift."""
    mesh, points = 0.01, 4096
    ring, shift = accounting._discretise(sigma, rate, mesh, points)
    losses = mesh * np.concatenate([np.arange(points), np.arange(-points, 0)])
    assert ring.shape == (2 * points,) and ring.min() >= 0 and ring.sum() == pytest.approx(1, abs=1e-12)
    assert abs(shift) < mesh / 2
    with np.errstate(divide="ignore"):
        assert ring @ losses + shift == pytest.approx(accounting._mean_loss(sigma, rate), abs=1e-12)
    x = np.random.default_rng(0)
    sample = sigma * x.standard_normal(200_000) + (x.random(200_000) < rate)
    with np.errstate(divide="ignore"):
        loss = np.logaddexp(np.log1p(-rate), math.log(rate) + (sample - 0.5) / sigma**2)
    for level in (-0.5, -0.055, 0.015, 1.005):
        assert ring[losses < level].sum() == pytest.approx(np.mean(loss < level), abs=0.02 if abs(level) < 0.1 else 0.006)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.0, 50.0])
def test_the_mean_loss_is_exact(sigma) -> None:
    """Full batches: 1 / 2σ². Samples: against quadrature of the same integral, panel by panel."""
    from scipy.integrate import quad

    with np.errstate(divide="ignore"):
        assert accounting._mean_loss(sigma, 1.0) == pytest.approx(1 / (2 * sigma**2), rel=1e-12)

    def integrand(x: float) -> float:
        density = 0.01 * math.exp(-(((x - 1) / sigma) ** 2) / 2) + 0.99 * math.exp(-((x / sigma) ** 2) / 2)
        return (
            density
            / (sigma * math.sqrt(2 * math.pi))
            * float(np.logaddexp(math.log(0.99), math.log(0.01) + (x - 0.5) / sigma**2))
        )

    ends = np.linspace(-12 * sigma, 1 + 12 * sigma, 80)
    panels = sum(quad(integrand, left, right, epsabs=1e-17, limit=200)[0] for left, right in itertools.pairwise(ends))
    assert accounting._mean_loss(sigma, 0.01) == pytest.approx(panels, rel=1e-9)


def test_nothing_is_said_where_prv_is_within_reach() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for history in ({(1.0, 1.0): 2}, {(0.3, 0.01): 50}, {(200.0, 0.01): 5}):
            assert epsilon(history, DELTA) > 0


def test_rdp_reaches_small_epsilons() -> None:
    """Opacus' orders end at 63 and cannot certify less than 0.10 at δ = 1e-5."""
    assert 0 < epsilon({(100.0, 0.01): 100}, DELTA, "rdp") < 0.02


def test_importing_the_package_is_light() -> None:
    heavy = "{'torch', 'opacus', 'dp_accounting', 'scipy'}"
    code = f"import sys, fedlora.privacy; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- calibration


@pytest.mark.parametrize("target", [0.5, 1.0, 3.0, 8.0, 20.0, 50.0])
@pytest.mark.parametrize(
    ("rate", "steps", "accountant"), [(0.05, 200, "prv"), (1.0, 10, "prv"), (0.2, 1, "prv"), (0.1, 300, "rdp")]
)
def test_calibrated_noise_spends_the_target(target, rate, steps, accountant) -> None:
    sigma = noise_multiplier(target, DELTA, rate, steps, accountant)
    assert target - 0.02 <= epsilon({(sigma, rate): steps}, DELTA, accountant) <= target


def test_a_small_target_is_met_more_closely() -> None:
    assert calibration.tolerance(0.1) == pytest.approx(0.004)
    sigma = noise_multiplier(0.1, DELTA, 0.05, 50)
    assert 0.096 <= epsilon({(sigma, 0.05): 50}, DELTA) <= 0.1


def test_a_target_beyond_prv_is_never_exceeded() -> None:
    sigma = noise_multiplier(2000.0, DELTA, 0.5, 20)
    with pytest.warns(LooserBound):
        assert 0 < epsilon({(sigma, 0.5): 20}, DELTA) <= 2000.0


def test_no_target_asks_for_no_noise() -> None:
    assert noise_multiplier(math.inf, DELTA, 0.1, 10) == 0.0
    assert calibrate(math.inf, DELTA, {3: (0.1, 10), 4: (0.1, 0)}) == {3: 0.0}


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps", "named"),
    [
        (0.0, DELTA, 0.1, 10, "privacy.epsilon=0.0"),
        (-1.0, DELTA, 0.1, 10, "privacy.epsilon=-1.0"),
        (math.nan, DELTA, 0.1, 10, "privacy.epsilon=nan"),
        (0.005, DELTA, 0.1, 10, "privacy.epsilon=0.005 is out of reach: .* no less than 0.01; raise it"),
        (3.0, 0.0, 0.1, 10, "privacy.delta=0.0"),
        (3.0, 2.0, 0.1, 10, "privacy.delta=2.0"),
        (3.0, DELTA, 0.0, 10, "sampling rate=0.0"),
        (3.0, DELTA, 1.5, 10, "sampling rate=1.5"),
        (3.0, DELTA, 0.1, 0, "steps=0"),
    ],
)
def test_wrong_targets_are_named(target, delta, rate, steps, named) -> None:
    with pytest.raises(ConfigError, match=named):
        noise_multiplier(target, delta, rate, steps)


def test_fifty_clients_of_fifty_sizes(monkeypatch, empty_cache) -> None:
    """Every client meets the target at its own rate and steps, in two evaluations each; the second time costs nothing."""
    random = np.random.default_rng(0)
    jobs = {client: (16 / int(random.integers(40, 2000)), 10 * int(random.integers(3, 20))) for client in range(50)}
    jobs[50], jobs[51] = jobs[0], (0.1, 0)
    calls = []
    monkeypatch.setattr(accounting, "prv", lambda *a, prv=accounting.prv: calls.append(a) or prv(*a))
    first = calibrate(3.0, DELTA, jobs)
    assert len(calls) <= 100
    assert set(first) == set(range(51)) and first[50] == first[0]
    for client, sigma in first.items():
        rate, steps = jobs[client]
        assert 2.98 <= epsilon({(sigma, rate): steps}, DELTA) <= 3.0
    for memory, evaluations in ((calibration._memory, 0), ({}, 50)):  # what comes from the disk is put back once
        calls.clear()
        accounting._epsilon.cache_clear()
        monkeypatch.setattr(calibration, "_memory", memory)
        assert calibrate(3.0, DELTA, jobs) == first
        assert len(calls) == evaluations
    assert list(empty_cache.parent.iterdir()) == [empty_cache]  # no temporary file is left
    calibrate(3.0, 2e-5, {0: jobs[0]})  # another δ is another key
    assert calls


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"x": "1.0"}', "\udcff"])
def test_a_damaged_cache_is_ignored(content, empty_cache) -> None:
    empty_cache.parent.mkdir()
    empty_cache.write_text(content, encoding="utf-8", errors="surrogateescape")
    sigma = noise_multiplier(8.0, DELTA, 1.0, 4)
    assert 7.98 <= epsilon({(sigma, 1.0): 4}, DELTA) <= 8.0
    assert sigma in json.loads(empty_cache.read_text()).values()  # and it is whole again


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "1.0", None, 3])
def test_an_impossible_answer_in_the_cache_is_ignored(value, empty_cache, monkeypatch) -> None:
    sigma = noise_multiplier(8.0, DELTA, 1.0, 4)
    (key,) = json.loads(empty_cache.read_text())
    empty_cache.write_text(json.dumps({key: value}))
    monkeypatch.setattr(calibration, "_memory", {})
    assert noise_multiplier(8.0, DELTA, 1.0, 4) == sigma


@pytest.mark.parametrize("factor", [1 / 30, 0.9, 1.1])
def test_another_answer_in_the_cache_is_not_believed_and_replaced(factor, empty_cache, monkeypatch) -> None:
    """A damaged σ once spent 1,695 of 6."""
    sigma = noise_multiplier(6.0, DELTA, 0.2, 40)
    (key,) = json.loads(empty_cache.read_text())
    empty_cache.write_text(json.dumps({key: factor * sigma}))
    monkeypatch.setattr(calibration, "_memory", {})
    if factor < 0.1:
        assert epsilon({(factor * sigma, 0.2): 40}, DELTA, "rdp") > 1000
    again = noise_multiplier(6.0, DELTA, 0.2, 40)
    assert 5.98 <= epsilon({(again, 0.2): 40}, DELTA) <= 6.0
    assert json.loads(empty_cache.read_text()) == {key: again}


def test_a_cache_that_cannot_be_written_is_ignored(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "file"))
    assert noise_multiplier(8.0, DELTA, 1.0, 4) > 0


@settings(max_examples=200, deadline=None)
@given(st.floats(0.05, 500), st.floats(-3, 3), st.floats(0.7, 4), st.floats(-4, 4))
def test_search_on_curves_that_are_known(target, level, power, guess) -> None:
    curve = lambda sigma: math.exp(level) / sigma**power + 1e-3  # noqa: E731
    sigma = calibration.search(curve, target, math.exp(guess))
    assert target - calibration.tolerance(target) <= curve(sigma) <= target


def test_search_over_a_jump_ends_at_its_upper_side() -> None:
    sigma = calibration.search(lambda sigma: 9.0 if sigma < 2.5 else 1.0, 5.0, 0.1)
    assert sigma == pytest.approx(2.5, rel=1e-8) and sigma >= 2.5


@pytest.mark.parametrize("sigma", [1e20, 1e160, 1e308])
@pytest.mark.parametrize("adjacency", ["add_remove", "replace"])
def test_a_huge_sigma_spends_next_to_nothing_and_overflows_nothing(sigma, adjacency) -> None:
    alone, beside = {(sigma, 0.1): 3}, {(sigma, 0.1): 3, (2.0, 0.1): 3}
    assert 0 <= epsilon(alone, 1e-5, "prv", adjacency) <= 0.02
    assert epsilon(beside, 1e-5, "prv", adjacency) == pytest.approx(epsilon({(2.0, 0.1): 3}, 1e-5, "prv", adjacency), abs=0.02)
