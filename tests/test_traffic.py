"""What the plan says that a run will send and measure is what it sends and measures, base corrections and tests included."""

import json

import numpy as np
import pytest

from clients import cost
from fedlora.app import experiment, plan, records, report, traffic
from fedlora.app.assembly import make_strategy
from fedlora.arrays.messages import Update
from fedlora.compute import workbench
from fedlora.server.metrics import client_metrics
from fedlora.tools import cli
from tests.conftest import ROOT


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": {"name": "flora"}, "clients_per_round": 2},  # grows by 16 a round up to 64, the layers' own size
        {"strategy": {"name": "flora"}, "adapter__ranks": [2, 4, 8, 8, 2, 4]},
        {"strategy": {"name": "fedex_lora"}, "clients_per_round": 2, "evaluate__holdout": 0.3, "evaluate__every": 3},
        {"strategy": {"name": "fedex_lora"}, "clients_per_round": 1, "min_success": 0.1},
        {"strategy": {"name": "fedex_lora"}, "compression__down": "int8"},
        {"strategy": {"name": "flora"}, "server__mean": "median"},
        {"strategy": {"name": "fedsvd"}, "evaluate__holdout": 0.3, "evaluate__every": 2},
        {"strategy": {"name": "rolora"}, "rounds": 4},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_the_bytes_of_the_plan_are_those_that_are_sent(small, settings) -> None:
    config = small(**{"rounds": 5, "train__steps": 1, "dataset__test_fraction": 0.9, "train__batch_size": 4} | settings)
    bench, strategy = workbench.build(config), make_strategy(config)
    told = traffic.of_run(config, strategy, experiment.initial_state(bench, strategy))
    rows = [json.loads(line) for line in lines_of(config)]
    assert (told.up, told.down) == tuple(sum(row[way] for row in rows[1:]) for way in ("bytes_up", "bytes_down"))
    if not config.evaluate.holdout:
        assert told.first * config.cohort_size == pytest.approx(rows[1]["bytes_down"], abs=0.5 * config.cohort_size * 300)
        assert told.tests == 0 and told.down_each == pytest.approx(told.down / told.trainings)


def lines_of(config) -> list[str]:
    experiment.run(config, 0.0)
    return (records.Recorder(config).folder / "rounds.jsonl").read_text().splitlines()


def test_the_list_tells_what_a_client_is_sent_over_the_run(capsys) -> None:
    assert cli.main(ROOT / "configs", ["--list", "rounds=4", "device=cpu"]) == 0
    printed = capsys.readouterr().out
    assert "on average over rounds=4 of 10 clients" in printed
    row = next(line for line in printed.splitlines() if line.startswith("flora"))
    full = 8 * 2 * (64 * 64 * 4 + 128)  # from round 2 on: two 64 × 64 factors of 8 layers
    assert f"{3 * full / 4 / 1000:.1f} kB" in row


# ---- the last round


@pytest.mark.parametrize("strategy", ["fedsa_lora", "fedavg"])
def test_clients_test_after_the_last_round_too_and_the_plan_counts_it(small, strategy) -> None:
    config = small(strategy={"name": strategy}, rounds=3, evaluate__every=2, evaluate__holdout=0.3)
    summary = experiment.run(config, 0.0)
    rows = report.read_rounds(records.Recorder(config).folder)
    assert [row["round"] for row in rows if "client_accuracy_mean" in row] == [2, 3]
    assert summary["client_accuracy"] == rows[3]["client_accuracy_mean"] is not None
    made = make_strategy(config)
    assert [round for round in range(1, 4) if made.evaluates(round)] == [2, 3]
    bench = workbench.build(config)
    held = sum(len(bench.examples_of(client)[1]) for client in range(6))
    estimate = plan.estimate(bench, made, experiment.initial_state(bench, made))
    example = estimate.evaluation / (3 * len(bench.dataset.test)) if strategy == "fedavg" else None
    assert (estimate.evaluation == 0) == (strategy == "fedsa_lora")  # whose server has no model to test
    if example:
        assert estimate.training == pytest.approx(estimate.steps * estimate.step + 2 * held * example)


def test_a_study_shorter_than_the_interval_of_evaluation_has_figures(small) -> None:
    config = small(strategy={"name": "fedsa_lora"}, rounds=2, evaluate__every=5, evaluate__holdout=0.3)
    assert experiment.run(config, 0.0)["client_accuracy"] is not None


def test_a_plan_without_a_test_set_is_one(small) -> None:
    config = small(dataset__test_fraction=0.0)
    assert experiment.foretell(config, show=False)[0].evaluation == 0


# ---- numbers


def test_steps_are_a_whole_number_where_they_are_one() -> None:
    def updates(*steps: float) -> list[Update]:
        return [
            Update(k, n, {}, {}, {"steps": each, "loss": 0.1}) for k, (n, each) in enumerate(zip((3, 5, 9), steps, strict=True))
        ]

    alike = client_metrics(updates(7.0, 7.0, 7.0))
    assert json.dumps(alike) == '{"client_steps": 7, "client_loss": 0.1}'
    assert client_metrics(updates(1.0, 2.0, 3.0))["client_steps"] == pytest.approx(40 / 17)


def test_what_a_federation_counts_before_its_first_round_draws_nothing(small, monkeypatch) -> None:
    """Of 10,000 clients to know which examples each holds back takes seconds; how many takes none."""
    config = small(clients=700, clients_per_round=10, partition__name="iid", partition__min_examples=1, evaluate__holdout=0.3)
    bench = workbench.build(config)
    assert bench.counts.tolist() == [len(bench.examples_of(client)[0]) for client in range(700)]
    drawn, real = [], workbench.Workbench.examples_of
    monkeypatch.setattr(workbench.Workbench, "examples_of", lambda self, client: drawn.append(client) or real(self, client))
    cost.seconds(bench, "B", 2)
    strategy = make_strategy(config)
    state = experiment.initial_state(bench, strategy)
    plan.derive(bench, strategy, state, None)
    plan.estimate(bench, strategy, state)
    assert len(drawn) <= 10 and drawn[0] == int(np.argsort(bench.counts, kind="stable")[350])
