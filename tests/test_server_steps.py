"""Optimisers of the server against Flower's own numbers, FedProx against its gradient, robust means by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM

import strategies
from clients.task import Task
from fedlora.app import experiment
from fedlora.app.assembly import make_strategy
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.check import ConfigError
from fedlora.compute import workbench
from fedlora.config import TrainConfig
from fedlora.server import optimizers, robust
from tests.test_experiment import rows_of
from tests.test_rounds import StubGrid, honest, make, outside_of_flower  # noqa: F401
from tests.test_rounds import play as play_stub
from tests.test_wire import bits, play

STEADY = [name for name in strategies.names() if strategies.strategy_class(name).keeps_basis]


def a_state(rng: np.random.Generator) -> ServerState:
    layers = {name: Pair(rng.standard_normal((2, 5)), rng.standard_normal((4, 2))) for name in ("q", "v")}
    return ServerState(layers, {"head": rng.standard_normal(3)})


def arrays_of(state: ServerState) -> dict[str, np.ndarray]:
    return {f"{layer}.{f}": a for layer, p in state.adapters.items() for f, a in p._asdict().items()} | state.dense


# ---- optimisers

RATES = {"momentum": (0.7, 0.6, 0.99, 1e-3), "adam": (0.05, 0.8, 0.95, 1e-2)}  # lr, momentum or β1, β2, τ


def flower(name: str) -> FedAvgM | FedAdam:
    lr, momentum, beta2, tau = RATES[name]
    if name == "momentum":
        return FedAvgM(server_learning_rate=lr, server_momentum=momentum)
    return FedAdam(eta=lr, beta_1=momentum, beta_2=beta2, tau=tau)


@pytest.mark.parametrize("name", RATES)
def test_flowers_own_numbers(name) -> None:
    """Four rounds in which one client sends what was merged: Flower averages it, and takes its step."""
    rng = np.random.default_rng(0)
    theirs, ours, step = flower(name), a_state(rng), optimizers.make(name, *RATES[name])
    record = ArrayRecord({key: Array(array) for key, array in arrays_of(ours).items()})
    grid = StubGrid(lambda number, message: None, clients=2)
    for round in range(1, 5):
        move = {key: array + rng.standard_normal(array.shape) for key, array in arrays_of(ours).items()}
        list(theirs.configure_train(round, record, ConfigRecord(), grid))
        question = Message(RecordDict(), 1, "train")
        question.metadata.__dict__["_message_id"] = "1"
        content = RecordDict({
            "arrays": ArrayRecord({key: Array(array) for key, array in move.items()}),
            "metrics": MetricRecord({"num-examples": 3}),
        })  # fmt: skip
        record, _ = theirs.aggregate_train(round, [Message(content, reply_to=question)])
        adapters = {layer: Pair(move[f"{layer}.A"], move[f"{layer}.B"]) for layer in ours.adapters}
        ours = step(ours, replace(ours, adapters=adapters, dense={"head": move["head"]}), "AB")
        for key, array in arrays_of(ours).items():
            np.testing.assert_allclose(array, record[key].numpy(), rtol=1e-12, err_msg=f"{key} in round {round}")


@pytest.mark.parametrize("name", RATES)
def test_what_is_not_sent_is_not_moved_and_memory_goes_by_array(name) -> None:
    """A round of B, then one of A (RoLoRA): each factor's moments are those of its own merges."""
    rng, step = np.random.default_rng(1), optimizers.make(name, *RATES[name])
    state = a_state(rng)
    merged = replace(state, adapters={x: Pair(p.A, p.B + 1) for x, p in state.adapters.items()})
    moved = step(state, merged, "B")
    assert all(moved.adapters[layer].A is pair.A for layer, pair in state.adapters.items())
    assert {key.split("/")[2] for key in moved.extra} == {"B", ""} and not state.extra
    again = step(moved, replace(moved, adapters={x: Pair(p.A + 1, p.B) for x, p in moved.adapters.items()}), "A")
    fresh = step(state, replace(state, adapters={x: Pair(p.A + 1, p.B) for x, p in state.adapters.items()}), "A")
    for layer in state.adapters:  # A's first step is a first step
        np.testing.assert_allclose(again.adapters[layer].A, fresh.adapters[layer].A)
        assert np.array_equal(again.adapters[layer].B, moved.adapters[layer].B)


def test_momentum_of_zero_at_rate_one_is_the_merge() -> None:
    rng = np.random.default_rng(2)
    state, merged = a_state(rng), a_state(rng)
    moved = optimizers.make("momentum", 1.0, 0.0)(state, merged, "AB")
    for key, array in arrays_of(moved).items():
        np.testing.assert_allclose(array, arrays_of(merged)[key])


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("optimizer", RATES)
def test_runs_and_the_memory_is_in_the_state(small, name, optimizer) -> None:
    more: dict[str, Any] = {"strategy": {"name": name}, "clients_per_round": 2, "train__steps": 2, "train__batch_size": 4}
    more["evaluate__holdout"] = 0.2 * (name == "fedsa_lora")
    _, _, states = play(small(server__optimizer=optimizer, server__lr=0.5, **more))
    plain = play(small(**more))[2]
    assert bits(states[1]) != bits(plain[1])
    moments = {key.rpartition("/")[2] for key in states[-1].extra if key.startswith("optimizer/")}
    assert moments == ({"v"} if optimizer == "momentum" else {"t", "m", "v"})
    times = [float(array) for key, array in states[-1].extra.items() if key.endswith("/t")]
    assert all(1 <= t <= 2 for t in times)


