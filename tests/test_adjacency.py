"""ε where neighbours differ in a record, or a client, that is another one: against integrals, attacks and limits of its own."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.stats import norm

from fedlora.app import experiment, records
from fedlora.check import ConfigError
from fedlora.privacy import accounting, calibration, pairs, user_level
from fedlora.privacy.accounting import LooserBound, epsilon, gaussian, halved
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.user_level import SAMPLING, user_epsilon, user_noise_multiplier
from fedlora.tools import cli
from tests.conftest import ROOT
from tests.test_user_level import DELTA as USER_DELTA
from tests.test_user_level import K, M, Q, R, Z, attack

DELTA = 1e-5
STEPS = [(0.01, 1.0), (0.2, 0.5), (0.5, 3.0), (0.95, 1.5), (0.05, 0.2)]  # q, σ


def replaced(history: accounting.History, delta: float = DELTA) -> float:
    return epsilon(history, delta, adjacency="replace")


def pair(x: np.ndarray, rate: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Densities of a step's sum with one record's gradient at 1 and at −1."""
    return tuple((1 - rate) * norm.pdf(x, 0, sigma) + rate * norm.pdf(x, mean, sigma) for mean in (1, -1))  # type: ignore[return-value]


# ---- one step


@pytest.mark.parametrize(("rate", "sigma"), STEPS)
def test_a_steps_divergence_is_the_integral(rate, sigma) -> None:
    x = np.linspace(-1 - 12 * sigma, 1 + 12 * sigma, 400_001)
    P, Q = pair(x, rate, sigma)
    losses = np.array([0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0])
    for loss, found in zip(losses, pairs.replaced(losses, sigma, rate), strict=True):
        for one, other in ((P, Q), (Q, P)):
            exact = np.trapezoid(np.maximum(one - np.exp(loss) * other, 0), x)
            assert found == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_no_two_records_in_the_plane_are_told_apart_better(seed) -> None:
    """Any x and x' in the unit disc, both directions, negative ε too."""
    random = np.random.default_rng(seed)
    x, other = (v / max(1.0, float(np.linalg.norm(v))) for v in random.normal(size=(2, 2)))
    sigma, rate = random.uniform(0.5, 2), random.uniform(0.05, 0.95)
    axis = np.linspace(-9 * sigma, 9 * sigma, 601)
    grid, cell = np.stack(np.meshgrid(axis, axis), axis=-1), (axis[1] - axis[0]) ** 2

    def density(mean: np.ndarray) -> np.ndarray:
        around = np.exp(-((grid - mean) ** 2).sum(-1) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
        alone = np.exp(-(grid**2).sum(-1) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
        return (rate * around + (1 - rate) * alone) * cell

    P, Q = density(x), density(other)
    for loss in (0.0, 0.1, 0.5, 1.0, 2.0):
        largest = float(pairs.replaced(np.array([loss]), sigma, rate)[0])
        assert np.maximum(P - np.exp(loss) * Q, 0).sum() <= largest + 1e-6
        assert np.maximum(P - np.exp(-loss) * Q, 0).sum() <= 1 - np.exp(-loss) * (1 - largest) + 1e-6


# ---- composition


@pytest.mark.parametrize(("rate", "sigma"), [(0.2, 0.8), (0.05, 0.5), (0.6, 2.0)])
@pytest.mark.parametrize("other", [None, (0.3, 1.1)])
def test_two_steps_are_the_double_integral(rate, sigma, other) -> None:
    """δ at the ε that two steps, alike or not, are said to spend, over the plane of both outputs."""
    second = other or (rate, sigma)
    history = {(sigma, rate): 1, second[::-1]: 1} if other else {(sigma, rate): 2}
    spent = replaced(history, 1e-3)
    lines = [np.linspace(-1 - 9 * s, 1 + 9 * s, 3001) for _, s in ((rate, sigma), second)]
    (P, Q), (P2, Q2) = (pair(x, r, s) for x, (r, s) in zip(lines, ((rate, sigma), second), strict=True))
    cell = (lines[0][1] - lines[0][0]) * (lines[1][1] - lines[1][0])
    reached = cell * np.maximum(np.outer(P, P2) - np.exp(spent) * np.outer(Q, Q2), 0).sum()
    assert reached <= 1e-3 and reached == pytest.approx(1e-3, rel=0.02)


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (5.0, 20), (10.0, 100)])
def test_all_records_in_every_step_is_the_gaussian_at_half_of_sigma(sigma, steps) -> None:
    mu = 2 * math.sqrt(steps) / sigma
    spent = replaced({(sigma, 1.0): steps})
    delta = norm.cdf(mu / 2 - spent / mu) - np.exp(spent) * norm.cdf(-mu / 2 - spent / mu)
    assert delta == pytest.approx(DELTA, rel=1e-6)
    assert spent <= pairs.replace({(sigma, 1.0): steps}, DELTA) <= 1.001 * spent  # the grid's own answer


