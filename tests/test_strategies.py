"""FedAvg, FFA-LoRA, FedSVD and LoRA-FAIR against dense matrices, and making strategies by name (tests/test_family.py: all)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import strategies
from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.check import ConfigError
from fedlora.server.metrics import geometry

LAYERS = {"query": (9, 7), "value": (5, 11), "head": (2, 8)}  # name → (m, n); the last has fewer rows than the rank
RANK = 3
EXAMPLES = [10, 30, 5, 55]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("fedavg", {}),
    ("ffa_lora", {}),
    ("fedsvd", {}),
    ("fedsvd", {"every": 2}),
    ("lora_fair", {}),
    ("lora_fair", {"lam": 0.0}),
    ("lora_fair", {"solver": "sgd"}),
]
variants = pytest.mark.parametrize(
    ("name", "settings"), VARIANTS, ids=["-".join([n, *(f"{k}={v}" for k, v in s.items())]) for n, s in VARIANTS]
)


def product(pair: Pair) -> np.ndarray:
    return pair.B.astype(np.float64) @ pair.A.astype(np.float64)


def gap(left: np.ndarray, right: np.ndarray) -> float:
    """‖left − right‖ / ‖right‖."""
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


def draw(rng: np.random.Generator, dtype: type = np.float64) -> Adapters:
    return {
        name: Pair(rng.standard_normal((RANK, n)).astype(dtype), rng.standard_normal((m, RANK)).astype(dtype))
        for name, (m, n) in LAYERS.items()
    }


def a_round(
    trains: str, spread: float = 0.5, seed: int = 0, dtype: type = np.float64, examples: list[int] = EXAMPLES
) -> tuple[ServerState, list[Update]]:
    """The state in the middle of a run and what clients that move the trained factors by `spread` would send."""
    rng = np.random.default_rng(seed)
    state = ServerState(draw(rng, dtype), {"bias": rng.standard_normal(4).astype(dtype)})
    updates = []
    for client, count in enumerate(examples):
        moved, sent = draw(rng, dtype), {}
        for name, old in state.adapters.items():
            step = {f: dtype(spread) * getattr(moved[name], f) if f in trains else dtype(0) for f in "AB"}
            sent[name] = Pair(old.A + step["A"], old.B + step["B"])
        updates.append(Update(client, count, sent, dict(state.dense)))
    return state, updates


def ideal(updates: list[Update], layer: str) -> np.ndarray:
    """ΔW = Σ p_k B_k A_k, dense."""
    total = sum(update.examples for update in updates)
    return sum((u.examples / total * product(u.adapters[layer]) for u in updates), np.zeros(LAYERS[layer]))


def factor_mean(updates: list[Update], layer: str, factor: str) -> np.ndarray:
    total = sum(update.examples for update in updates)
    return np.sum([u.examples / total * getattr(u.adapters[layer], factor) for u in updates], axis=0)


# ---- making one by name


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("fedsdv", {}, "strategy=fedsdv is not known; did you mean fedsvd?"),
        ("zzz", {}, "strategy=zzz is not known; choose one of: fed_sb, fedask, fedavg, "),
        ("fedsvd", {"evry": 2}, "strategy.evry is not a setting of fedsvd; did you mean every?"),
        ("fedavg", {"every": 2}, "strategy.every is not a setting of fedavg; choose one of: init"),
        ("fedsvd", {"every": "2"}, "strategy.every=2 is of the wrong type; it takes int (default 1)"),
        ("fedsvd", {"every": 1.5}, "strategy.every=1.5 is of the wrong type; it takes int (default 1)"),
        ("fedsvd", {"every": True}, "strategy.every=True is of the wrong type; it takes int (default 1)"),
        ("fedsvd", {"every": 0}, "strategy.every=0 is out of range; it must be above 0"),
        ("lora_fair", {"lam": "0.1"}, "strategy.lam=0.1 is of the wrong type; it takes float (default 0.01)"),
        ("lora_fair", {"lam": -0.1}, "strategy.lam=-0.1 is out of range; it must be 0 or above"),
        ("lora_fair", {"lam": float("nan")}, "strategy.lam=nan is out of range"),
        ("lora_fair", {"solver": "ridgy"}, "strategy.solver=ridgy is not known; did you mean ridge?"),
        ("lora_fair", {"steps": 0}, "strategy.steps=0 is out of range; it must be above 0"),
        ("fedavg", {"init": "orthogonal"}, "strategy.init=orthogonal is not known; did you mean orthonormal?"),
        ("fedavg", {"min_success": 0.0}, "min_success=0.0 is out of range; it must lie above 0 and be at most 1"),
        ("fedavg", {"flower": 1}, "strategy.flower is not a setting of fedavg"),  # names of **keywords are not keywords
        ("fedsvd", {"keywords": 1}, "strategy.keywords is not a setting of fedsvd"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_sentence(name: str, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        strategies.make(name, **settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_make_passes_settings_on() -> None:
    fair = strategies.make("lora_fair", lam=1, init="orthonormal", fraction_train=0.25, scale=2.0, seed=9)
    assert type(fair) is strategies.LoRAFair
    passed = {"lam": 1, "init": "orthonormal", "fraction_train": 0.25, "scale": 2.0, "seed": 9}
    assert passed.items() <= vars(fair).items()
    assert list(strategies.settings("lora_fair")) == ["init", "solver", "lam", "steps", "lr"]
    assert list(strategies.settings("fedavg")) == ["init"]


@pytest.mark.parametrize("name", strategies.names())
def test_a_class_is_found_by_name(name: str) -> None:
    found = strategies.strategy_class(name)
    assert getattr(strategies, found.__name__) is found
    assert found.__module__ == f"strategies.{name}"


# ---- FedAvg (FedIT) and FFA-LoRA


def test_fedavg_averages_both_factors() -> None:
    state, updates = a_round("AB")
    after = strategies.make("fedavg").merge(state, updates, 1)
    for layer, pair in after.adapters.items():
        assert gap(pair.A, factor_mean(updates, layer, "A")) < 1e-14
        assert gap(pair.B, factor_mean(updates, layer, "B")) < 1e-14


def test_ffa_never_touches_A_and_averages_B() -> None:
    state, updates = a_round("B")
    after = strategies.make("ffa_lora").merge(state, updates, 1)
    for layer, pair in after.adapters.items():
        assert np.array_equal(pair.A, state.adapters[layer].A)
        assert gap(pair.B, factor_mean(updates, layer, "B")) < 1e-14


# ---- FedSVD


def test_fedsvd_is_the_svd_of_the_dense_product() -> None:
    """B A = U S Vᵀ computed as an m × n matrix: A spans the same directions, B = U S, column by column up to sign."""
    state, updates = a_round("B")
    after = strategies.make("fedsvd").merge(state, updates, 1)
    for layer, pair in after.adapters.items():
        U, values, Vt = np.linalg.svd(factor_mean(updates, layer, "B") @ state.adapters[layer].A, full_matrices=False)
        kept = min(RANK, *LAYERS[layer])
        signs = np.sign(np.sum(pair.A[:kept] * Vt[:kept], axis=1))
        assert gap(pair.A[:kept], signs[:, None] * Vt[:kept]) < 1e-12
        assert gap(pair.B[:, :kept], U[:, :kept] * values[:kept] * signs) < 1e-12


def test_fedsvd_keeps_product_and_row_space_with_orthonormal_A() -> None:
    """Over many rounds A Aᵀ = I and AᵀA stays the projector of A0: in the layer with m < r too, and for a rank-deficient B."""
    strategy = strategies.make("fedsvd")
    state, _ = a_round("B")
    projectors = {layer: np.linalg.pinv(pair.A) @ pair.A for layer, pair in state.adapters.items()}
    rng = np.random.default_rng(1)
    for round in range(1, 9):
        sent = {n: Pair(p.A, p.B + rng.standard_normal(p.B.shape)) for n, p in state.adapters.items()}
        if round == 5:  # all singular values but one become zero, and later rounds must find A whole
            sent = {n: Pair(p.A, np.outer(rng.standard_normal(len(p.B)), rng.standard_normal(RANK))) for n, p in sent.items()}
        after = strategy.merge(state, [Update(0, 1, sent)], round)
        for layer, pair in after.adapters.items():
            assert gap(product(pair), product(sent[layer])) < 1e-13
            assert gap(pair.A @ pair.A.T, np.eye(RANK)) < 1e-13
            assert gap(pair.A.T @ pair.A, projectors[layer]) < 1e-12
        state = after


def test_fedsvd_refactors_every_kth_round_only() -> None:
    strategy = strategies.make("fedsvd", every=3)
    state, updates = a_round("B")
    for round in range(1, 8):
        after = strategy.merge(state, updates, round)
        untouched = all(np.array_equal(after.adapters[layer].A, state.adapters[layer].A) for layer in LAYERS)
        assert untouched == (round % 3 != 0)
        for layer in LAYERS:
            assert gap(product(after.adapters[layer]), ideal(updates, layer)) < 1e-13


def test_fedsvd_never_refactors_zero() -> None:
    """B = 0 says nothing about A: the bits of A stay, layer by layer."""
    state, updates = a_round("B")
    for update in updates:
        update.adapters["query"] = Pair(update.adapters["query"].A, np.zeros((9, RANK)))
    after = strategies.make("fedsvd").merge(state, updates, 1)
    assert np.array_equal(after.adapters["query"].A, state.adapters["query"].A)
    assert not np.array_equal(after.adapters["value"].A, state.adapters["value"].A)


# ---- LoRA-FAIR


def fair(updates: list[Update], state: ServerState, **settings: Any) -> Adapters:
    return strategies.make("lora_fair", **settings).merge(state, updates, 1).adapters


def case(updates: list[Update], layer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ā, B̄ and ΔW."""
    return factor_mean(updates, layer, "A"), factor_mean(updates, layer, "B"), ideal(updates, layer)


