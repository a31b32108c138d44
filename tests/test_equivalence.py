"""FedSVD is FFA-LoRA with a fixed orthonormal A, as long as the client's optimiser does not care which basis B is in.

Clients move B alone, so FedSVD's refactorisation is a rotation Q inside the row space of A0: A → Q A, B → B Qᵀ. What is
linear in the gradient, and clipping and isotropic noise, which see only norms, give the same B A in any such basis; what
works coordinate by coordinate (Adam), or carries a vector across the rotation (momentum kept on the client), does not.

The simulation: softmax regression, W = W0 + s·B·A, five unequal clients, three a round, float64, and the strategies' own
`merge`. Last, METHODS' formulas for the noise that DP-SGD leaves in the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

import strategies
from fedlora import seeds
from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update

M, N, R, SCALE, LR, STEPS, ROUNDS, CLIENTS = 5, 12, 3, 2.0, 0.3, 4, 8, 5  # classes, features, rank, …
Optimiser = Callable[[np.ndarray], np.ndarray]  # gradient of B → step of B


@dataclass
class Sgd:
    """Plain, or with momentum that starts afresh whenever a new one is made."""

    momentum: float = 0.0
    velocity: np.ndarray = field(default_factory=lambda: np.zeros((M, R)))

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        self.velocity = self.momentum * self.velocity + gradient
        return -LR * self.velocity


@dataclass
class Adam:
    first: np.ndarray = field(default_factory=lambda: np.zeros((M, R)))
    second: np.ndarray = field(default_factory=lambda: np.zeros((M, R)))
    steps: int = 0

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        return -0.1 * (self.first / (1 - 0.9**self.steps)) / (np.sqrt(self.second / (1 - 0.999**self.steps)) + 1e-8)


@dataclass
class Training:
    """What a client does between two messages."""

    optimiser: Callable[[], Optimiser] = Sgd
    kept: bool = False  # the optimiser's state survives from round to round
    clip: float | None = None  # per-example clipping of the gradient of B in Frobenius norm
    noise: float = 0.0  # standard deviation of Gaussian noise on the entries of the gradient of B
    decay: float = 0.0
    states: dict[int, Optimiser] = field(default_factory=dict)

    def __call__(self, pair: Pair, client: int, round: int) -> np.ndarray:
        """The client's B after STEPS steps. The draws do not depend on the basis, so that two strategies can share them."""
        data = seeds.stream(0, "data", client)
        X = data.standard_normal((20 + 10 * client, N))
        labels = np.argmax(X @ data.standard_normal((N, M)) + client * np.arange(M), axis=1)
        base = seeds.stream(0, "base").standard_normal((M, N)) / 5
        optimiser = self.states.setdefault(client, self.optimiser()) if self.kept else self.optimiser()
        batches = seeds.stream(0, "batches", client, round)
        B = pair.B.copy()
        for _ in range(STEPS):
            chosen = batches.choice(len(X), 8, replace=False)
            logits = X[chosen] @ (base + SCALE * B @ pair.A).T
            error = np.exp(logits - logits.max(axis=1, keepdims=True))
            error = error / error.sum(axis=1, keepdims=True) - np.eye(M)[labels[chosen]]
            examples = SCALE * np.einsum("em,er->emr", error, X[chosen] @ pair.A.T)  # each example's gradient of B
            if self.clip:
                norms = np.linalg.norm(examples, axis=(1, 2), keepdims=True)
                assert (norms > self.clip).any(), "clipping is at work"
                examples *= np.minimum(1, self.clip / norms)
            ambient = self.noise * batches.standard_normal((M, N))  # its image under an orthonormal A is isotropic
            B += optimiser(examples.mean(axis=0) + self.decay * B + ambient @ pair.A.T)
        return B


def simulate(name: str, A: np.ndarray, training: Training, **settings: int) -> list[np.ndarray]:
    """B A after each round, from B = 0 and the given A."""
    strategy = strategies.make(name, **settings)
    state, products = ServerState({"layer": Pair(A, np.zeros((M, R)))}, scale=SCALE), []
    for round in range(1, ROUNDS + 1):
        pair, updates = state.adapters["layer"], []
        for client in sorted(seeds.stream(0, "participation", round=round).choice(CLIENTS, 3, replace=False)):
            B = training(pair, int(client), round)
            updates.append(Update(int(client), 20 + 10 * int(client), {"layer": Pair(pair.A, B)}))
        state = strategy.merge(state, updates, round)
        products.append(state.adapters["layer"].B @ state.adapters["layer"].A)
    return products


def kaiming() -> np.ndarray:
    return seeds.stream(0, "adapters").uniform(-1, 1, (R, N)) / np.sqrt(N)


def gaps(left: list[np.ndarray], right: list[np.ndarray]) -> list[float]:
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(left, right, strict=True)]


KEEPING = {
    "plain SGD": Training(),
    "momentum, fresh in every round": Training(lambda: Sgd(0.9)),
    "weight decay": Training(decay=0.1),
    "per-example clipping": Training(clip=0.5),
    "DP-SGD: clipping and noise": Training(clip=0.5, noise=0.2),
}