@pytest.mark.parametrize("name", sorted(set(strategies.names()) - set(STEADY)))
def test_merges_that_leave_their_coordinates_are_refused(small, name) -> None:
    with pytest.raises(ConfigError, match=f"server.optimizer=adam does not go with strategy={name}, .*set it to none"):
        make_strategy(small(strategy={"name": name}, server__optimizer="adam"))


def test_which_they_are() -> None:
    assert set(strategies.names()) - set(STEADY) == {"fedsvd", "flora", "flexlora", "fedask"}


# ---- FedProx


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"weight_decay": 0.1}])
def test_the_proximal_gradient_by_hand(settings) -> None:
    """Steps on the loss g·x + μ/2 ‖x − x0‖², beside the same by torch's own autograd."""
    task = Task(np.arange(3), TrainConfig(lr=0.3, proximal=0.4, **settings), "B", (1, 1), (0, 0, 1))
    start, g = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 0.1, -0.2])
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one, other = task.optimizer([ours]), torch.optim.SGD([theirs], lr=0.3, **settings)
    for _ in range(3):
        ours.grad = g.clone()
        one.step()
        other.zero_grad()
        (g @ theirs + 0.2 * (theirs - start).square().sum()).backward()
        other.step()
        torch.testing.assert_close(ours.data, theirs.data)
    first = start - 0.3 * (g + settings.get("weight_decay", 0.0) * start)  # the term is zero in the first step
    again = Task(np.arange(3), TrainConfig(lr=0.3, proximal=0.4, **settings), "B", (1, 1), (0, 0, 1))
    x = torch.nn.Parameter(start.clone())
    step = again.optimizer([x])
    x.grad = g.clone()
    step.step()
    torch.testing.assert_close(x.data, first)


@pytest.mark.parametrize("privacy", [{}, {"privacy__name": "record", "privacy__noise_multiplier": 0.5}])
def test_a_client_is_held_back_and_together_is_one_by_one(small, privacy) -> None:
    """After one step it is where it was without μ; the second takes lr·μ of that step back."""
    ends = {}
    for key, changes in {
        "plain": {}, "held": {"train__proximal": 0.5}, "fused": {"train__proximal": 0.5, "engine__cohort": "4"},
    }.items():  # fmt: skip
        config = small(strategy={"name": "fedavg"}, rounds=1, train__steps=3, **changes, **privacy)
        if privacy:
            experiment.run(config, 0.0)
            ends[key] = rows_of(config)[-1]["update_norm"]
        else:
            state = play(config)[2][-1]
            ends[key] = float(np.linalg.norm(np.concatenate([pair.B.ravel() for pair in state.adapters.values()])))
    assert ends["held"] == pytest.approx(ends["fused"], rel=1e-4) and ends["held"] < 0.98 * ends["plain"]


def test_in_private_steps_the_term_is_added_after_clip_and_noise(small) -> None:
    """σ = 0, one Poisson step of everybody, a clip of nearly nothing: the gradient is gone, the pull is not."""
    from clients.private import Mechanism
    from clients.train import perform

    config = small(train__proximal=1.0, train__lr=0.25, train__steps=2)
    bench = workbench.build(config)
    settings = replace(config.train, batch_size=8)
    task = Task(np.arange(8), settings, "B", (1, 1), (0, 0, 1), Mechanism(0.0, 1e-8), bytes(32))
    begun = bench.model.initial("kaiming", 0)
    bench.model.write(begun, {})
    optimizer = task.optimizer([torch.nn.Parameter(torch.ones(2))])
    (moved,) = optimizer.param_groups[0]["params"]
    moved.data, moved.grad = torch.tensor([3.0, 1.0]), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(moved.data, torch.tensor([3.0 - 0.25 * 2.0, 1.0]))
    perform(task, bench.model, bench.train)
    assert all(np.abs(pair.B).max() < 1e-8 for pair in bench.model.adapters().values())


# ---- robust means


def updates(count: int, rng: np.random.Generator, state: ServerState) -> list[Update]:
    def moved(array: np.ndarray) -> np.ndarray:
        return array + rng.standard_normal(array.shape)

    return [
        Update(k, 3 + k, {x: Pair(*map(moved, p)) for x, p in state.adapters.items()}, {"head": moved(state.dense["head"])})
        for k in range(count)
    ]


