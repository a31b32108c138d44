"""One experiment: what is written, what it adds up to, and that faulty clients cost themselves only."""

import contextlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.app import experiment, naming, records, report, sweep
from fedlora.app.study import Study
from fedlora.check import ConfigError, RunError
from fedlora.compute import workbench
from fedlora.compute.evaluate import evaluate, macro_f1
from fedlora.config import Config
from fedlora.validate import from_json


def rows_of(config) -> list[dict]:
    folder = records.Recorder(config).folder
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_round_0_is_the_pretrained_model_and_totals_add_up(small) -> None:
    config = small(rounds=3, evaluate__every=2)
    summary = experiment.run(config, 0.0)
    rows = rows_of(config)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert ["accuracy" in row for row in rows] == [True, False, True, True]  # every second round, and the last
    assert summary["accuracy_before"] == rows[0]["accuracy"] and summary["accuracy"] == rows[3]["accuracy"]
    assert summary["bytes_up"] == sum(row["bytes_up"] for row in rows[1:]) == 3 * 4 * 8 * (64 * 8 * 4 + 128)
    assert summary["bytes_down"] == summary["bytes_up"] + 3 * 4 * 8 * (8 * 8 * 4 + 128)  # A as its rotation
    assert all(len(row["cohort"]) == 4 and row["drops"] == {} for row in rows[1:])
    assert summary["status"] == "finished"


@pytest.mark.parametrize("settings", [{}, {"adapter__train_head": True}, {"strategy": {"name": "fedavg", "init": "pissa"}}])
def test_the_saved_adapter_is_pefts_and_gives_the_final_accuracy_to_the_digit(small, settings) -> None:
    import peft
    import transformers

    from fedlora.models.vit_digits import FOLDER

    config = small(**settings)
    summary = experiment.run(config, 0.0)
    base = transformers.ViTForImageClassification.from_pretrained(FOLDER)
    model = peft.PeftModel.from_pretrained(base, records.Recorder(config).folder / "adapter").eval()
    bench = workbench.build(config)
    batch = bench.test.batch(np.arange(len(bench.test)), torch.device("cpu"))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    assert float((logits.argmax(1) == labels).double().mean()) == summary["accuracy"]
    assert float(torch.nn.functional.cross_entropy(logits.double(), labels)) == pytest.approx(summary["loss"], rel=1e-6)


def test_the_same_settings_give_the_same_numbers_and_another_seed_gives_others(small) -> None:
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = small(name=name, seed=seed, adapter__dropout=0.2)
        experiment.run(config, 0.0)
        results.append([(row.get("loss"), row.get("client_loss")) for row in rows_of(config)])
    assert results[0] == results[1]
    assert results[0][1:] != results[2][1:]


def test_strategy_and_rounds_leave_the_split_and_the_cohorts_alone(small) -> None:
    short, long = small(rounds=2), small(rounds=3, strategy={"name": "fedavg"})
    experiment.run(short, 0.0)
    experiment.run(long, 0.0)
    assert [row.get("cohort") for row in rows_of(short)] == [row.get("cohort") for row in rows_of(long)][:3]
    first, second = workbench.build(short).shards, workbench.build(long).shards
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        ("raises", "ValueError: the camera is broken"),
        ("nan", "NaN or infinite"),
        ("another_shape", "has shape (1, 8) instead of (64, 8)"),
        ("raises_together", "ValueError: the camera is broken"),  # found out one by one
        ("nan_together", "NaN or infinite"),
    ],
)
def test_faulty_clients_are_dropped_named_and_counted_and_the_run_goes_on(small, capsys, app, reason) -> None:
    config = small(name=app, clients_per_round=6, engine__cohort="3" if app.endswith("together") else "1")
    summary = experiment.run(config, 0.0, f"tests.apps:{app}")
    assert summary["status"] == "finished" and summary["drops"] == 4  # two clients in each of two rounds
    for row in rows_of(config)[1:]:
        assert set(row["drops"]) == {"1", "2"} and all(reason in why for why in row["drops"].values())
    assert capsys.readouterr().out.count("dropped in round") == 4


