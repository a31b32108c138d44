"""The whole family of server steps against dense matrices: identities that hold for all, then each paper's equations.

Nothing here uses the strategies' own algebra: a model is `effective`, an m × n matrix, and what the clients trained is kept
apart from what `merge` is given of it.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
import tracemalloc
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

import strategies
from fedlora import seeds
from fedlora.arrays import lowrank, sketch
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.check import ConfigError
from fedlora.server.metrics import geometry
from fedlora.server.wire import Contents, Fit, Shapes, Unequal
from strategies import LoRAStrategy

LAYERS = {"head": (2, 8), "query": (9, 7), "value": (5, 11)}  # name → (m, n); the first has fewer rows than the rank
RANK, SCALE = 3, 0.5
EXAMPLES = [10, 30, 5, 55]
DTYPES: dict[type, float] = {np.float32: 1e-6, np.float64: 1e-12}  # and the relative error that an exact step may have
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in strategies.names()] + [
    ("fedsvd", {"every": 2}),
    ("lora_fair", {"lam": 0.0}),
    ("lora_fair", {"solver": "sgd"}),
    ("flora", {"init": "orthonormal"}),
    ("fedask", {"factors": "B", "oversampling": 0}),
]
variants = pytest.mark.parametrize(
    ("name", "settings"), VARIANTS, ids=["-".join([n, *(f"{k}={v}" for k, v in s.items())]) for n, s in VARIANTS]
)
every_name = pytest.mark.parametrize("name", strategies.names())
both_rounds = pytest.mark.parametrize("round", [1, 2])
UNEQUAL = [name for name in strategies.names() if strategies.strategy_class(name).unequal is not Unequal.NO]


def draw(rng: np.random.Generator, dtype: type = np.float64, rank: int = RANK) -> Adapters:
    return {
        name: Pair(rng.standard_normal((rank, n)).astype(dtype), rng.standard_normal((m, rank)).astype(dtype))
        for name, (m, n) in LAYERS.items()
    }


def product(pair: Pair, R: np.ndarray | None = None) -> np.ndarray:
    B, A = pair.B.astype(np.float64), pair.A.astype(np.float64)
    return B @ A if R is None else B @ R.astype(np.float64) @ A


def effective(state: ServerState, layer: str) -> np.ndarray:
    """W − W0 = scale · (B_c A_c + B R A), dense; R is the identity where there is none."""
    moved = product(state.base_correction[layer]) if layer in state.base_correction else 0.0
    return state.scale * (moved + product(state.adapters[layer], state.dense.get(f"{layer}.lora_R.weight")))


def gap(left: np.ndarray, right: np.ndarray) -> float:
    """‖left − right‖ / ‖right‖."""
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


@dataclass
class Round:
    """The middle of a run: the state, the states that clients reach from it by themselves, and what `merge` is given."""

    strategy: LoRAStrategy
    number: int
    state: ServerState
    clients: list[ServerState]
    examples: list[int]
    given: list[Update] = field(default_factory=list)

    def __post_init__(self) -> None:
        for client, (own, count) in enumerate(zip(self.clients, self.examples, strict=True)):
            sent = own.adapters
            if "B" in self.strategy.personal:
                sent = {name: Pair(pair.A, self.state.adapters[name].B) for name, pair in sent.items()}
            if self.strategy.unequal is Unequal.PADDED:
                sent = {name: lowrank.pad(pair, RANK) for name, pair in sent.items()}
            self.given.append(Update(client, count, sent, own.dense))
        if self.strategy.two_phase:
            self.given = self.strategy.gather(self.state, self.given, self.number, self.answer)

    def answer(self, action: str, sent: Contents, shapes: Shapes | None = None) -> Contents:
        """What honest clients reply to a message that asks for more, in the shapes that are asked for."""
        answers = {client: self.one_answer(action, client, arrays) for client, arrays in sent.items()}
        assert all({name: array.shape for name, array in arrays.items()} == shapes for arrays in answers.values())
        return answers

    def one_answer(self, action: str, client: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        own = self.clients[client].adapters
        if action == "sketch":
            return sketch.sketch(own, int(arrays["columns"].item()), self.strategy.seed, self.number)
        assert action == "project"
        return sketch.project(own, arrays)

    def merge(self) -> ServerState:
        p = np.array(self.examples) / sum(self.examples)
        dense = {
            name: np.sum([w * u.dense[name] for w, u in zip(p, self.given, strict=True)], axis=0).astype(old.dtype)
            for name, old in self.state.dense.items()
        }
        return self.strategy.merge(replace(self.state, dense=dense), self.given, self.number)

    def ideal(self, layer: str) -> np.ndarray:
        """Σ p_k (W_k − W0) over the clients' own models."""
        p = np.array(self.examples) / sum(self.examples)
        return np.sum([w * effective(own, layer) for w, own in zip(p, self.clients, strict=True)], axis=0)

    def merged(self, after: ServerState, layer: str) -> np.ndarray:
        """W − W0 after the round; where clients keep B, the average of the models that they go on from."""
        if not self.strategy.personal:
            return effective(after, layer)
        goes_on = [
            replace(after, adapters={layer: Pair(after.adapters[layer].A, own.adapters[layer].B)}) for own in self.clients
        ]
        return replace(self, clients=goes_on, given=[]).ideal(layer)


