"""What a process keeps: one base model and what belongs to it, shared by the cells that can share it."""

import gc
import weakref

import torch

from clients import cost
from fedlora.app import experiment, plan
from fedlora.compute import workbench


def test_cells_that_differ_in_training_share_the_model_its_examples_and_its_trial(small) -> None:
    one, other = workbench.build(small()), workbench.build(small(train__lr=0.1, strategy={"name": "fedavg"}))
    assert one is not other and one.config != other.config
    assert one.model is other.model and one.train is other.train and one.test is other.test and one.rows is other.rows


def test_another_model_takes_the_place_of_the_one_before(small) -> None:
    old = weakref.ref(workbench.build(small(seed=1)).model)
    assert workbench.build(small(seed=1)).rows.model is old() and len(workbench.build(small(seed=1)).train)
    workbench.build(small(seed=2))
    gc.collect()
    assert old() is None


def test_threads_are_those_of_whose_turn_it_is(small) -> None:
    before = torch.get_num_threads()
    for threads in (2, 1, 2, 1):
        workbench.build(small(threads=threads))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_the_plan_of_a_model_that_cannot_share_a_pass_measures_clients_one_by_one(small, monkeypatch) -> None:
    config = small(engine__cohort="4")
    bench, strategy = workbench.build(config), experiment.make_strategy(config)
    sizes, real = [], cost.seconds
    monkeypatch.setattr(cost, "seconds", lambda bench, trains, size: sizes.append(size) or real(bench, trains, size))
    monkeypatch.setattr(plan, "_measured", {})
    for refusal in ("", "windows"):
        monkeypatch.setattr(bench.rows, "refusal", refusal)
        assert plan.estimate(bench, strategy, experiment.initial_state(bench, strategy)).seconds > 0
    assert sizes == [4, 1]