@pytest.mark.parametrize(("mean", "count"), [("median", 5), ("median", 4), ("trimmed", 5), ("trimmed", 10)])
def test_means_by_hand(mean, count) -> None:
    rng = np.random.default_rng(3)
    state = a_state(rng)
    sent = updates(count, rng, state)
    (merged,) = robust.make(mean, 0.2)(state, sent, "B")
    cut = int(0.2 * count)
    for layer, pair in merged.adapters.items():
        assert pair.A is state.adapters[layer].A  # nobody sends it
        ordered = np.sort(np.stack([update.adapters[layer].B for update in sent]), axis=0)
        middle = ordered[(count - 1) // 2 : count // 2 + 1] if mean == "median" else ordered[cut : count - cut]
        np.testing.assert_allclose(pair.B, middle.mean(axis=0))
    assert merged.client == -1 and merged.examples == sum(update.examples for update in sent)


def test_one_gone_wrong_does_not_move_the_median_beyond_the_others() -> None:
    rng = np.random.default_rng(4)
    state = a_state(rng)
    sent = updates(5, rng, state)
    wrong = replace(sent[2], dense={"head": np.full(3, 1e9)})
    for mean in ("median", "trimmed"):
        (merged,) = robust.make(mean, 0.2)(state, [*sent[:2], wrong, *sent[3:]], "AB")
        others = np.stack([update.dense["head"] for k, update in enumerate(sent) if k != 2])
        assert (others.min(axis=0) <= merged.dense["head"]).all() and (merged.dense["head"] <= others.max(axis=0)).all()


def test_the_filter_leaves_out_the_long_ones_and_no_one_of_equals() -> None:
    rng = np.random.default_rng(5)
    state = a_state(rng)

    def away(distance: float, client: int) -> Update:
        head = state.dense["head"] + distance * np.array([0.0, 0.6, 0.8])
        return Update(client, 1, state.adapters, {"head": head})

    keep = robust.make("norm_filter", factor=3.0)
    sent = [away(distance, k) for k, distance in enumerate((1.0, 2.0, 2.0, 5.9, 6.1))]
    assert [update.client for update in keep(state, sent, "AB")] == [0, 1, 2, 3]  # the median is 2
    same = [away(1.0, k) for k in range(3)]
    assert keep(state, same, "AB") == same
    still = [away(0.0, k) for k in range(3)]
    assert keep(state, still, "AB") == still


def test_the_report_names_whom_the_filter_leaves_out() -> None:
    clients = honest()

    def client(number: int, message: Message) -> RecordDict | None:
        content = clients(number, message)
        if number == 3 and message.metadata.message_type == "train" and content is not None:
            content["arrays"] = ArrayRecord({k: Array(30 * a.numpy()) for k, a in content.array_records["arrays"].items()})
        return content

    strategy, without = make("fedavg"), make("fedavg")
    strategy.robust = without.robust = robust.make("norm_filter", factor=3.0)
    found = play_stub(strategy, StubGrid(client), rounds=1)
    assert strategy.report is not None and list(strategy.report.drops) == [3]
    assert strategy.report.drops[3] == "left out by server.mean: its update is much longer than the others'"

    def absent(number, message):
        return None if number == 3 and message.metadata.message_type == "train" else clients(number, message)

    assert found == play_stub(without, StubGrid(absent), rounds=1)


@pytest.mark.parametrize("name", [name for name in strategies.names() if name != "fedask"])
@pytest.mark.parametrize("mean", ["median", "trimmed", "norm_filter"])
def test_every_strategy_takes_a_robust_mean(name, mean) -> None:
    strategy = make(name)
    strategy.robust = robust.make(mean, 0.2)
    history = play_stub(strategy, StubGrid(honest()), rounds=2)
    assert history[1] != history[2]
    assert strategy.report is not None and set(strategy.report.drops) <= set(range(5) if mean == "norm_filter" else ())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"server__mean": "mean"}, "server.mean=mean is not known"),
        ({"server__optimizer": "sgd"}, "server.optimizer=sgd is not known"),
        ({"server__trim": 0.5}, "server.trim=0.5 is out of range; it must be at least 0 and below 0.5"),
        ({"server__trim": -0.1}, "server.trim=-0.1 is out of range"),
        ({"server__lr": 0.0}, "server.lr=0.0 is out of range"),
        ({"server__momentum": 1.0}, "server.momentum=1.0 is out of range"),
        ({"server__beta2": 1.0}, "server.beta2=1.0 is out of range"),
        ({"server__tau": 0.0}, "server.tau=0.0 is out of range"),
        ({"server__secure_bound": 0.0}, "server.secure_bound=0.0 is out of range"),
        ({"server__norm_factor": 0.0}, "server.norm_factor=0.0 is out of range"),
        ({"train__proximal": -1.0}, "train.proximal=-1.0 is out of range"),
        ({"server__mean": "median", "privacy__name": "user", "privacy__epsilon": 8.0}, "does not go with privacy=user"),
        (
            {"server__mean": "median", "strategy": {"name": "fedask"}},
            "never sees a client's own factors, which server.mean=median",
        ),
        ({"privacy__name": "user", "privacy__epsilon": 8.0, "strategy": {"name": "fedask"}}, "which privacy=user needs"),
    ],
)
def test_refusals(small, settings, sentence) -> None:
    with pytest.raises(ConfigError) as error:
        make_strategy(small(**settings))
    assert sentence in str(error.value) and "\n" not in str(error.value)