def a_round(
    name: str,
    settings: dict[str, Any] | None = None,
    number: int = 1,
    *,
    spread: float = 0.5,
    seed: int = 0,
    dtype: type = np.float64,
    examples: list[int] = EXAMPLES,
    ranks: list[int] | None = None,
    zero: bool = False,
) -> Round:
    """A round in which clients of the given `ranks` move what they train by `spread`, after `zero` or some earlier progress."""
    strategy, rng = strategies.make(name, **(settings or {})), np.random.default_rng(seed)
    trains = strategy.trained(number)
    state = ServerState(draw(rng, dtype), {"bias": rng.standard_normal(4).astype(dtype)}, scale=SCALE)
    if name in ("flora", "fedex_lora") and not zero:
        state.base_correction = draw(rng, dtype, rank=2)
    if trains == "R":
        state.dense |= {f"{x}.lora_R.weight": rng.standard_normal((RANK, RANK)).astype(dtype) * (not zero) for x in LAYERS}
    elif zero:
        state.adapters = {name: Pair(pair.A, np.zeros_like(pair.B)) for name, pair in state.adapters.items()}
    clients = []
    for rank in ranks or [RANK] * len(examples):
        moved, trained = draw(rng, dtype, rank), {}
        for layer, old in state.adapters.items():
            had = Pair(old.A[:rank], old.B[:, :rank]) if rank < RANK else old
            steps = {f: dtype(spread) * getattr(moved[layer], f) for f in "AB" if f in trains and spread}
            trained[layer] = had._replace(**{f: getattr(had, f) + step for f, step in steps.items()})
        R = {x: a + dtype(spread) * rng.standard_normal(a.shape).astype(dtype) for x, a in state.dense.items() if "_R" in x}
        clients.append(replace(state, adapters=trained, dense=state.dense | R))
    return Round(strategy, number, state, clients, examples)


def bits(state: ServerState) -> list[bytes]:
    """Every array of a state."""
    pairs = [pair for adapters in (state.adapters, state.base_correction) for pair in adapters.values()]
    arrays = [a for pair in pairs for a in pair] + [*state.dense.values(), *state.extra.values()]
    return [a.dtype.str.encode() + a.tobytes() for a in arrays]


def with_adapters(case: Round, change: Any) -> Round:
    """The same round with `change(client, layer, pair)` for what each client trained."""
    clients = [
        replace(own, adapters={name: change(k, name, pair) for name, pair in own.adapters.items()})
        for k, own in enumerate(case.clients)
    ]
    return replace(case, clients=clients, given=[])


# ---- what holds for every strategy


@every_name
def test_a_strategy_describes_itself(name: str) -> None:
    strategy, module = strategies.make(name), sys.modules[strategies.strategy_class(name).__module__]
    assert isinstance(strategy, LoRAStrategy)
    assert strategy.trains in ("AB", "A", "B", "R") and isinstance(strategy.exact, bool)
    assert set(strategy.downlink) <= set("ABR") and set(strategy.personal) <= set(strategy.trains)
    assert strategy.private is not Fit.UNKNOWN and len(strategy.private_because) > 15
    assert (strategy.unequal is Unequal.NO) == ("one_rank" in vars(type(strategy)))
    if strategy.paper:
        assert re.search(r"\d{4}\.\d{5}$", strategy.paper)
        assert strategy.paper[-10:] in (module.__doc__ or ""), "the file opens with its paper"
    assert inspect.getsource(module).count("\n") < 120
    for parameter in strategies.settings(name).values():
        assert isinstance(parameter.default, bool | int | float | str), "a setting's default gives its type"


