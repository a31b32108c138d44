"""Clients of unequal rank: who gets which, what is refused, and that the scale alpha / r_k is in what is merged."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

import strategies
from fedlora.app import experiment, ranks
from fedlora.app.assembly import make_strategy
from fedlora.arrays import messages
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.check import ConfigError
from fedlora.compute import workbench
from fedlora.server.updates import at_rank, in_scale
from fedlora.validate import from_json
from tests.test_experiment import rows_of
from tests.test_wire import play

UNEQUAL = {"fedavg": "padded", "lora_fair": "padded", "flora": "native", "flexlora": "native", "hetlora": "native"}
unequal = pytest.mark.parametrize("name", UNEQUAL)


# ---- who gets which


def test_a_list_is_taken_as_it_is() -> None:
    assert ranks.dealt([2, 4, 8], 3, 0) == [2, 4, 8]


@pytest.mark.parametrize(
    ("shares", "clients", "counts"),
    [
        ({"2": 0.5, "4": 0.5}, 6, {2: 3, 4: 3}),
        ({"2": 0.5, "4": 0.3, "8": 0.2}, 7, {2: 4, 4: 2, 8: 1}),  # 3.5, 2.1, 1.4: the one that is left goes to .5
        ({"1": 1 / 3, "2": 1 / 3, "4": 1 / 3}, 10, {1: 4, 2: 3, 4: 3}),  # of equal remainders the smaller rank's first
        ({"4": 0.9, "8": 0.1}, 3, {4: 3}),
        ({"4": 1.0}, 5, {4: 5}),
        ({"4": 0.1, "8": 0.7, "2": 0.2}, 10, {4: 1, 8: 7, 2: 2}),  # .7 · 10 is 6.999…, which is seven
    ],
)
def test_shares_are_dealt_by_largest_remainders(shares, clients, counts) -> None:
    hand = ranks.dealt(shares, clients, 0)
    assert Counter(hand) == counts
    assert hand == ranks.dealt(dict(reversed(shares.items())), clients, 0)  # JSON sorts keys, which must not matter


def test_the_seed_deals_them() -> None:
    shares = {"2": 0.5, "4": 0.5}
    hands = [tuple(ranks.dealt(shares, 20, seed)) for seed in range(5)]
    assert len(set(hands)) == 5 and ranks.dealt(shares, 20, 3) == list(hands[3])


SIZES = {"q": Pair(np.zeros((3, 5)), np.zeros((7, 3))), "v": Pair(np.zeros((3, 11)), np.zeros((2, 3)))}  # Σn = 16, Σm = 9


@pytest.mark.parametrize(
    ("changes", "trains", "floats"),
    [
        ({}, "AB", 2 * 25),  # held, and a gradient
        ({}, "B", 25 + 9),
        ({"train__momentum": 0.9}, "B", 25 + 2 * 9),
        ({"train__optimizer": "adamw"}, "AB", 4 * 25),
        ({"privacy__name": "record", "privacy__noise_multiplier": 1.0, "train__batch_size": 4}, "B", 25 + 5 * 9),
    ],
)
def test_memory_by_hand(small, changes, trains, floats) -> None:
    needs = ranks.training_bytes(small(**changes), SIZES, trains)
    assert [needs(rank) for rank in (1, 3)] == [4 * floats, 12 * floats]


def test_memory_sets_the_largest_rank_that_fits(small) -> None:
    one = 4 * 50 / 1e6  # MB that rank 1 takes
    memory = [one, 2.99 * one, 3 * one, 100 * one]
    config = small(clients=4, strategy={"name": "flora"}, adapter__memory=memory)
    assert ranks.of_clients(config, SIZES, "AB") == [1, 2, 3, 8]  # none above adapter.rank
    config.adapter.memory[0] = 0.99 * one
    with pytest.raises(ConfigError, match=r"adapter.memory=0.000198 MB is too little: training at rank 1 takes 0.0002 MB"):
        ranks.of_clients(config, SIZES, "AB")


def test_all_alike_is_no_list(small) -> None:
    assert ranks.of_clients(small(), SIZES, "AB") is None


def test_ranks_are_the_same_where_the_settings_have_travelled(small) -> None:
    config = small(clients=20, strategy={"name": "flora"}, adapter__ranks={8: 0.3, 2: 0.3, 4: 0.4}, adapter__rank=8)
    assert ranks.of_clients(from_json(config.to_json()), SIZES, "AB") == ranks.of_clients(config, SIZES, "AB")


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"adapter__ranks": [2, 4]}, "adapter.ranks lists 2 clients, and clients=6; give one for each"),
        ({"adapter__ranks": []}, "adapter.ranks lists 0 clients"),
        ({"adapter__ranks": {}}, "adapter.ranks={} must be a list"),
        ({"adapter__ranks": 4}, "adapter.ranks=4 must be a list"),
        ({"adapter__ranks": {2: 0.5, 4: 0.4}}, "shares must be above 0 and add up to 1"),
        ({"adapter__ranks": {2: 1.5, 4: -0.5}}, "shares must be above 0 and add up to 1"),
        ({"adapter__ranks": {2: float("nan")}}, "shares must be above 0 and add up to 1"),
        ({"adapter__ranks": {2: "half"}}, "shares must be above 0 and add up to 1"),
        ({"adapter__ranks": {"2.5": 1.0}}, "adapter.ranks has 2.5, which is no rank"),
        ({"adapter__ranks": [0, 2, 2, 2, 2, 2]}, "adapter.ranks has 0, which is no rank"),
        ({"adapter__ranks": [2, 2, 2, 2, 2, -2]}, "adapter.ranks has -2, which is no rank"),
        ({"adapter__ranks": [2, 2, 2, 2, 2, "x"]}, "adapter.ranks has x, which is no rank"),
        ({"adapter__ranks": {9: 1.0}}, "adapter.ranks has 9, above adapter.rank=8; set adapter.rank=9"),
        ({"adapter__memory": {"little": 1.0}}, "adapter.memory has little, which is no size in MB"),
        ({"adapter__memory": {1: 1.0}, "adapter__ranks": {2: 1.0}}, "adapter.ranks and adapter.memory both set"),
        ({"adapter__ranks": {2: 1.0}, "server__mean": "median"}, "do not go with server.mean"),
        (
            {"adapter__ranks": {2: 1.0}, "privacy__name": "user", "privacy__epsilon": 8.0},
            "do not go with privacy=user",
        ),
    ],
)
def test_settings_that_are_refused(small, settings, sentence) -> None:
    with pytest.raises(ConfigError) as error:
        small(strategy={"name": "flora"}, **settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(set(strategies.names()) - set(UNEQUAL)))
@pytest.mark.parametrize("setting", [{"adapter__ranks": {2: 0.5, 8: 0.5}}, {"adapter__memory": {1: 1.0}}])
def test_strategies_that_refuse_say_why(small, name, setting) -> None:
    with pytest.raises(ConfigError) as error:
        make_strategy(small(strategy={"name": name}, evaluate__holdout=0.2, **setting))
    reason = strategies.strategy_class(name).one_rank
    assert f"strategy={name}: {reason}; give all clients one rank" in str(error.value) and len(reason) > 20


@unequal
def test_strategies_that_do_not_refuse(name) -> None:
    assert strategies.strategy_class(name).unequal.value == UNEQUAL[name]


# ---- scale


def a_state(rng: np.random.Generator, rank: int = 4, alpha: float = 6.0) -> ServerState:
    layers = {name: Pair(rng.standard_normal((rank, 7)), rng.standard_normal((9, rank))) for name in ("q", "v")}
    return ServerState(layers, {"h": np.ones(2)}, scale=alpha / rank)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_client_is_given_the_product_of_its_rows_at_its_own_scale(rank) -> None:
    state = a_state(np.random.default_rng(0))
    given = at_rank(state, rank)
    assert given.scale == pytest.approx(6.0 / rank)
    for layer, pair in state.adapters.items():
        own = given.adapters[layer]
        assert (own.A.shape, own.B.shape) == ((rank, 7), (9, rank))
        assert np.array_equal(own.A, pair.A[:rank])
        np.testing.assert_allclose(given.scale * own.B @ own.A, state.scale * pair.B[:, :rank] @ pair.A[:rank])


def test_at_its_own_rank_it_is_the_state_itself() -> None:
    state = a_state(np.random.default_rng(0))
    assert at_rank(state, 4) is state


@pytest.mark.parametrize("padded", [True, False])
def test_what_comes_back_is_in_the_scale_of_the_state(padded) -> None:
    rng = np.random.default_rng(1)
    state, own = a_state(rng), a_state(rng, rank=2)
    update = in_scale(Update(3, 5, own.adapters, own.dense), own.scale, state, padded)
    for layer, pair in own.adapters.items():
        got = update.adapters[layer]
        np.testing.assert_allclose(state.scale * got.B @ got.A, own.scale * pair.B @ pair.A)
        assert got.rank == (4 if padded else 2)
        if padded:  # rows that it was not given are the state's, beside which B is zero
            assert np.array_equal(got.A[2:], state.adapters[layer].A[2:]) and not got.B[:, 2:].any()
    assert in_scale(update, state.scale, state, padded) is update


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_there_and_back_is_the_product_that_it_was(rank) -> None:
    state = a_state(np.random.default_rng(2))
    given = at_rank(state, rank)
    back = in_scale(Update(0, 1, given.adapters, given.dense), given.scale, state, True)
    for layer, pair in state.adapters.items():
        np.testing.assert_allclose(back.adapters[layer].B[:, :rank], pair.B[:, :rank])
        assert np.array_equal(back.adapters[layer].A, pair.A)


# ---- runs

SHARES: dict[str, Any] = {"adapter__ranks": {2: 0.5, 4: 0.5}, "adapter__rank": 4, "adapter__alpha": 6.0}


@unequal
@pytest.mark.parametrize("privacy", [{}, {"privacy__name": "record", "privacy__noise_multiplier": 0.5}])
def test_a_run_and_its_bytes(small, name, privacy) -> None:
    """Everybody sends and is sent its own rank; the message names it."""
    config = small(strategy={"name": name}, **SHARES, **privacy)
    if privacy:
        experiment.run(config, 0.0)
        assert all(row["drops"] == {} for row in rows_of(config)[1:])
        return
    strategy, grid, states = play(config)
    own = ranks.of_clients(config, states[0].adapters, "AB")
    assert own is not None and Counter(own) == {2: 3, 4: 3} and strategy.ranks == own
    sent = {m.metadata.dst_node_id - 1: m.content for m in grid.sent if m.metadata.message_type == "train"}
    for client, content in sent.items():
        assert content[messages.CONFIG][messages.RANK] == own[client]
    for arrays, reply in zip(grid.up(), [r for r in grid.got if r.metadata.message_type == "train"], strict=True):
        rank = own[int(reply.content["metrics"]["client"])]
        assert {array.shape for array in arrays.values()} == {(rank, 64), (64, rank)}
    cohort = strategy.reports[0].cohort
    assert strategy.reports[0].bytes_up == sum(16 * (4 * 64 * own[client] + 128) for client in cohort)
    assert strategy.report.drops == {}
    assert all(pair.rank == 4 and pair.B.any() != (name == "flora") for pair in states[-1].adapters.values())


def test_fedavg_of_two_ranks_by_hand(small) -> None:
    """B is zero where a round begins, so that one client of rank 2 and one of rank 4 can be told apart in the mean."""
    config = small(
        clients=2, clients_per_round=2, rounds=1, strategy={"name": "fedavg"}, **(SHARES | {"adapter__ranks": [2, 4]})
    )
    strategy, grid, states = play(config)
    examples = [len(workbench.build(config).examples_of(client)[0]) for client in (0, 1)]
    p = np.array(examples) / sum(examples)
    low, high = grid.up()
    for layer, pair in states[1].adapters.items():
        A0, A1, B0, B1 = (sent[f"{layer}.lora_{f}.weight"].astype(float) for f in "AB" for sent in (low, high))
        A = np.concatenate([p[0] * A0 + p[1] * A1[:2], p[0] * states[0].adapters[layer].A[2:] + p[1] * A1[2:]])
        B = p[1] * B1
        B[:, :2] += p[0] * 2.0 * B0  # alpha / 2 is twice alpha / 4
        np.testing.assert_allclose(pair.A, A, atol=1e-6)
        np.testing.assert_allclose(pair.B, B, atol=1e-6)
    assert strategy.report is not None and strategy.report.drops == {}


@unequal
def test_together_is_one_by_one(small, name) -> None:
    """Clients of different rank share their passes."""
    ends = []
    for cohort in ("1", "4"):
        config = small(strategy={"name": name}, engine__cohort=cohort, adapter__dropout=0.1, **SHARES)
        end = play(config)[2][-1]
        products = {layer: pair.B.astype(float) @ pair.A for layer, pair in end.adapters.items()}
        for layer, pair in end.base_correction.items():
            products[layer] = products[layer] + pair.B.astype(float) @ pair.A
        ends.append(products)
    for layer in ends[0]:
        assert np.linalg.norm(ends[0][layer] - ends[1][layer]) <= 1e-4 * np.linalg.norm(ends[0][layer]) > 0


@unequal
def test_memory_runs_too(small, name) -> None:
    needs = 4 * 2 * 1024 / 1e6  # of rank 1: two factors of 64, 8 layers, each with its gradient
    config = small(strategy={"name": name}, rounds=1, adapter__memory=[needs, 2.5 * needs, 4 * needs, needs, 9 * needs, needs])
    strategy, _, _ = play(config)
    assert strategy.ranks == [1, 2, 4, 1, 8, 1] and strategy.report is not None and strategy.report.drops == {}
