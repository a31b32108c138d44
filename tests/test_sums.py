"""Large cohorts: the mean is summed as updates come, in any order, and is the one that keeping them all gives."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import strategies
from clients.app import app
from fedlora.arrays import lowrank, messages
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.arrays.sums import FEW, Sum, added
from fedlora.engines import ray as on_ray
from fedlora.server import inbox, wire
from fedlora.server.updates import average_dense, mean_of, shares
from strategies import base
from tests.test_engines import fit
from tests.test_rounds import Client, StubGrid, honest, initial, make, outside_of_flower, play  # noqa: F401

SHAPES = {"q.lora_B.weight": (6, 2), "h": (3,)}
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
        total, order = Sum(), np.random.default_rng(seed).permutation(len(sent))
        for part in np.split(order, [seed % 5, 9]):  # some added here, others brought as a sum
            there = Sum()
            for k in part:
                (total if seed % 2 else there).add(messages.named(sent[k].adapters, sent[k].dense, "B"), sent[k].examples)
            total.join(there.record(), there.examples, SHAPES)
        mean = mean_of(total, state)
        found.add((mean.adapters["q"].B.tobytes(), mean.dense["h"].tobytes(), mean.examples))
        naive.add(sum(sent[k].examples * sent[k].dense["h"] for k in order).tobytes())
    assert len(found) == 1 < len(naive)  # a plain sum would show the order
    p = shares(sent)
    np.testing.assert_allclose(mean.adapters["q"].B, lowrank.average([u.adapters["q"].B for u in sent], p), rtol=1e-6)
    np.testing.assert_allclose(mean.adapters["q"].A, A, rtol=1e-6)
    np.testing.assert_allclose(mean.dense["h"], average_dense(sent)["h"], rtol=1e-12)
    assert mean.examples == sum(update.examples for update in sent)


def many(monkeypatch) -> None:
    """Two clients are many, to who sends and who reads."""
    for module in (wire, inbox):
        monkeypatch.setattr(module, "MANY", 2)


@pytest.mark.parametrize("name", LINEAR)
def test_a_cohort_that_is_summed_as_it_comes_gives_the_state_of_one_that_is_kept(name, monkeypatch) -> None:
    strategy = make(name)
    kept = play(strategy, StubGrid(honest()))[-1]
    whole = strategy.state
    many(monkeypatch)
    monkeypatch.setattr(base, "average_dense", lambda updates: _one(updates) or average_dense(updates))
    streamed = [make(name) for _ in range(3)]
    ends = [play(one, StubGrid(honest(), shuffle=seed))[-1] for seed, one in enumerate(streamed)]
    assert ends[0] == ends[1] == ends[2]  # whatever order replies came in
    assert ends[0].keys() == kept.keys()
    found, expected = (messages.fold(state.adapters, state.dense)[0] for state in (streamed[0].state, whole))
    for layer, pair in expected.items():
        assert (pair.A if strategy.personal else pair.B @ pair.A).any()
        np.testing.assert_allclose(found[layer].B @ found[layer].A, pair.B @ pair.A, atol=1e-5)
        if not strategy.resamples_A and strategy.keeps_basis:
            np.testing.assert_allclose(found[layer].A, pair.A, atol=1e-5)
    assert streamed[0].report.metrics["update_norm"] == pytest.approx(strategy.report.metrics["update_norm"], rel=1e-5)
    assert streamed[0].report.metrics["client_loss"] == strategy.report.metrics["client_loss"]


def _one(updates: list[Update]) -> None:
    assert len(updates) == 1  # what is merged is the mean


def test_a_strategy_that_needs_every_client_keeps_them_all(monkeypatch) -> None:
    many(monkeypatch)
    expected = play(make("lora_fair"), StubGrid(honest()))
    monkeypatch.undo()
    assert play(make("lora_fair"), StubGrid(honest())) == expected


class Adding(StubGrid):
    """Adds replies to training up in two units, as two workers would, where the server allows it."""

    own_clients = True

    def send_and_receive(self, messages, *, timeout=None):
        asked = list(messages)
        replies = list(super().send_and_receive(asked, timeout=timeout))
        if not asked or not app.adds(asked[0]):
            return replies
        return [reply for unit in (replies[:7], replies[7:]) for reply in app.added(unit)]


def spoilt(number: int) -> Client:
    """Clients of which one sends a number that is none."""

    def client(k: int, message: Message) -> RecordDict | None:
        reply = honest()(k, message)
        if k == number and message.metadata.message_type == "train":
            arrays = messages.arrays_of(reply["arrays"])
            next(iter(arrays.values()))[0, 0] = np.nan
            reply["arrays"] = messages.record(arrays)
        return reply

    return client


def test_updates_that_are_added_up_on_their_way_change_nothing_and_a_spoilt_one_is_still_named(monkeypatch) -> None:
    many(monkeypatch)
    ends, strategies_ = [], []
    for grid in (StubGrid(spoilt(8), 14), Adding(spoilt(8), 14, shuffle=1), Adding(spoilt(8), 14, shuffle=2)):
        strategies_.append(make("fedavg", derive=True, min_available_nodes=14))
        ends.append(play(strategies_[-1], grid))
    assert ends[0] == ends[1] == ends[2]
    kept, *others = (strategy.report for strategy in strategies_)
    for other in others:
        assert other.drops == kept.drops == {8: "model.query.lora_A has NaN or infinite entries"}
        assert other.metrics == kept.metrics
        assert other.bytes_up == kept.bytes_up


@pytest.mark.parametrize("settings", [{"derive": False}, {"encodes": ("none", "int8", 0.1)}, {"ranks": [1, 2] * 7}])
def test_updates_that_do_not_add_up_are_not_added(settings, monkeypatch) -> None:
    many(monkeypatch)
    grid = StubGrid(honest(), 14)
    strategy = make("fedavg", **{"derive": True, "min_available_nodes": 14} | settings)
    sent = strategy.configure_train(1, initial(), ConfigRecord(), grid)
    assert not any(app.adds(message) for message in sent)


def test_a_few_updates_are_smaller_than_their_sum_and_stay_what_they_are() -> None:
    grid, strategy = StubGrid(honest(), FEW + 1), make("fedavg", min_available_nodes=FEW + 1)
    replies = list(grid.send_and_receive(strategy.configure_train(1, initial(), ConfigRecord(), grid)))
    assert all(messages.ARRAYS in reply.content for reply in added(replies[:FEW]))
    assert all(messages.SUM in reply.content for reply in added(replies))


def test_workers_that_add_up_give_the_bits_of_the_server_s_own_sum(small, monkeypatch) -> None:
    config = small(clients=12, clients_per_round=12, train__steps=1, engine__cohort="2")
    many(monkeypatch)
    monkeypatch.setattr(on_ray, "TURNS", 1)
    inline = fit(config, chosen=["fedavg", "fedsvd"])
    config.engine.name, config.engine.workers = "ray", 2
    joined, join = [], Sum.join
    monkeypatch.setattr(Sum, "join", lambda self, sum, *rest: joined.append(len(sum)) or join(self, sum, *rest))
    monkeypatch.setattr(on_ray.RayGrid, "_may_play", lambda self: False)  # nor here, until workers are up
    assert fit(config, chosen=["fedavg", "fedsvd"]) == inline
    assert len(joined) == 2 * 2 * 12  # strategies, rounds, clients
    assert 4 <= sum(map(bool, joined)) <= 8  # a sum or two a round