@variants
@both_rounds
def test_merge_is_pure(name: str, settings: dict[str, Any], round: int) -> None:
    """The inputs and the strategy stay what they were, and a second call gives the same bits."""
    case = a_round(name, settings, round)
    before, attributes = copy.deepcopy((case.state, case.given)), copy.deepcopy(vars(case.strategy))
    first = case.merge()
    assert bits(case.state) == bits(before[0]) and case.state.scale == before[0].scale
    for update, old in zip(case.given, before[1], strict=True):
        assert bits(ServerState(update.adapters, update.dense)) == bits(ServerState(old.adapters, old.dense))
    assert str(vars(case.strategy)) == str(attributes)
    assert bits(first) == bits(case.merge())
    assert first is not case.state and first.dense.keys() == case.state.dense.keys()


@variants
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_keeps_names_shapes_and_dtype(name: str, settings: dict[str, Any], dtype: type) -> None:
    for round in (1, 2):
        case = a_round(name, settings, round, dtype=dtype)
        after = case.merge()
        assert list(after.adapters) == list(case.state.adapters)
        assert set(after.base_correction) in (set(), set(LAYERS))
        for layer, (m, n) in LAYERS.items():
            assert [a.shape for a in after.adapters[layer]] == [(RANK, n), (m, RANK)]
            if layer in after.base_correction:
                A, B = after.base_correction[layer]
                assert len(A) <= min(m, n) and A.shape == (len(A), n) and B.shape == (m, len(A))
        for pair in (*after.adapters.values(), *after.base_correction.values()):
            assert [a.dtype for a in pair] == [dtype, dtype]
            assert all(np.isfinite(a).all() for a in pair)
        assert all(array.dtype == dtype for array in after.dense.values())


@variants
@both_rounds
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_client_is_a_fixed_point_of_the_product(name: str, settings: dict[str, Any], round: int, dtype: type) -> None:
    """W after is the client's W, its base correction included; flora: W0 + s·(B_c A_c + B A) with B = 0 now."""
    case = a_round(name, settings, round, examples=[17], dtype=dtype)
    after = case.merge()
    for layer in LAYERS:
        assert gap(case.merged(after, layer), effective(case.clients[0], layer)) < DTYPES[dtype]


@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.parametrize("rank", [1, 2])
def test_one_client_of_lower_rank_is_a_fixed_point_too(name: str, rank: int) -> None:
    case = a_round(name, examples=[17], ranks=[rank])
    for layer in LAYERS:
        assert gap(case.merged(case.merge(), layer), effective(case.clients[0], layer)) < 1e-12


@variants
@both_rounds
def test_clients_that_learned_nothing_change_nothing(name: str, settings: dict[str, Any], round: int) -> None:
    case = a_round(name, settings, round, spread=0.0)
    after = case.merge()
    for layer in LAYERS:
        assert gap(case.merged(after, layer), effective(case.state, layer)) < 1e-12


@every_name
def test_a_steady_merge_stays_in_the_coordinates_that_clients_were_given(name: str) -> None:
    """Of clients that learned nothing the factors themselves come back, and not only their product; else not."""
    case = a_round(name, spread=0.0)
    after = case.merge()
    moved = [gap(a, b) for x in LAYERS for a, b in zip(after.adapters[x], case.state.adapters[x], strict=True)]
    assert (max(moved) < 1e-12) == case.strategy.keeps_basis, moved


@variants
@both_rounds
def test_a_zero_product_stays_zero(name: str, settings: dict[str, Any], round: int) -> None:
    """The first round in which no client has moved: B = 0 for all. Nothing is divided by a norm that is zero."""
    case = a_round(name, settings, round, spread=0.0, zero=True)
    after = case.merge()
    for layer in LAYERS:
        assert not effective(after, layer).any()
        assert np.linalg.matrix_rank(after.adapters[layer].A) == RANK  # A can still be trained, or trained through


@variants
@both_rounds
def test_a_rank_deficient_B_loses_nothing(name: str, settings: dict[str, Any], round: int) -> None:
    """Every B_k has one direction only, the same for all: whatever is exact or best rank-r stays so, and nothing is NaN."""
    case = a_round(name, settings, round)
    trains = case.strategy.trained(round)

    def flatten(client: int, layer: str, pair: Pair) -> Pair:
        column = np.arange(1.0, LAYERS[layer][0] + 1)[:, None]
        return Pair(pair.A, column @ np.ones((1, RANK)) * (client + 1 if "B" in trains else 1))

    case.state.adapters = {layer: flatten(0, layer, pair) for layer, pair in case.state.adapters.items()}
    flat = with_adapters(case, flatten)
    after = flat.merge()
    for layer, shape in LAYERS.items():
        assert all(np.isfinite(a).all() for a in after.adapters[layer])
        if case.strategy.exact or name in ("flexlora", "fedask"):  # Σ p_k B_k A_k has rank 1 here
            assert gap(flat.merged(after, layer), flat.ideal(layer)) < 1e-12
        assert np.linalg.matrix_rank(after.adapters[layer].A) == (min(RANK, *shape) if name == "fedask" else RANK)


