"""Where a run happens never changes its numbers, and a worker that dies costs time only."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord

import strategies
from fedlora import engines
from fedlora.app import experiment
from fedlora.arrays import messages
from fedlora.check import ConfigError, RunError
from fedlora.compute import workbench
from fedlora.engines import pool
from tests import apps

SETTINGS = {
    "fedavg": {},
    "fedsvd": {"every": 2},
    "ffa_lora": {"init": "orthonormal"},
    "lora_fair": {"solver": "sgd"},
}


def fit(config, app=engines.CLIENT_APP, chosen=None) -> dict[str, dict[str, bytes]]:
    """Strategy name → the bytes of every final array, all strategies driven on one grid of the engine."""
    final = {}

    def drive(grid):
        for name in chosen or strategies.names():
            cell = experiment.Config(**(vars(config) | {"strategy": {"name": name} | SETTINGS.get(name, {})}))
            bench, strategy = workbench.build(cell), experiment.make_strategy(cell)
            state = experiment.initial_state(bench, strategy)
            arrays = messages.pack(state.adapters, state.dense)
            job = ConfigRecord({messages.EXPERIMENT: cell.to_json()})
            if cell.privacy.noise_multiplier is not None:
                job[messages.NOISE] = [cell.privacy.noise_multiplier] * cell.clients
            result = strategy.start(grid, arrays, cell.rounds, train_config=job, evaluate_config=ConfigRecord(dict(job)))
            final[name] = {key: array.data for key, array in result.arrays.items()}

    engine = engines.make(config, app)
    engine.run(drive)
    engine.close()
    return final


def in_pairs(config):
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, cohort="2"))


@pytest.fixture
def config(small):
    return small(
        adapter__dropout=0.1, adapter__train_head=True, evaluate__holdout=0.2, train__optimizer="adamw", train__lr=0.01
    )


def test_every_engine_gives_the_same_bits_for_every_strategy(config) -> None:
    inline, pairs = fit(config), fit(in_pairs(config))
    config.engine.name, config.engine.workers = "ray", 2
    ray = fit(config)
    assert fit(in_pairs(config)) == pairs
    config.engine.name = "flower"
    flower = fit(config)
    assert set(inline) == set(strategies.names())
    assert inline == ray == flower
    assert len({json.dumps({k: v.hex() for k, v in arrays.items()}) for arrays in inline.values()}) == len(inline)


def test_one_and_three_workers_give_the_bits_of_inline_with_cohorts_too(config) -> None:
    config.train.steps, config.train.epochs = None, 1  # so that clients have different work, and are grouped by it
    inline = {}
    for config.engine.cohort in ("1", "2"):
        inline[config.engine.cohort] = fit(config, chosen=["fedsvd"])
    assert inline["1"] != inline["2"]  # equal to rounding only: cohorts were at work
    config.engine.name = "ray"
    for config.engine.workers in (1, 3):
        for config.engine.cohort in ("1", "2"):
            assert fit(config, chosen=["fedsvd"]) == inline[config.engine.cohort]


def test_a_worker_that_dies_is_replaced_and_its_client_run_again(config, tmp_path, monkeypatch) -> None:
    config.clients_per_round = config.clients
    expected = fit(config, chosen=["fedsvd"])
    monkeypatch.setenv("FEDLORA_TEST_MARK", str(tmp_path / "mark"))
    config.engine.name, config.engine.workers = "ray", 2
    pool.shutdown()  # so that the workers see the variable
    assert fit(config, "tests.apps:dies_once", ["fedsvd"]) == expected
    assert (tmp_path / "mark").exists()


def test_a_client_whose_worker_always_dies_is_dropped_and_named(config) -> None:
    config.engine.name, config.engine.workers, config.engine.retries = "ray", 2, 1
    strategy = _one_round(config, "tests.apps:always_dies")
    assert strategy.report.drops == {1: "its worker died 2 times (out of memory?)"}


def test_a_cohort_whose_worker_dies_is_played_one_by_one_and_only_the_guilty_is_dropped(config, monkeypatch) -> None:
    config.engine.cohort = "3"
    monkeypatch.setattr(apps, "FAULTY", {1})
    inline = _one_round(config, "tests.apps:raises_together")
    config.engine.name, config.engine.workers, config.engine.retries = "ray", 2, 0
    strategy = _one_round(config, "tests.apps:always_dies")
    assert strategy.report.drops == {1: "its worker died 1 time (out of memory?)"}
    for name, pair in inline.state.adapters.items():
        assert np.array_equal(strategy.state.adapters[name].B, pair.B)


def test_a_client_that_hangs_is_dropped_at_the_deadline_and_its_worker_replaced(config) -> None:
    config.engine.name, config.engine.workers = "ray", 2
    strategy = _one_round(config, "tests.apps:hangs", timeout=15.0)
    assert strategy.report.drops == {1: "no reply in time"}
    assert pool._pool.size == 2


def test_the_content_of_a_round_is_stored_once(config, monkeypatch) -> None:
    import ray

    config.engine.name, config.engine.workers = "ray", 2
    engine = engines.make(config)
    warming = engine.starting.result().warming
    ray.wait(list(warming), num_returns=len(warming))  # until then the driver plays
    stored = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: stored.append(value) or put(value))
    engine.run(lambda grid: _start(config, grid, rounds=1))
    assert [bool(content.array_records) for content in stored] == [True, True]  # training, evaluation


def test_private_runs_have_the_same_bits_on_workers(config) -> None:
    config.privacy.name, config.privacy.noise_multiplier = "record", 0.7
    inline = fit(config, chosen=["fedsvd"])
    config.engine.name, config.engine.workers = "ray", 2
    assert fit(config, chosen=["fedsvd"]) == inline
    config.privacy.noise_multiplier = 0.8
    assert fit(config, chosen=["fedsvd"]) != inline


def test_gpu_shares_without_a_gpu_are_refused(config) -> None:
    config.engine.gpus_per_worker = 0.5
    with pytest.raises(ConfigError, match=r"engine.gpus_per_worker=0.5 needs a GPU.*set it to 0"):
        pool.resources(config)


def test_push_and_pull_give_each_reply_once(config) -> None:
    from flwr.app import Message, MessageType, RecordDict

    from fedlora.engines.inline import InlineGrid

    grid = InlineGrid(3, engines.CLIENT_APP)
    ids = list(grid.push_messages([Message(RecordDict(), node, MessageType.QUERY) for node in grid.get_node_ids()]))
    clients = [reply.content["metrics"]["client"] for reply in grid.pull_messages(ids)]
    assert clients == [0, 1, 2]
    assert list(grid.pull_messages(ids)) == []


def _one_round(config, app, timeout=3600.0):
    config.clients_per_round = config.clients
    strategy = None

    def drive(grid):
        nonlocal strategy
        strategy = _start(config, grid, rounds=1, timeout=timeout)

    engine = engines.make(config, app)
    if timeout < 3600:  # the deadline is for the clients; on a busy machine the workers alone take longer to come up
        import ray

        warming = engine.starting.result().warming
        ray.wait(list(warming), num_returns=len(warming))
    engine.run(drive)
    return strategy


def _start(config, grid, rounds, timeout=3600.0):
    bench, strategy = workbench.build(config), experiment.make_strategy(config)
    state = experiment.initial_state(bench, strategy)
    job = ConfigRecord({messages.EXPERIMENT: config.to_json()})
    arrays = messages.pack(state.adapters, state.dense)
    strategy.start(grid, arrays, rounds, timeout, train_config=job, evaluate_config=ConfigRecord(dict(job)))
    assert all(np.isfinite(pair.B).all() for pair in strategy.state.adapters.values())
    return strategy


def test_apps_are_found_by_workers() -> None:
    assert Path(os.getcwd(), "tests", "apps.py").exists()
    assert engines.load_app("tests.apps:nan") is not engines.load_app("tests.apps:raises")


def test_a_ray_that_does_not_start_is_one_sentence(monkeypatch) -> None:
    import ray

    def busy(*_, **__):
        raise Exception("The node timed out.\nMore.")

    monkeypatch.setattr(ray, "init", busy)
    told = r"^Ray did not start on this machine \(The node timed out\); try again, or choose engine=inline$"
    with pytest.raises(RunError, match=told):
        pool.start_own(2)
