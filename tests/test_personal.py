"""FedSA-LoRA: B and the head stay on the client, in a state of its own that only its replies change."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from clients.start import PERSONAL
from fedlora import engines
from fedlora.app import experiment, records
from fedlora.app.assembly import make_strategy
from fedlora.arrays import messages
from fedlora.check import ConfigError
from fedlora.compute import workbench
from fedlora.compute.evaluate import evaluate
from tests import apps
from tests.test_experiment import rows_of
from tests.test_wire import Tap, play


@pytest.fixture
def config(small):
    return small(strategy={"name": "fedsa_lora"}, adapter__train_head=True, evaluate__holdout=0.2, rounds=3, train__lr=0.3)


def own(states: dict[int, RecordDict]) -> dict[int, dict[str, bytes]]:
    """What each client keeps, as bytes."""
    kept = {node - 1: messages.arrays_of(state[PERSONAL]) for node, state in states.items()}
    return {client: {name: array.tobytes() for name, array in arrays.items()} for client, arrays in kept.items()}


class Watched(Tap):
    """Keeps the clients' states as they are after each batch of messages."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.history: list[tuple[str, dict[int, dict[str, bytes]]]] = []

    def send_and_receive(self, messages, *, timeout=None):
        batch = list(messages)
        replies = list(super().send_and_receive(batch, timeout=timeout))
        self.history.append((batch[0].metadata.message_type, own(self.states)))
        return replies


def drive(config, grid):
    bench, strategy = workbench.build(config), make_strategy(config)
    begun = experiment.initial_state(bench, strategy)
    job, cohorts = ConfigRecord({messages.EXPERIMENT: config.to_json()}), []

    def after(round, arrays):
        cohorts.append(strategy.report.cohort if round else [])

    packed, tests = messages.pack(begun.adapters, begun.dense), ConfigRecord(dict(job))
    strategy.start(grid, packed, config.rounds, train_config=job, evaluate_config=tests, evaluate_fn=after)
    return strategy, cohorts[1:]


def test_neither_B_nor_the_head_is_ever_in_a_message(config) -> None:
    _, grid, states = play(config)
    names = {f"{layer}.lora_A.weight" for layer in states[0].adapters}
    for message in (*grid.sent, *grid.got):
        records_of = message.content.array_records.values()
        assert all(set(record) == names for record in records_of)
    kept = own(grid.states)
    assert all(sum(".lora_B." in name for name in arrays) == 8 and len(arrays) == 10 for arrays in kept.values())
    everything = b"".join(a.data for m in (*grid.sent, *grid.got) for r in m.content.array_records.values() for a in r.values())
    assert not any(array in everything for arrays in kept.values() for array in arrays.values())
    assert all(not state.dense and not any(pair.B.any() for pair in state.adapters.values()) for state in states)


def test_state_changes_with_a_reply_to_training_only(config) -> None:
    grid = Watched(config)
    _, cohorts = drive(config, grid)
    assert len(cohorts) == 3
    rounds = [after for kind, after in grid.history if kind == "train"]
    before: dict[int, dict[str, bytes]] = {}
    for cohort, after in zip(cohorts, rounds, strict=True):
        assert after.keys() == before.keys() | set(cohort)
        assert all((after[client] != before.get(client)) == (client in cohort) for client in after)  # nobody else's moved
        before = after
    assert [after for kind, after in grid.history if kind == "evaluate"] == rounds  # a test changes nothing
    assert len({kept["base_model.model.classifier.bias"] for kept in before.values()}) == len(before)


@pytest.mark.parametrize("cohort", ["1", "4"])
def test_a_client_that_fails_keeps_the_state_that_it_had(config, monkeypatch, cohort) -> None:
    config.engine.cohort, config.clients_per_round, config.min_success = cohort, config.clients, 0.1
    monkeypatch.setattr(apps, "FAULTY", set())
    grid = Watched(config, "tests.apps:raises_together" if cohort == "4" else "tests.apps:raises")
    bench, strategy = workbench.build(config), make_strategy(config)
    begun = experiment.initial_state(bench, strategy)
    job = ConfigRecord({messages.EXPERIMENT: config.to_json()})

    def after(round, arrays):
        monkeypatch.setattr(apps, "FAULTY", {1} if round == 1 else set())

    packed, tests = messages.pack(begun.adapters, begun.dense), ConfigRecord(dict(job))
    strategy.start(grid, packed, 3, train_config=job, evaluate_config=tests, evaluate_fn=after)
    first, second, third = (after for kind, after in grid.history if kind == "train")
    assert second[1] == first[1] != third[1]
    assert all(second[client] != first[client] for client in first if client != 1)


def test_accuracy_is_each_clients_own(config) -> None:
    """Of its model: Ā, its B and its head, on what it holds back; one that never trained has B = 0 and the head as loaded."""
    config.rounds = 2
    summary = experiment.run(config, 0.0)
    _strategy, grid, states = play(config)
    bench, rows = workbench.build(config), rows_of(config)
    found = {}
    for client in range(config.clients):
        kept = grid.states.get(client + 1)
        arrays = messages.unpack(kept[PERSONAL]) if kept else messages.Arrays({}, {}, {})
        factors = {
            layer: {"A": pair.A, "B": arrays.factors.get(layer, {}).get("B", np.zeros_like(pair.B))}
            for layer, pair in states[-1].adapters.items()
        }
        bench.model.write(factors, bench.model.initial_head | arrays.dense)
        found[str(client)] = evaluate(bench.model, bench.train, bench.examples_of(client)[1], 256)["accuracy"]
    assert rows[-1]["client_accuracy"] == pytest.approx(found)
    assert rows[-1]["client_accuracy_mean"] == pytest.approx(np.mean(list(found.values())))
    assert len(set(found.values())) > 1 and "client_accuracy" not in rows[0]
    assert all("accuracy" not in row for row in rows) and summary["status"] == "finished"  # the server has no model to test


def test_without_a_holdout_it_is_refused(small) -> None:
    with pytest.raises(ConfigError, match=r"strategy=fedsa_lora leaves a part .*set evaluate.holdout=0.2"):
        make_strategy(small(strategy={"name": "fedsa_lora"}))


def test_what_is_saved_is_nobodys_own(config) -> None:
    """A of everybody, B = 0, and the head as it was loaded, not that of the client that trained last."""
    from safetensors.numpy import load_file

    experiment.run(config, 0.0)
    saved = load_file(records.Recorder(config).folder / "adapter" / "adapter_model.safetensors")
    last, head = play(config)[2][-1], workbench.build(config).model.initial_head
    for layer, pair in last.adapters.items():
        assert np.array_equal(saved[f"{layer}.lora_A.weight"], pair.A)
        assert not saved[f"{layer}.lora_B.weight"].any()
    assert head and all(np.array_equal(saved[name], array) for name, array in head.items())


def test_workers_keep_the_same_states_to_the_bit(config) -> None:
    inline = Watched(config)
    ended = drive(config, inline)[0].state
    on_ray = dataclasses.replace(config, engine=dataclasses.replace(config.engine, name="ray", workers=2))
    engine, found = engines.make(on_ray), {}

    def there(grid):
        found["state"], found["kept"] = drive(on_ray, grid)[0].state, own(grid.states)

    engine.run(there)
    engine.close()
    assert found["kept"] == own(inline.states)
    assert all(np.array_equal(pair.A, ended.adapters[layer].A) for layer, pair in found["state"].adapters.items())