@variants
@both_rounds
def test_order_of_clients_changes_nothing(name: str, settings: dict[str, Any], round: int) -> None:
    """To rounding here; `merge` is handed the updates sorted by client, so in a run to the bit (tests/test_rounds.py)."""
    case = a_round(name, settings, round)
    other = replace(case, clients=case.clients[::-1], examples=case.examples[::-1], given=[])
    for layer in LAYERS:
        assert gap(other.merged(other.merge(), layer), case.merged(case.merge(), layer)) < 1e-11


@variants
@both_rounds
def test_scale_of_the_weights_changes_nothing(name: str, settings: dict[str, Any], round: int) -> None:
    case = a_round(name, settings, round)
    tenfold = replace(case, examples=[10 * count for count in EXAMPLES], given=[])
    assert bits(case.merge()) == bits(tenfold.merge())


@variants
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_exact_strategies_reproduce_the_ideal_model(name: str, settings: dict[str, Any], dtype: type, seed: int) -> None:
    errors = []
    for round in (1, 2):
        case = a_round(name, settings, round, dtype=dtype, seed=seed)
        after = case.merge()
        errors += [gap(case.merged(after, layer), case.ideal(layer)) for layer in LAYERS]
    if case.strategy.exact or settings.get("factors") == "B":
        assert max(errors) < DTYPES[dtype]
    else:
        assert max(errors) > 1e-3  # `exact = False` is not claimed out of modesty


@pytest.mark.parametrize("name", [name for name in strategies.names() if strategies.strategy_class(name).linear])
@both_rounds
def test_a_linear_merge_needs_only_the_mean(name: str, round: int) -> None:
    case = a_round(name, {}, round)
    p = np.array(EXAMPLES) / sum(EXAMPLES)
    after, mean = case.merge(), copy.deepcopy(case.given[0])
    mean.adapters = {
        x: Pair(*(np.tensordot(p, np.stack([getattr(u.adapters[x], f) for u in case.given]), 1) for f in "AB")) for x in LAYERS
    }
    mean.dense = {x: np.tensordot(p, np.stack([u.dense[x] for u in case.given]), 1) for x in mean.dense}
    once = case.strategy.merge(replace(case.state, dense=mean.dense), [mean], round)
    for layer in LAYERS:
        assert gap(effective(once, layer), effective(after, layer)) < 1e-12 or not effective(after, layer).any()
        assert gap(once.adapters[layer].A, after.adapters[layer].A) < 1e-9