def test_too_many_faulty_clients_end_the_run_with_an_error(small) -> None:
    config = small(clients_per_round=6, min_success=0.8)
    with pytest.raises(RunError, match=r"round 1: 4 of 6 .* min_success=0.8 asks for 5 \(client 1: ValueError: the camera"):
        experiment.run(config, 0.0, "tests.apps:raises")
    summary = json.loads((records.Recorder(config).folder / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["rounds"] == 0


def test_holdout_gives_the_spread_over_clients_and_keeps_those_examples_out_of_training(small) -> None:
    config = small(evaluate__holdout=0.25)
    experiment.run(config, 0.0)
    row = rows_of(config)[-1]
    assert row["clients_evaluated"] == 6 and 0 <= row["client_accuracy_worst_decile"] <= row["client_accuracy_mean"] <= 1
    bench = workbench.build(config)
    accuracies = []
    for client in range(6):
        train, held = bench.examples_of(client)
        assert not set(train) & set(held) and len(train) + len(held) == len(bench.shards[client])
        accuracies.append(evaluate(bench.model, bench.train, held, 64)["accuracy"])  # the model still is the merged one
    assert row["client_accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert row["client_accuracy_std"] == pytest.approx(np.std(accuracies))


def test_names_say_what_differs_and_only_what_can_change_a_number() -> None:
    usual = Config()
    assert naming.run_name(usual) == "fedsvd"
    usual.engine.name, usual.results, usual.overwrite = "inline", "elsewhere", True
    assert naming.run_name(usual) == "fedsvd"
    other = Config(strategy={"name": "fedsvd", "every": 2}, rounds=5)
    assert naming.run_name(other) == "fedsvd,strategy.every=2,rounds=5"
    other.dataset.path = "/a/very/long/path" * 20
    assert len(naming.run_name(other)) < 120 and "/" not in naming.run_name(other)


def test_a_configuration_survives_json_and_a_foreign_key_does_not() -> None:
    config = Config(clients=7, strategy={"name": "fedsvd", "every": 3})
    assert from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match=r"train.stepz is not a setting; did you mean steps\?"):
        from_json(config.to_json().replace('"steps"', '"stepz"'))


def test_a_sweep_is_placed_in_one_folder_and_says_what_its_seeds_say() -> None:
    cells = [Config(seed=seed, rounds=rounds) for rounds in (3, 5) for seed in (0, 1, 2)]
    placed = Study.of(cells).cells
    assert {cell.results for cell in placed} == {"results/fedsvd,seed=0,1,2,rounds=3,5"}
    assert [cell.name for cell in placed] == [f"fedsvd,seed={seed},rounds={rounds}" for rounds in (3, 5) for seed in (0, 1, 2)]
    usual = {"status": "finished", "loss": 1.0, "bytes_up": 5, "bytes_down": 6, "seconds": 1.0}
    summaries = [usual | {"accuracy": value} for value in (0.5, 0.6, 0.7, 0.9, 0.9)] + [{"status": "failed"}]
    first, second = sweep.over_seeds(list(zip(placed, summaries, strict=True)))
    assert (first["run"], first["seeds"], first["failed"]) == ("fedsvd,rounds=3", 3, 0)
    assert first["accuracy"] == pytest.approx(0.6) and first["accuracy_ci95"] == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert (second["seeds"], second["failed"], second["accuracy"], second["accuracy_ci95"]) == (2, 1, 0.9, 0.0)
    assert sweep.interval([0.3]) == (0.3, None)


@pytest.mark.parametrize("classes", [2, 10])
def test_macro_f1_is_scikit_learns(classes) -> None:
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(classes)
    for size in (1, 5, 200):
        labels, guesses = rng.integers(0, classes, (2, size))
        assert macro_f1(labels, guesses) == pytest.approx(f1_score(labels, guesses, average="macro"), abs=1e-12)
    assert macro_f1(np.array([0, 0]), np.array([1, 1])) == 0.0


def test_the_frontier_has_a_curve_for_each_strategy_with_its_budgets_rising(tmp_path) -> None:
    def cell(strategy, epsilon, seed, accuracy):
        config = Config(seed=seed, strategy={"name": strategy})
        config.privacy.name, config.privacy.epsilon = "record", epsilon
        summary = {"status": "finished", "accuracy": accuracy, "loss": 1.0, "bytes_up": 1, "bytes_down": 1, "seconds": 1.0}
        return config, summary

    cells = [cell("fedsvd", e, s, 0.5 + 0.01 * s) for e in (float("inf"), 1.0, 3.0) for s in (0, 1)]
    cells += [cell("fedavg", 1.0, 0, 0.4), (cell("fedavg", 3.0, 0, 0.4)[0], {"status": "failed"})]
    curves = sweep.frontier(cells)
    assert {name: [row["epsilon"] for row in curve] for name, curve in curves.items()} == {
        "fedsvd": [1.0, 3.0, float("inf")],
        "fedavg": [1.0],
    }
    assert curves["fedsvd"][0]["accuracy"] == pytest.approx(0.505)
    report.draw_frontier(tmp_path / "frontier.png", curves)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert sweep.frontier(cells[:1]) == {}


def test_a_ctrl_c_that_a_callback_swallows_still_stops_the_run(small, monkeypatch) -> None:
    def swallowed(*_: object) -> dict[str, float]:
        with contextlib.suppress(KeyboardInterrupt):  # as Python does in a finaliser
            os.kill(os.getpid(), signal.SIGINT)
        return {"accuracy": 0.5, "loss": 1.0, "macro_f1": 0.5}

    before = signal.getsignal(signal.SIGINT)
    config = small(rounds=50)
    monkeypatch.setattr(experiment, "measure", swallowed)
    summary = experiment.run(config, 0.0)
    assert (summary["status"], summary["rounds"]) == ("interrupted", 0) and len(rows_of(config)) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_as_a_finished_run_is_saved_leaves_what_there_is_and_the_same_command_goes_on(small, monkeypatch) -> None:
    config, folder = small(name="mine"), Path(small().results) / "mine"
    with monkeypatch.context() as patched:
        patched.setattr(report, "draw_curves", lambda *_: signal.raise_signal(signal.SIGINT))
        summary = experiment.run(config, 0.0)
    assert (summary["status"], summary["rounds"]) == ("interrupted", 2) and not (folder / "curves.png").exists()
    assert sorted(path.name for path in folder.glob(".*")) == [".lock"]
    there = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert experiment.run(config, 0.0)["status"] == "finished" and (folder / "curves.png").exists()
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == there