@pytest.mark.parametrize("steps", [1, 30, 1000])
@pytest.mark.parametrize(("rate", "sigma"), STEPS)
def test_it_lies_between_adding_or_removing_and_no_amplification(rate, sigma, steps) -> None:
    history = {(sigma, rate): steps}
    spent = replaced(history)
    assert spent <= gaussian(halved(history), DELTA)
    if spent < 200:  # beyond, adding and removing has a looser bound
        assert epsilon(history, DELTA) <= spent + 0.012
    assert replaced({(sigma, rate): steps + 1}) >= spent >= replaced({(1.1 * sigma, rate): steps})


def test_half_of_sigma_in_the_other_pair_would_understate_at_negative_losses() -> None:
    """Removing at σ/2 never has a loss below log(1 − q); replacing has, and steps in which it has add up."""
    rate, sigma, loss = 0.2, 1.0, 1.0
    x = np.linspace(-12, 13, 200_001)
    removed, without = (1 - rate) * norm.pdf(x, 0, sigma) + rate * norm.pdf(x, 2, sigma), norm.pdf(x, 0, sigma)
    halving = np.trapezoid(np.maximum(removed - np.exp(-loss) * without, 0), x)
    P, Q = pair(x, rate, sigma)
    assert np.trapezoid(np.maximum(P - np.exp(-loss) * Q, 0), x) > halving + 1e-3


def test_edges() -> None:
    assert replaced({}) == replaced({(math.inf, 0.1): 5}) == 0.0
    assert replaced({(0.0, 0.1): 1}) == math.inf
    with pytest.warns(LooserBound):
        assert replaced({(0.01, 0.1): 1}) == gaussian({(0.005, 0.1): 1}, DELTA)
    with pytest.warns(LooserBound, match="within the rounding"):
        assert replaced({(1.0, 0.1): 1000}, 1e-11) == gaussian({(0.5, 0.1): 1000}, 1e-11)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adjacency": "replaced"}, "privacy.adjacency=replaced is not known; did you mean replace?"),
        ({"adjacency": "replace", "accountant": "rdp"}, "privacy.accountant=rdp bounds no privacy.adjacency=replace"),
    ],
)
def test_what_has_no_bound_is_refused(small, capsys, settings, words) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.").replace("?", r"\?")):
        epsilon({(1.0, 0.1): 1}, DELTA, **settings)
    chosen = [f"privacy.{name}={value}" for name, value in settings.items()]
    assert cli.main(ROOT / "configs", ["privacy=record", "privacy.epsilon=3", *chosen]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}")


# ---- calibration, ledger


def test_the_numbers_of_the_docs() -> None:
    usual, sigma = (calibration.noise_multiplier(3.0, DELTA, 0.1, 100, "prv", kind) for kind in accounting.ADJACENCIES)
    assert (usual, sigma) == pytest.approx((1.68, 2.78), abs=0.01)
    assert replaced({(usual, 0.1): 100}) == pytest.approx(5.36, abs=0.02)


def test_calibrated_noise_spends_the_target() -> None:
    jobs = {0: (0.1, 30), 1: (1.0, 30), 2: (0.02, 200)}
    sigmas = calibration.calibrate(3.0, DELTA, jobs, adjacency="replace")
    usual = calibration.calibrate(3.0, DELTA, jobs)
    for client, (rate, steps) in jobs.items():
        assert 2.98 <= replaced({(sigmas[client], rate): steps}) <= 3.0
        assert sigmas[client] > 1.1 * usual[client]
    assert sigmas[1] == pytest.approx(2 * usual[1], rel=0.02)


def test_a_budget_is_kept_by_its_own_adjacency() -> None:
    """RDP would settle the question for adding and removing, and settles nothing here."""
    ledger, budget = Ledger(), epsilon({(1.0, 0.2): 20}, DELTA) + 1.0
    arguments = (0, 1.0, 0.2, 20, budget, DELTA)
    assert replaced({(1.0, 0.2): 20}) > budget
    assert not ledger.would_exceed(*arguments) and ledger.would_exceed(*arguments, adjacency="replace")
    ledger.spend(0, 1.0, 0.2, 20)
    assert ledger.epsilons(DELTA, adjacency="replace") == {0: ledger.epsilon(0, DELTA, adjacency="replace")}
    assert ledger.epsilon(0, DELTA, adjacency="replace") == replaced({(1.0, 0.2): 20}) > ledger.epsilon(0, DELTA)