@variants
def test_no_array_of_full_size_is_formed(name: str, settings: dict[str, Any]) -> None:
    """4000 × 4000 in float64 would be 128 MB, and half of it in float32; all factors of three clients are 0.8 MB."""
    strategy, rng, size, rank = strategies.make(name, **settings), np.random.default_rng(0), 4000, 2
    trains = strategy.trained(2)
    pairs = [Pair(rng.standard_normal((rank, size)), rng.standard_normal((size, rank))) for _ in range(3)]
    R = {"layer.lora_R.weight": np.eye(rank)} if trains == "R" else {}
    state = ServerState({"layer": pairs[0]}, R, base_correction={"layer": pairs[1]} if strategy.exact else {})
    sent = [Pair(*(getattr(pair if f in trains else pairs[0], f) for f in "AB")) for pair in pairs]
    case = Round(strategy, 2, state, [replace(state, adapters={"layer": pair}) for pair in sent], [1, 1, 1])
    tracemalloc.start()
    replace(case, given=[])  # a strategy that asks its clients for more does so here
    for _ in range(3):
        state = strategy.merge(state, case.given, 2)
    geometry(case.state, state, case.given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6
    assert all(a.size < 30 * size for pair in state.base_correction.values() for a in pair)


@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.parametrize("seed", range(3))
def test_clients_of_unequal_rank(name: str, seed: int) -> None:
    """Every factor comes back at the state's rank, without NaN; exact strategies stay exact, flexlora best."""
    case = a_round(name, ranks=[1, 3, 2, 2], seed=seed)
    assert [u.adapters["query"].rank for u in case.given] == (
        [3] * 4 if case.strategy.unequal is Unequal.PADDED else [1, 3, 2, 2]
    )
    after = case.merge()
    for layer, (m, n) in LAYERS.items():
        assert [a.shape for a in after.adapters[layer]] == [(RANK, n), (m, RANK)]
        assert all(np.isfinite(a).all() for a in after.adapters[layer])
        if case.strategy.exact:
            assert gap(case.merged(after, layer), case.ideal(layer)) < 1e-12


# ---- FlexLoRA and the order of errors


@pytest.mark.parametrize("ranks", [[3, 3, 3, 3], [1, 3, 2, 2]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flexlora_errs_by_the_tail_of_the_spectrum(ranks: list[int], dtype: type) -> None:
    """Eckart-Young: no pair of rank r is nearer. So is, for a client of rank i, the part (A[:i], B[:, :i]) that it gets."""
    case = a_round("flexlora", ranks=ranks, dtype=dtype)
    after = case.merge()
    for layer, pair in after.adapters.items():
        ideal = case.ideal(layer)
        values = np.append(np.linalg.svd(ideal, compute_uv=False), np.zeros(RANK))
        for i in range(1, RANK + 1):
            part = SCALE * product(Pair(pair.A[:i], pair.B[:, :i]))
            assert np.linalg.norm(part - ideal) == pytest.approx(np.linalg.norm(values[i:]), abs=DTYPES[dtype] * values[0])
        assert gap(pair.A @ pair.A.T, np.eye(RANK)) < DTYPES[dtype]
        assert np.abs(SCALE * np.linalg.norm(pair.B, axis=0) - values[:RANK]).max() < DTYPES[dtype] * values[0]


@pytest.mark.parametrize("seed", range(60))
def test_order_of_the_errors_to_the_ideal_update(seed: int) -> None:
    """FlexLoRA ≤ least squares ≤ ridge(.01) ≤ ridge(1) ≤ plain average, whatever the spread of the clients."""
    cohort = {"spread": 10.0 ** (seed % 4 - 2), "seed": seed, "examples": [1 + seed % 7, 5, 11][: 2 + seed % 2]}
    compared = [("flexlora", {}), *(("lora_fair", {"lam": lam}) for lam in (0.0, 0.01, 1.0)), ("fedavg", {})]
    errors: dict[str, list[float]] = {layer: [] for layer in LAYERS}
    for name, settings in compared:
        case = a_round(name, settings, **cohort)
        after = case.merge()
        for layer in LAYERS:
            errors[layer].append(float(np.linalg.norm(effective(after, layer) - case.ideal(layer))))
    for layer, found in errors.items():
        slack = 1e-12 * np.linalg.norm(case.ideal(layer))
        assert (np.diff(found) > -slack).all(), (layer, found)
        assert layer == "head" or (np.diff(found) > 1e-12 * found[-1]).all(), (layer, found)  # strictly, where m > r


# ---- FLoRA


def test_flora_stacks_into_the_base_and_begins_anew() -> None:
    """B_c A_c after = before + Σ p_k B_k A_k; B = 0."""
    case = a_round("flora", ranks=[1, 3, 2, 2])
    after = case.merge()
    p = np.array(EXAMPLES) / 100
    for layer, (m, n) in LAYERS.items():
        moved = sum(w * product(own.adapters[layer]) for w, own in zip(p, case.clients, strict=True))
        assert gap(product(after.base_correction[layer]), product(case.state.base_correction[layer]) + moved) < 1e-13
        assert after.base_correction[layer].rank == min(2 + 1 + 3 + 2 + 2, m, n)
        assert not after.adapters[layer].B.any()


@pytest.mark.parametrize("init", ["kaiming", "orthonormal"])
def test_flora_draws_an_A_that_clients_can_draw_too(init: str) -> None:
    """From the stream (seed, adapters, round), layers in sorted order, as the A of round 0 is drawn."""
    cases = [a_round("flora", {"init": init, "seed": seed}, number) for seed, number in ((0, 1), (0, 2), (1, 1))]
    drawn = [case.merge().adapters for case in cases]
    rng = seeds.stream(0, "adapters", round=2)
    for layer in sorted(LAYERS):
        shape = (RANK, LAYERS[layer][1])
        if init == "kaiming":
            expected = rng.uniform(-1, 1, shape) / np.sqrt(shape[1])
        else:
            Q, upper = np.linalg.qr(rng.standard_normal(shape).T)
            expected = (Q * np.sign(np.diag(upper))).T
        assert gap(drawn[1][layer].A, expected) < 1e-6
        assert not np.allclose(drawn[0][layer].A, drawn[1][layer].A)  # anew in each round
        assert not np.allclose(drawn[0][layer].A, drawn[2][layer].A)  # and for each seed


def test_flora_refuses_an_init_that_needs_the_base() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.init=pissa takes A from W0.*use kaiming or orthonormal"):
        strategies.make("flora", init="pissa")


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_base_corrections_add_up_over_rounds(name: str) -> None:
    """Twenty rounds in float32 beside a dense float64 sum: within rounding, at a rank that never exceeds min(m, n)."""
    case = a_round(name, dtype=np.float32, zero=True)
    strategy, state, rng = case.strategy, case.state, np.random.default_rng(5)
    whole = {layer: effective(state, layer) for layer in LAYERS}
    for number in range(1, 21):
        moved = [draw(rng, np.float32) for _ in EXAMPLES]
        clients = [
            replace(state, adapters={x: Pair(p.A + m[x].A / 5, p.B + m[x].B / 5) for x, p in state.adapters.items()})
            for m in moved
        ]
        round = Round(strategy, number, state, clients, EXAMPLES)
        before, state = state, round.merge()
        for layer in LAYERS:
            whole[layer] = whole[layer] + round.ideal(layer) - effective(before, layer)
            assert gap(effective(state, layer), whole[layer]) < 1e-5
            assert state.base_correction[layer].rank <= min(LAYERS[layer])


# ---- FedEx-LoRA


def test_fedex_averages_as_fedavg_and_moves_the_residual() -> None:
    """B_c A_c after = before + Σ p_k B_k A_k − B̄Ā, by dense matrices and not transposed."""
    case, plain = a_round("fedex_lora"), a_round("fedavg")
    after, averaged = case.merge(), plain.merge()
    p = np.array(EXAMPLES) / 100
    for layer in LAYERS:
        ideal = sum(w * product(own.adapters[layer]) for w, own in zip(p, case.clients, strict=True))
        A, B = (sum(w * getattr(own.adapters[layer], f) for w, own in zip(p, case.clients, strict=True)) for f in "AB")
        assert gap(after.adapters[layer].A, A) < 1e-14 and gap(after.adapters[layer].B, B) < 1e-14
        residual = product(after.base_correction[layer]) - product(case.state.base_correction[layer])
        assert gap(residual, ideal - B @ A) < 1e-12
    assert averaged.adapters.keys() == after.adapters.keys()


def test_fedex_moves_nothing_for_one_client() -> None:
    after = a_round("fedex_lora", zero=True, examples=[3]).merge()
    assert all(pair.rank == 0 for pair in after.base_correction.values())


# ---- HetLoRA


@pytest.mark.parametrize("ranks", [[3, 3, 3, 3], [1, 3, 2, 2]])
def test_hetlora_pads_and_weighs_by_norm(ranks: list[int]) -> None:
    case = a_round("hetlora", ranks=ranks)
    after = case.merge()
    for layer, (m, n) in LAYERS.items():
        norms = np.array([np.linalg.norm(product(own.adapters[layer])) for own in case.clients])
        A, B = np.zeros((RANK, n)), np.zeros((m, RANK))
        for weight, own in zip(norms / norms.sum(), case.clients, strict=True):
            A[: own.adapters[layer].rank] += weight * own.adapters[layer].A
            B[:, : own.adapters[layer].rank] += weight * own.adapters[layer].B
        assert gap(after.adapters[layer].A, A) < 1e-13 and gap(after.adapters[layer].B, B) < 1e-13


def test_hetlora_weighs_by_examples_where_all_products_are_zero() -> None:
    case = with_adapters(a_round("hetlora"), lambda k, x, pair: Pair(pair.A, np.zeros_like(pair.B)))
    p, after = np.array(EXAMPLES) / 100, case.merge()
    for layer in LAYERS:
        assert gap(after.adapters[layer].A, sum(w * c.adapters[layer].A for w, c in zip(p, case.clients, strict=True))) < 1e-14


def test_hetlora_keeps_rows_that_no_client_of_the_round_holds() -> None:
    """With zeros in A and in B neither would get a gradient in any later round."""
    case = a_round("hetlora", ranks=[1, 2, 1, 2])
    after = case.merge()
    for layer, pair in after.adapters.items():
        assert np.array_equal(pair.A[2], case.state.adapters[layer].A[2]) and pair.A[2].any()
        assert not pair.B[:, 2].any()


# ---- RoLoRA, FedSA-LoRA, Fed-SB


def test_rolora_takes_turns_and_begins_with_B() -> None:
    strategy: Any = strategies.make("rolora")
    assert [strategy.trained(number) for number in (1, 2, 3, 4)] == ["B", "A", "B", "A"]
    for number, fixed, moved in ((1, "A", "B"), (2, "B", "A"), (7, "A", "B")):
        case = a_round("rolora", {}, number)
        after, p = case.merge(), np.array(EXAMPLES) / 100
        for layer, pair in after.adapters.items():
            assert np.array_equal(getattr(pair, fixed), getattr(case.state.adapters[layer], fixed))
            mean = sum(w * getattr(own.adapters[layer], moved) for w, own in zip(p, case.clients, strict=True))
            assert gap(getattr(pair, moved), mean) < 1e-14


def test_fedsa_averages_A_and_leaves_B_where_it_was() -> None:
    case = a_round("fedsa_lora")
    after, p = case.merge(), np.array(EXAMPLES) / 100
    for layer, pair in after.adapters.items():
        assert np.array_equal(pair.B, case.state.adapters[layer].B)
        assert gap(pair.A, sum(w * own.adapters[layer].A for w, own in zip(p, case.clients, strict=True))) < 1e-14


def test_fed_sb_averages_what_stands_between_the_factors() -> None:
    case = a_round("fed_sb")
    after, p = case.merge(), np.array(EXAMPLES) / 100
    for layer, pair in after.adapters.items():
        assert bits(ServerState({layer: pair})) == bits(ServerState({layer: case.state.adapters[layer]}))
        key = f"{layer}.lora_R.weight"
        assert gap(after.dense[key], sum(w * own.dense[key] for w, own in zip(p, case.clients, strict=True))) < 1e-14
    assert gap(after.dense["bias"], case.state.dense["bias"]) < 1e-14


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_fed_sb_refuses_factors_that_are_not_orthonormal(init: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy\.init={init} does not suit fed_sb"):
        strategies.make("fed_sb", init=init)
    assert strategies.settings("fed_sb")["init"].default == "orthonormal"


# ---- FedASK


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_fedask_with_a_full_sketch_is_the_best_of_its_rank(dtype: type, seed: int) -> None:
    """l ≥ the rank of Σ p_k B_k A_k: the sketch loses nothing, and what is left is FlexLoRA's truncation."""
    case = a_round("fedask", dtype=dtype, seed=seed)
    after = case.merge()
    for layer, pair in after.adapters.items():
        ideal = case.ideal(layer)
        found = SCALE * product(Pair(sum(p * u.adapters[layer].A for p, u in weighted(case)), case.given[0].adapters[layer].B))
        assert gap(found, ideal) < DTYPES[dtype]
        values = np.append(np.linalg.svd(ideal, compute_uv=False), np.zeros(RANK))
        error = np.linalg.norm(effective(after, layer) - ideal)
        assert error == pytest.approx(np.linalg.norm(values[RANK:]), abs=DTYPES[dtype] * values[0])
        if min(LAYERS[layer]) >= RANK:  # √S on either side
            for gram in (pair.A @ pair.A.T, pair.B.T @ pair.B):
                assert gap(SCALE * gram, np.diag(values[:RANK])) < 10 * DTYPES[dtype]


def weighted(case: Round) -> list[tuple[float, Update]]:
    return [(update.examples / sum(u.examples for u in case.given), update) for update in case.given]


@pytest.mark.parametrize("seed", range(5))
def test_fedask_with_a_short_sketch_is_the_dense_projection(seed: int) -> None:
    """Q = qr(ΔW Ω) for a dense ΔW and the Ω of the run's seed, then the truncated SVD of Q Qᵀ ΔW; worse than the best."""
    case = a_round("fedask", {"oversampling": 1, "seed": 3}, 4, seed=seed, spread=1.0)
    after, rng = case.merge(), seeds.stream(3, "sketch", round=4)
    for layer in sorted(LAYERS):
        (m, n), ideal = LAYERS[layer], case.ideal(layer)
        Q = np.linalg.qr(ideal @ rng.standard_normal((n, min(RANK + 1, m, n))))[0]
        U, values, Vt = np.linalg.svd(Q @ Q.T @ ideal, full_matrices=False)
        assert gap(effective(after, layer), U[:, :RANK] * values[:RANK] @ Vt[:RANK]) < 1e-10
        best = np.linalg.norm(np.linalg.svd(ideal, compute_uv=False)[RANK:])
        error = np.linalg.norm(effective(after, layer) - ideal)
        assert error > 1.01 * best if layer != "head" else error < 1e-12
        assert error < np.linalg.norm(ideal)


def test_fedask_asks_twice_and_sends_no_more_than_it_must() -> None:
    case = a_round("fedask", {"oversampling": 2})
    seen: list[tuple[str, dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = []

    def ask(action: str, sent: Contents, shapes: Shapes | None = None) -> Contents:
        answers = case.answer(action, sent, shapes)
        assert sorted(sent) == [0, 1, 2, 3]
        seen.append((action, *({name: a.shape for name, a in arrays[3].items()} for arrays in (sent, answers))))
        return answers

    case.strategy.gather(case.state, [Update(k, n, case.state.adapters) for k, n in enumerate(EXAMPLES)], 1, ask)
    columns = {layer: min(RANK + 2, *shape) for layer, shape in LAYERS.items()}
    assert seen == [
        ("sketch", {"columns": (1,)}, {f"{x}.sketch": (m, columns[x]) for x, (m, n) in LAYERS.items()}),
        (
            "project",
            {f"{x}.basis": (m, columns[x]) for x, (m, n) in LAYERS.items()},
            {f"{x}.projected": (columns[x], n) for x, (m, n) in LAYERS.items()},
        ),
    ]


def test_fedask_shares_one_basis_and_keeps_what_it_does_not_ask_for() -> None:
    case = a_round("fedask")
    for layer in LAYERS:
        assert len({id(update.adapters[layer].B) for update in case.given}) == 1
    assert [(u.client, u.examples) for u in case.given] == list(enumerate(EXAMPLES))
    assert all(np.array_equal(u.dense["bias"], case.state.dense["bias"]) for u in case.given)


@pytest.mark.parametrize("lost", ["sketch", "project"])
def test_fedask_goes_on_without_clients_that_do_not_answer(lost: str) -> None:
    """Client 1 fails. Lost before its sketch came it never was; lost after it, its share of Q stays and it is not summed."""
    case = a_round("fedask", {"oversampling": 2})

    def ask(action: str, sent: Contents, shapes: Shapes | None = None) -> Contents:
        assert (1 in sent) == (action == "sketch" or lost == "project")
        return {client: a for client, a in case.answer(action, sent, shapes).items() if action != lost or client != 1}

    given = [Update(k, n, case.state.adapters, dict(case.state.dense)) for k, n in enumerate(EXAMPLES)]
    updates = case.strategy.gather(case.state, given, 1, ask)
    assert [update.client for update in updates] == [0, 2, 3]
    after, others = case.strategy.merge(case.state, updates, 1), [case.clients[k] for k in (0, 2, 3)]
    alone = replace(case, clients=others, examples=[10, 5, 55], given=[])
    drawn = sketch.omega(LAYERS, RANK + 2, 0, 1)
    for layer in LAYERS:
        ideal = alone.ideal(layer)
        Q = np.linalg.qr((ideal if lost == "sketch" else case.ideal(layer)) @ drawn[layer])[0]
        U, values, Vt = np.linalg.svd(Q @ Q.T @ ideal, full_matrices=False)
        assert gap(effective(after, layer), U[:, :RANK] * values[:RANK] @ Vt[:RANK]) < 1e-12


def test_fedask_without_any_answer_has_nothing_to_merge() -> None:
    case = a_round("fedask")
    given = [Update(k, n, case.state.adapters) for k, n in enumerate(EXAMPLES)]
    assert case.strategy.gather(case.state, given, 1, lambda action, sent, shapes: {}) == []
    half = lambda action, sent, shapes: case.answer(action, sent, shapes) if action == "sketch" else {}  # noqa: E731
    assert case.strategy.gather(case.state, given, 1, half) == []


def test_fedask_keeps_a_direction_that_B_says_nothing_about() -> None:
    """Where a singular value is zero, √S on both sides would leave zeros on both, for good."""
    case = a_round("fedask")
    A = {layer: pair.A for layer, pair in case.clients[0].adapters.items()}
    flat = with_adapters(case, lambda k, x, pair: Pair(A[x], np.outer(np.arange(1.0, len(pair.B) + 1), [k, 1, 2])))
    after = flat.merge()
    for layer, pair in after.adapters.items():
        assert gap(effective(after, layer), flat.ideal(layer)) < 1e-12
        lengths = np.linalg.norm(pair.A, axis=1)[: LAYERS[layer][0]]
        assert lengths == pytest.approx([lengths[0]] * len(lengths), rel=1e-9)


def test_omega_is_the_same_for_all_clients_and_new_in_each_round() -> None:
    drawn = {key: sketch.omega(LAYERS, 4, *key) for key in ((0, 1), (0, 2), (1, 1))}
    again = sketch.omega(dict(reversed(LAYERS.items())), 4, 0, 1)
    for layer, (m, n) in LAYERS.items():
        assert np.array_equal(again[layer], drawn[0, 1][layer]) and again[layer].shape == (n, min(4, m, n))
        assert len({found[layer].tobytes() for found in drawn.values()}) == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"factors": "A"}, "strategy.factors=A is not known; "),
        ({"oversampling": -1}, "strategy.oversampling=-1 is out of range; it must be 0 or above"),
        ({"oversampling": 1.5}, "strategy.oversampling=1.5 is of the wrong type; it takes int (default 10)"),
    ],
)
def test_fedask_refuses_settings_that_make_no_sense(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        strategies.make("fedask", **settings)
    assert str(error.value).startswith(sentence)