@pytest.mark.parametrize("lam", [0.0, 0.01, 1.0, 100.0])
def test_ridge_is_the_dense_ridge(lam: float) -> None:
    state, updates = a_round("AB")
    for layer, pair in fair(updates, state, lam=lam).items():
        A, B, goal = case(updates, layer)
        delta = (goal - B @ A) @ A.T @ np.linalg.inv(A @ A.T + lam * np.eye(RANK))
        assert gap(pair.A, A) < 1e-14
        assert gap(pair.B, B + delta) < 1e-12
        assert np.linalg.norm(delta) > 0.01


def test_ridge_vanishes_for_a_large_lambda() -> None:
    state, updates = a_round("AB")
    plain = strategies.make("fedavg").merge(state, updates, 1).adapters
    for lam in (1e12, float("inf")):
        for layer, pair in fair(updates, state, lam=lam).items():
            assert gap(pair.B, plain[layer].B) < 1e-10


@pytest.mark.parametrize("lam", [0.0, 0.01])
@pytest.mark.parametrize("near", [0.0, 1e-6])
def test_ridge_with_a_rank_deficient_A(lam: float, near: float) -> None:
    """Two rows of every A_k are equal, or nearly: with λ = 0 the answer is least squares of smallest norm, not noise."""
    state, updates = a_round("AB")
    for update in updates:
        for pair in update.adapters.values():
            pair.A[1] = pair.A[0] + near * pair.A[1]
    for layer, pair in fair(updates, state, lam=lam).items():
        A, B, goal = case(updates, layer)
        U, s, Vt = np.linalg.svd(A, full_matrices=False)
        damped = np.array([x / (x**2 + lam) if x > 1e-13 * s[0] else 0.0 for x in s])
        delta = (goal - B @ A) @ Vt.T * damped @ U.T
        assert gap(pair.B @ A, (B + delta) @ A) < 1e-9
        if near == 0.0:
            assert gap(pair.B, B + delta) < 1e-10