# ---- whole clients


def spent_by_users(sampling: str, z: float = Z, rounds: int = R) -> float:
    return user_epsilon(z, K, M, rounds, USER_DELTA, sampling, "replace")


def test_the_three_samplings() -> None:
    poisson, fixed, none = spent = [spent_by_users(sampling) for sampling in SAMPLING]
    assert spent == pytest.approx([6.57, 18.08, 66.78], abs=0.01)  # as docs/privacy.md has it
    assert poisson == epsilon({(Z, Q): R}, USER_DELTA, adjacency="replace") < fixed < none
    assert none == gaussian({(Z / 2, 1.0): R}, USER_DELTA)
    assert all(spent_by_users(sampling) > user_epsilon(Z, K, M, R, USER_DELTA, sampling) for sampling in SAMPLING)


def test_fixed_cohorts_are_above_what_an_attack_reaches() -> None:
    """S replaced by −S among clients that send −S: dp-accounting's bound for replacing one, 9.3, is refuted at 17.0."""
    assert spent_by_users("fixed") > attack([(Q, 1), (1 - Q, -1)], [(1, -1)]) > 17.0
    one = attack([(Q, 1), (1 - Q, -1)], [(1, -1)], rounds=1, mesh=1e-4)
    assert one == pytest.approx(spent_by_users("fixed", rounds=1), abs=2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_no_updates_in_the_plane_are_worse_than_the_worst_on_a_line(seed) -> None:
    random = np.random.default_rng(seed)
    x, other, *others = (v / max(1.0, float(np.linalg.norm(v))) for v in 2 * random.normal(size=(4, 2)))
    z, rate = random.uniform(0.5, 2), random.uniform(0.05, 0.9)
    axis = np.linspace(-9 * z, 9 * z, 601)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)

    def density(mean: np.ndarray) -> np.ndarray:
        return np.exp(-((grid - mean) ** 2).sum(-1) / (2 * z * z)) / (2 * np.pi * z * z) * (axis[1] - axis[0]) ** 2

    absent = (1 - rate) * sum(density(y) for y in others) / len(others)
    P, P2 = rate * density(x) + absent, rate * density(other) + absent
    losses = np.array([0.0, 0.1, 0.5, 1.0, 2.0, 4.0])
    ahead, back = user_level._divergences(losses, z, rate, "replace")
    assert ahead is back
    for loss, largest in zip(losses, ahead, strict=True):
        assert np.maximum(P - np.exp(loss) * P2, 0).sum() <= largest + 1e-6


@pytest.mark.parametrize("sampling", SAMPLING)
def test_calibrated_noise_of_users_spends_the_target(sampling) -> None:
    z = user_noise_multiplier(4.0, K, M, R, USER_DELTA, sampling, "replace")
    assert 3.98 <= spent_by_users(sampling, z) <= 4.0


# ---- a run says it


@pytest.mark.parametrize("adjacency", accounting.ADJACENCIES)
@pytest.mark.parametrize("level", ["record", "user"])
def test_a_run_says_which_neighbours_it_protects(small, capsys, level, adjacency) -> None:
    settings = {"privacy__name": level, "privacy__adjacency": adjacency, "evaluate__holdout": 0.2}
    config = small(**settings, privacy__epsilon=8.0, privacy__delta=1e-3)
    summary = experiment.run(config, 0.0)
    assert f"δ = 0.001, {'user level, ' if level == 'user' else ''}{adjacency}" in capsys.readouterr().out
    folder = records.Recorder(config).folder
    assert json.loads((folder / "summary.json").read_text())["privacy"] == summary["privacy"]
    claim = summary["privacy"]
    assert (claim["level"], claim["adjacency"], claim["delta"]) == (level, adjacency, 1e-3)
    assert 0 < summary["epsilon"] <= 8.0 and claim["epsilon"] == summary["epsilon"]
    assert ("another" in claim["guarantee"]) == (adjacency == "replace")
    assert any("client_accuracy" in leaves for leaves in claim["also_leaves"])
    if level == "record":
        (sigma, rate, steps), *_ = (
            (row["noise_multiplier"], row["sampling_rate"], row["steps"])
            for rows in json.loads((folder / "privacy.json").read_text()).values()
            for row in rows
        )
        assert epsilon({(sigma, rate): steps}, 1e-3, adjacency=adjacency) <= 8.0


def test_a_run_without_privacy_claims_none(small) -> None:
    config = dataclasses.replace(small(), rounds=1)
    assert experiment.run(config, 0.0)["privacy"] is None