@pytest.mark.parametrize("training", KEEPING.values(), ids=KEEPING)
@pytest.mark.parametrize("every", [1, 3])
def test_fedsvd_is_ffa_with_an_orthonormal_A(training: Training, every: int) -> None:
    A = lowrank.orthonormal_rows(kaiming())
    fedsvd = simulate("fedsvd", A, training, every=every)
    assert max(gaps(fedsvd, simulate("ffa_lora", A, training))) < 1e-10
    assert np.linalg.norm(fedsvd[-1]) > 0.2 and np.linalg.matrix_rank(fedsvd[-1]) == R


@pytest.mark.parametrize(
    "training",
    [lambda: Training(Adam), lambda: Training(lambda: Sgd(0.9), kept=True)],
    ids=["Adam", "momentum kept across rounds"],
)
def test_the_equivalence_breaks_where_coordinates_matter(training: Callable[[], Training]) -> None:
    """Up to the first refactorisation all is equal; after it the two part, by far more than rounding."""
    A = lowrank.orthonormal_rows(kaiming())
    apart = gaps(simulate("fedsvd", A, training()), simulate("ffa_lora", A, training()))
    assert apart[0] < 1e-10
    assert max(apart[1:]) > 1e-2


def test_from_another_A_fedsvd_gains_scale_at_its_first_refactorisation() -> None:
    """From a Kaiming A it is neither FFA from that A nor FFA from an orthonormal one, but the latter once it has begun.

    So `every` beyond the last round is FFA to the bit, and what FedSVD adds to it under SGD is the length of A's rows.
    """
    A, training = kaiming(), Training()
    fedsvd, ffa = simulate("fedsvd", A, training), simulate("ffa_lora", A, training)
    assert gaps(fedsvd, ffa)[0] < 1e-12 and gaps(fedsvd, ffa)[1] > 1e-2
    never = simulate("fedsvd", A, training, every=ROUNDS + 1)
    assert all(np.array_equal(a, b) for a, b in zip(never, ffa, strict=True))
    assert max(gaps(fedsvd, simulate("ffa_lora", lowrank.orthonormal_rows(A), training))) > 1e-2
    assert np.linalg.norm(A, axis=1).mean() == pytest.approx(1 / np.sqrt(3), rel=0.15)  # METHODS' .577


def test_from_any_A_fedsvd_is_ffa_from_its_first_refactorisation_on() -> None:
    """Hand FFA the state that FedSVD has after round 1: every later round is the same."""
    svd, ffa = strategies.make("fedsvd"), strategies.make("ffa_lora")
    train = Training(clip=0.5, noise=0.2)

    def play(strategy: strategies.LoRAStrategy, state: ServerState, rounds: range) -> ServerState:
        for round in rounds:
            pair = state.adapters["layer"]
            updates = [Update(c, 1 + c, {"layer": Pair(pair.A, train(pair, c, round))}) for c in range(CLIENTS)]
            state = strategy.merge(state, updates, round)
        return state

    shared = play(svd, ServerState({"layer": Pair(kaiming(), np.zeros((M, R)))}), range(1, 2))
    one, other = (play(strategy, shared, range(2, 7)).adapters["layer"] for strategy in (svd, ffa))
    assert gaps([one.B @ one.A], [other.B @ other.A])[0] < 1e-10
    assert not np.allclose(one.B, other.B)  # equal as products only


# ---- the noise of DP-SGD in the product


@pytest.mark.parametrize("noised", ["AB", "B", "B, A orthonormal"])
def test_noise_in_the_product(noised: str) -> None:
    """E‖noise in B A‖² = σ²(m‖A‖² + n‖B‖²) + σ⁴·m·n·r, or σ²·m·‖A‖² with B alone, or σ²·m·r with an orthonormal A."""
    m, n, r, sigma, draws = 7, 9, 3, 0.6, 4000
    rng = np.random.default_rng(0)
    pair = Pair(rng.standard_normal((r, n)), rng.standard_normal((m, r)))
    if noised == "B, A orthonormal":
        pair = Pair(lowrank.orthonormal_rows(pair.A), pair.B)
    expected = {
        "AB": sigma**2 * (m * np.sum(pair.A**2) + n * np.sum(pair.B**2)) + sigma**4 * m * n * r,
        "B": sigma**2 * m * np.sum(pair.A**2),
        "B, A orthonormal": sigma**2 * m * r,
    }[noised]
    measured = []
    for _ in range(draws):
        step_A = sigma * rng.standard_normal((r, n)) if noised == "AB" else 0.0
        moved = Pair(pair.A + step_A, pair.B + sigma * rng.standard_normal((m, r)))
        measured.append(lowrank.norm(lowrank.subtract(moved, pair)) ** 2)
    error = np.std(measured) / np.sqrt(draws)
    assert error < 0.02 * expected  # the test can tell the formulas apart
    assert abs(np.mean(measured) - expected) < 4 * error