def distance(B: Any, A: Any, goal: Any) -> Any:
    """The paper's S = 1 − cos(ΔW, B Ā) on dense matrices, for numpy or torch."""
    whole = B @ A
    return 1 - (whole * goal).sum() / ((whole**2).sum() ** 0.5 * (goal**2).sum() ** 0.5)


def gradient(B: np.ndarray, A: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """∇S by B, as torch differentiates the dense formula."""
    leaf = torch.tensor(B, requires_grad=True)
    distance(leaf, torch.tensor(A), torch.tensor(goal)).backward()
    assert leaf.grad is not None
    return leaf.grad.numpy()


@pytest.mark.parametrize("layer", LAYERS)
def test_descent_starts_at_zero_and_follows_the_gradient(layer: str) -> None:
    """One step without penalty is −lr ‖B̄Ā‖² / λ_max(ĀĀᵀ) times the gradient of S."""
    state, updates = a_round("AB")
    A, start, goal = case(updates, layer)
    step = np.sum((start @ A) ** 2) / np.linalg.norm(A, 2) ** 2
    for lr in (1e-6, 0.3):
        moved = fair(updates, state, solver="sgd", steps=1, lam=0.0, lr=lr)[layer].B - start
        assert gap(moved, -lr * step * gradient(start, A, goal)) < 1e-8


@pytest.mark.parametrize("lam", [0.001, 0.01, 0.3])
@pytest.mark.parametrize("layer", LAYERS)
def test_descent_ends_at_a_minimum_of_the_objective(layer: str, lam: float) -> None:
    """∇S + λ ΔB / ‖ΔB‖ = 0 where ΔB ≠ 0; and ΔB = 0 exactly where ‖∇S‖ ≤ λ, since the penalty is not squared."""
    state, updates = a_round("AB")
    A, start, goal = case(updates, layer)
    B = fair(updates, state, solver="sgd", steps=2000, lam=lam)[layer].B
    if np.linalg.norm(gradient(start, A, goal)) <= lam:
        assert np.array_equal(B, start)
    else:
        pull = lam * (B - start) / np.linalg.norm(B - start)
        assert np.linalg.norm(gradient(B, A, goal) + pull) < 1e-6 * lam
    assert lam != 0.3 or np.array_equal(B, start)
    assert lam != 0.001 or not np.array_equal(B, start)


@pytest.mark.parametrize("lam", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("condition", [1.0, 300.0])
def test_descent_never_raises_the_objective(lam: float, size: float, condition: float) -> None:
    """Whatever λ, the size of B and the conditioning of A: at worst ΔB = 0, which is right where λ outweighs the gradient."""
    state, updates = a_round("AB", spread=1.0)
    stretch = np.geomspace(1, 1 / condition, RANK)[:, None]
    for update in updates:
        update.adapters = {name: Pair(stretch * p.A, size * p.B) for name, p in update.adapters.items()}
    for layer in ("query", "value"):
        A, start, goal = case(updates, layer)
        reached = [distance(start, A, goal)]
        for steps in (1, 2, 5, 30, 100):
            B = fair(updates, state, solver="sgd", steps=steps, lam=lam)[layer].B
            reached.append(distance(B, A, goal) + lam * np.linalg.norm(B - start))
        assert (np.diff(reached) < 1e-14).all(), reached
        assert (reached[-1] < reached[0]) == (np.linalg.norm(gradient(start, A, goal)) > lam)


def test_descent_without_penalty_reaches_the_best_cosine() -> None:
    """The largest cosine in the row space of Ā belongs to the projection of ΔW on it, which is the least-squares solution."""
    state, updates = a_round("AB")
    best, found = (fair(updates, state, lam=0.0, **s) for s in ({}, {"solver": "sgd", "steps": 3000}))
    for layer in LAYERS:
        reached, bound = (distance(x[layer].B, x[layer].A, ideal(updates, layer)) for x in (found, best))
        assert reached == pytest.approx(bound, abs=1e-9)


def test_descent_where_the_cosine_has_no_meaning() -> None:
    """ΔW = 0, B̄ = 0 or B̄Ā = 0 with neither zero: ΔB = 0, not NaN."""
    state, updates = a_round("AB", examples=[1, 1])
    first, second = (update.adapters for update in updates)
    second["query"] = Pair(-first["query"].A, first["query"].B)  # ΔW = 0 and Ā = 0
    second["value"] = Pair(first["value"].A, -first["value"].B)  # ΔW = 0 and B̄ = 0
    second["head"] = Pair(-first["head"].A, 2 * first["head"].B)  # Ā = 0, but ΔW ≠ 0
    for layer, pair in fair(updates, state, solver="sgd").items():
        assert np.array_equal(pair.B, lowrank.mean([first[layer], second[layer]], np.array([0.5, 0.5])).B)


# ---- the geometry that every round reports


def test_metrics_by_hand() -> None:
    """Clients (A, B) = (1, 2) and (3, 6), weights 1/4, 3/4, from (A, B) = (1, 1), scale 2: ΔW = 14, B̄Ā = 12.5."""

    def one(a: float, b: float) -> Adapters:
        return {"layer": Pair(np.array([[a]]), np.array([[b]]))}

    state = ServerState(one(1.0, 1.0), scale=2.0)
    updates = [Update(0, 1, one(1.0, 2.0)), Update(1, 3, one(3.0, 6.0))]
    metrics = geometry(state, strategies.make("fedavg").merge(state, updates, 1), updates)
    assert metrics["aggregation_bias"] == pytest.approx(1.5 / 14)
    assert metrics["merge_error"] == pytest.approx(1.5 / 14)
    assert metrics["update_norm"] == pytest.approx(2 * (12.5 - 1))
    assert metrics["update_effective_rank"] == pytest.approx(1.0)


def test_the_drift_of_A_is_its_angle_to_the_initial_one_and_none_where_it_has_not_moved() -> None:
    """One layer turned by 0.3, the other one left: 0.15 on average."""
    rng = np.random.default_rng(0)
    still, turned = rng.standard_normal((2, 4)), np.array([[np.cos(0.3), np.sin(0.3), 0.0]])
    initial = {"still": Pair(still, np.zeros((3, 2))), "turned": Pair(np.eye(3)[:1], np.zeros((3, 1)))}
    after = {"still": Pair(still.copy(), np.ones((3, 2))), "turned": Pair(turned, np.ones((3, 1)))}
    updates = [Update(0, 1, after)]
    measured = geometry(ServerState(initial, scale=1.0), ServerState(after, scale=1.0), updates, initial)
    assert measured["drift_of_A"] == pytest.approx(np.degrees(0.15), rel=1e-12)
    only = {"still": after["still"]}
    measured = geometry(ServerState({"still": initial["still"]}), ServerState(only), [Update(0, 1, only)], initial)
    assert measured["drift_of_A"] == 0.0


@variants
def test_metrics_are_the_dense_ones(name: str, settings: dict[str, Any]) -> None:
    strategy = strategies.make(name, **settings)
    state, updates = a_round(strategy.trains)
    state.scale = 0.5
    after = strategy.merge(state, updates, 2)
    metrics = geometry(state, after, updates)
    whole = np.sqrt(sum(np.sum(ideal(updates, layer) ** 2) for layer in LAYERS))
    plain = np.sqrt(
        sum(np.sum((ideal(updates, x) - factor_mean(updates, x, "B") @ factor_mean(updates, x, "A")) ** 2) for x in LAYERS)
    )
    merged = np.sqrt(sum(np.sum((ideal(updates, x) - product(after.adapters[x])) ** 2) for x in LAYERS))
    moved = np.sqrt(sum(np.sum((product(after.adapters[x]) - product(state.adapters[x])) ** 2) for x in LAYERS))
    assert metrics["aggregation_bias"] == pytest.approx(plain / whole, rel=1e-9, abs=1e-12)
    assert metrics["merge_error"] == pytest.approx(merged / whole, rel=1e-6, abs=1e-7)
    assert metrics["update_norm"] == pytest.approx(0.5 * moved, rel=1e-9)
    assert 1 <= metrics["update_effective_rank"] <= 2 * RANK
    if strategy.exact:
        assert metrics["merge_error"] < 1e-7
