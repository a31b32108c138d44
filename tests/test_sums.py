"""Large cohorts: the mean is summed as updates come, in any order, and is the one that keeping them all gives."""

from __future__ import annotations

import numpy as np
import pytest

import strategies
from fedlora import lowrank, messages
from fedlora.lowrank import Pair
from fedlora.messages import ServerState, Update
from strategies import base, wire
from strategies.updates import Sum, average_dense, shares
from tests.test_rounds import StubGrid, honest, make, outside_of_flower, play  # noqa: F401

LINEAR = [name for name in strategies.names() if strategies.strategy_class(name).linear]


def test_a_sum_has_the_same_bits_in_any_order_and_those_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    A = rng.normal(size=(2, 5)).astype(np.float32)
    state = ServerState({"q": Pair(A, np.zeros((6, 2), np.float32))}, {"h": np.zeros(3)})
    sent = [
        Update(k, int(rng.integers(1, 10**6)), {"q": Pair(A, (rng.normal(size=(6, 2)) * 10**k).astype(np.float32))},
            {"h": rng.normal(size=3) * 10**k})
        for k in range(12)
    ]  # fmt: skip
    found, naive = set(), set()
    for seed in range(20):
        total, order = Sum("B"), np.random.default_rng(seed).permutation(len(sent))
        for k in order:
            total.add(sent[k])
        mean = total.mean(state)
        found.add((mean.adapters["q"].B.tobytes(), mean.dense["h"].tobytes(), mean.examples))
        naive.add(sum(sent[k].examples * sent[k].dense["h"] for k in order).tobytes())
    assert len(found) == 1 < len(naive)  # a plain sum would show the order
    p = shares(sent)
    np.testing.assert_allclose(mean.adapters["q"].B, lowrank.average([u.adapters["q"].B for u in sent], p), rtol=1e-6)
    np.testing.assert_allclose(mean.adapters["q"].A, A, rtol=1e-6)
    np.testing.assert_allclose(mean.dense["h"], average_dense(sent)["h"], rtol=1e-12)
    assert mean.examples == sum(update.examples for update in sent)


@pytest.mark.parametrize("name", LINEAR)
def test_a_cohort_that_is_summed_as_it_comes_gives_the_state_of_one_that_is_kept(name, monkeypatch) -> None:
    strategy = make(name)
    kept = play(strategy, StubGrid(honest()))[-1]
    whole = strategy.state
    monkeypatch.setattr(wire, "MANY", 2)
    monkeypatch.setattr(base, "average_dense", lambda updates: _one(updates) or average_dense(updates))
    streamed = [make(name) for _ in range(3)]
    ends = [play(one, StubGrid(honest(), shuffle=seed))[-1] for seed, one in enumerate(streamed)]
    assert ends[0] == ends[1] == ends[2]  # whatever order replies came in
    assert ends[0].keys() == kept.keys()
    found, expected = (messages.fold(state.adapters, state.dense)[0] for state in (streamed[0].state, whole))
    for layer, pair in expected.items():
        assert (pair.A if strategy.personal else pair.B @ pair.A).any()
        np.testing.assert_allclose(found[layer].B @ found[layer].A, pair.B @ pair.A, atol=1e-5)
        if not strategy.redraws and strategy.steady:
            np.testing.assert_allclose(found[layer].A, pair.A, atol=1e-5)
    assert streamed[0].report.metrics["update_norm"] == pytest.approx(strategy.report.metrics["update_norm"], rel=1e-5)
    assert streamed[0].report.metrics["client_loss"] == strategy.report.metrics["client_loss"]


def _one(updates: list[Update]) -> None:
    assert len(updates) == 1  # what is merged is the mean


def test_a_strategy_that_needs_every_client_keeps_them_all(monkeypatch) -> None:
    monkeypatch.setattr(wire, "MANY", 2)
    expected = play(make("lora_fair"), StubGrid(honest()))
    monkeypatch.undo()
    assert play(make("lora_fair"), StubGrid(honest())) == expected
