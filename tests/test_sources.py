"""What a run is besides its settings: its data, its base model and its strategy's code, and that nothing else passes for it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from fedlora import identity, models
from fedlora.app import cells, experiment, naming, records
from fedlora.check import ConfigError
from fedlora.compute import workbench
from fedlora.config import Config, DatasetConfig
from fedlora.data import Dataset, Examples, resident
from fedlora.engines import pool
from fedlora.tools import cli
from tests.conftest import ROOT, write_digits
from tests.test_checkpoint import broken_off, outcome, quick  # noqa: F401  # a fixture

FAST = ["engine=inline", "clients=4", "rounds=2", "fraction=null", "train.steps=1", "device=cpu", "partition=iid"]


@pytest.fixture
def digits(quick, tmp_path):  # noqa: F811
    """A maker of small experiments on files, and the training file."""
    write_digits(tmp_path / "data", 2, each=64)
    train, test = tmp_path / "data" / "all.jsonl", tmp_path / "data" / "test.jsonl"
    usual = {"name": "files", "path": str(train), "test": str(test), "image": "image"}
    settings = {f"dataset__{name}": value for name, value in usual.items()}
    return lambda **own: quick(**settings | {"partition__name": "iid", "name": "mine"} | own), train


def edit(file: Path) -> None:
    """Another label for every example."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"label": str((int(row["label"]) + 1) % 10)}) + "\n" for row in rows))


# ---- what a run is


def test_data_that_were_edited_between_a_kill_and_the_same_command_are_refused(digits, monkeypatch) -> None:
    make, train = digits
    whole = experiment.run(make(name="whole"), 0.0)
    where, before = broken_off(make(), monkeypatch, 1), train.read_bytes()
    kept = sorted((path, path.stat().st_mtime_ns) for path in where.rglob("*"))
    edit(train)
    sentence = "holds a run with these settings, but the data has changed since; give the new run another name by name=…"
    with pytest.raises(ConfigError, match=sentence):
        experiment.run(make(), 0.0)
    (where / "config.json").unlink()  # the checkpoint knows by itself
    with pytest.raises(ConfigError, match=sentence):
        experiment.run(make(), 0.0)
    train.write_bytes(before)
    assert sorted(path for path in where.rglob("*")) == sorted(path for path, _ in kept if path.name != "config.json")
    experiment.run(make(), 0.0)
    assert outcome(where) == outcome(where.with_name("whole"))
    edit(train)
    with pytest.raises(ConfigError, match=sentence):
        experiment.run(make(), 0.0)  # it has finished, on other data
    other = experiment.run(make(overwrite=True), 0.0)
    assert other["status"] == "finished" and outcome(where) != outcome(where.with_name("whole")) and whole["rounds"] == 3


def test_a_worker_that_stays_for_another_run_reads_edited_data_anew(digits, monkeypatch) -> None:
    make, train = digits
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "this"))
    worker = pool.Worker("clients.app:app", SimpleNamespace(settle=lambda: "processor"))
    worker.warm(make(name="first").to_json())
    before = workbench.build(make(name="first")).dataset.train.labels
    edit(train)
    worker.warm(make(name="second").to_json())
    bench = workbench.build(make(name="second"))
    assert np.array_equal(bench.dataset.train.labels, (before + 1) % 10)
    assert np.array_equal(bench.train.labels.numpy(), bench.dataset.train.labels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["fedlora.models.digest"], "but the base model has changed since"),
        (["fedlora.identity.strategy_digest"], "but the strategy code has changed since"),
        (["fedlora.models.digest", "fedlora.identity.strategy_digest"], "the base model and the strategy code have changed"),
    ],
)
def test_another_base_model_or_other_code_is_refused_for_a_run_that_has_finished(quick, monkeypatch, changes, words) -> None:  # noqa: F811
    experiment.run(quick(name="mine"), 0.0)
    for name in changes:
        monkeypatch.setattr(name, lambda what: "another")
    with pytest.raises(ConfigError, match=words):
        records.Recorder(quick(name="mine"))
    with pytest.raises(ConfigError, match="it has seed=0, and you ask for seed=1"):
        records.Recorder(quick(name="mine", seed=1))  # what is said first is what the user chose
    assert not records.Recorder(quick(name="mine", overwrite=True)).finished


def test_a_folder_of_before_there_were_digests_is_refused_and_not_misread(quick) -> None:  # noqa: F811
    experiment.run(quick(name="mine"), 0.0)
    path = records.Recorder(quick(name="mine")).folder / "config.json"
    known = json.loads(path.read_text())
    for digests in ({}, {"digests": []}, {"digests": {"data": known["digests"]["data"]}}):
        path.write_text(json.dumps({name: value for name, value in known.items() if name != "digests"} | digests))
        with pytest.raises(ConfigError, match="did not note its data, base model and strategy code"):
            records.Recorder(quick(name="mine"))


def test_config_json_has_every_setting_the_strategys_too_and_the_digests(quick, tmp_path) -> None:  # noqa: F811
    config = quick(name="mine", rounds=1)
    experiment.run(config, 0.0)
    kept = json.loads((tmp_path / "results" / "mine" / "config.json").read_text())
    assert kept.pop("digests") == {
        "data": workbench.build(config).dataset.digest,
        "base model": models.digest(config.model),
        "strategy code": identity.strategy_digest("fedsvd"),
    }
    assert kept == dataclasses.asdict(config) | {"strategy": {"name": "fedsvd", "init": "kaiming", "every": 1}}
    assert identity.digest(records.settings_of(kept)) == identity.digest(config)


def test_whoever_launches_a_run_on_devices_needs_no_data_and_no_model(small) -> None:
    config = small(deploy="yes", dataset__name="files", dataset__image="image", dataset__classes=["a", "b"],
                   dataset__test="nowhere.jsonl", partition__name="own", model__path="nowhere")  # fmt: skip
    assert set(records.Recorder(config, launched=True).digests) == {"strategy code"}
    with pytest.raises(ConfigError, match=r"nowhere.jsonl does not exist"):
        records.Recorder(config).digests  # noqa: B018  # a property
    server = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, test=None))
    assert set(records.Recorder(server).digests) == {"data", "base model", "strategy code"}


def test_the_code_of_a_strategy_is_its_file_and_those_that_it_is_built_from(monkeypatch) -> None:
    read = Path.read_bytes

    def digest(name: str, edited: str = "") -> str:
        monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + (b"# more" if self.name == edited else b""))
        return identity.strategy_digest.__wrapped__(name)

    assert digest("fedsvd") == digest("fedsvd", "fedavg.py") == digest("fedsvd", "robust.py")
    assert (
        len({digest("fedsvd"), digest("fedavg"), *(digest("fedsvd", f"{name}.py") for name in ("fedsvd", "base", "wire"))}) == 5
    )


def test_every_part_of_the_examples_counts_and_nothing_of_how_they_are_kept() -> None:
    def made(inputs=("ab", "c"), labels=(0, 1), classes=("x", "y"), groups=("g", "h"), test=("t",), kind="text") -> str:
        train = Examples(list(inputs), np.array(labels), None if groups is None else np.array(groups))
        return Dataset(kind, list(classes), train, Examples(list(test), np.zeros(len(test), np.int64))).digest

    others = [
        made(inputs=("a", "bc")), made(inputs=("c", "ab")), made(labels=(1, 0)), made(classes=("y", "x")), made(groups=None),
        made(groups=("h", "g")), made(test=("u",)), made(inputs=("ab",), labels=(0,), groups=("g",)), made(test=()),
        made(kind="image"), made(inputs=("ab", "\ud800")),
    ]  # fmt: skip
    assert len({made(), *others}) == 1 + len(others) and made() == made(inputs=["ab", "c"])
    pixels = np.zeros((2, 3, 3, 1), np.float32)

    def image(inputs) -> str:
        return Dataset("image", ["x"], Examples(inputs, np.zeros(2, np.int64)), Examples([], np.zeros(0, np.int64))).digest

    assert image(pixels) != image(pixels + 1) and image(pixels) != image(pixels.reshape(2, 9, 1, 1))
    assert image([np.zeros((3, 3, 1), np.float32)] * 2) != image([np.zeros((9, 1, 1), np.float32)] * 2)


def test_a_run_that_begins_reads_files_again_that_have_changed_and_one_that_goes_on_does_not(digits) -> None:
    make, train = digits
    config = make()
    bench = workbench.refreshed(config)
    assert workbench.refreshed(config) is bench
    before = resident.digest(config.dataset, 0)
    edit(train)
    assert workbench.build(config) is bench  # whatever is in the middle of something
    again = workbench.refreshed(config)
    assert again.dataset.digest == resident.digest(config.dataset, 0) != before == bench.dataset.digest
    assert (again.dataset.train.labels != bench.dataset.train.labels).all()
    assert again.train.labels.tolist() == again.dataset.train.labels.tolist()


def test_that_a_run_has_finished_is_said_without_a_model_library(tmp_path) -> None:
    arguments = [*FAST, f"results={tmp_path}", "name=mine", "rounds=1"]
    assert cli.main(ROOT / "configs", arguments) == 0
    code = (
        "import sys; from pathlib import Path; from fedlora.tools.cli import main; "
        f"status = main(Path('configs'), {arguments!r}); "
        "print(status, [m for m in ('torch', 'transformers', 'ray', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "is finished, with these settings" in done.stdout and done.stdout.splitlines()[-1] == "0 []", done.stderr


# ---- what is refused, and what it leaves


@pytest.mark.parametrize("engine", ["ray", "inline", "flower"])
def test_a_missing_file_is_said_before_anything_heavy_is_loaded(tmp_path, engine) -> None:
    for missing, words in (
        (
            ["dataset=files", "dataset.path=none.csv", "dataset.text=text", "model=hf", "model.path=none"],
            "dataset.path=none.csv",
        ),
        (["model=hf", "model.path=/no/model"], "model.path=/no/model"),
    ):
        arguments = [f"engine={engine}", *missing, f"results={tmp_path}/results"]
        code = (
            "import sys; from pathlib import Path; from fedlora.tools.cli import main; "
            f"status = main(Path('configs'), {arguments!r}); "
            "print(status, [m for m in ('torch', 'transformers', 'ray', 'matplotlib') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout == "2 []\n" and done.stderr.startswith("error: ") and words in done.stderr
        assert not list(tmp_path.iterdir())


def test_what_is_wrong_in_the_last_cell_is_said_before_the_first_begins(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(experiment, "run", lambda *_: pytest.fail("a cell began"))
    (tmp_path / "good.csv").write_text("text,label\n" + "a good film,yes\na bad film,no\n" * 40)
    (tmp_path / "other.csv").write_text("words,label\n" + "a good film,yes\na bad film,no\n" * 40)
    files = ["model=hf", f"model.path={ROOT / 'fedlora' / 'models' / 'vit_digits'}", "dataset=files", "dataset.text=text"]
    usual = ["-m", *FAST, f"results={tmp_path}/results"]
    for wrong, words in (
        ([*files, f"dataset.path={tmp_path}/good.csv,{tmp_path}/gone.csv"], "gone.csv does not exist"),
        ([*files, f"dataset.path={tmp_path}/good.csv,{tmp_path}/other.csv"], "dataset.text=text is not a column"),
        (["model=hf", f"model.path={files[1].partition('=')[2]},{tmp_path}"], f"model.path={tmp_path}"),
        (["clients=4,2000"], "clients=2000 is more than the 1438 examples"),
        (["partition=iid,natural"], "partition=natural needs natural client ids"),
    ):
        assert cli.main(ROOT / "configs", [*usual, *wrong]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and words in printed.err and printed.err.count("\n") == 1, printed.err
        assert not (tmp_path / "results").exists()


def test_a_command_that_is_refused_leaves_no_folder(small, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"adapter.target_modules=nothing"):
        experiment.run(small(adapter__target_modules=["nothing"], results=str(tmp_path / "a" / "b")), 0.0)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with records.Recorder(small(results=str(tmp_path / "a" / "b"))).claim():
        assert (tmp_path / "a" / "b" / "fedsvd,clients=6,rounds=2,clients_per_round=4,device=cpu,train.steps=2").is_dir()
    assert list((tmp_path / "a").iterdir()) == []
    config = small(name="kept")
    with records.Recorder(config).claim():
        (tmp_path / "results" / "kept" / "note").touch()
    assert (tmp_path / "results" / "kept" / "note").exists()


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "../../x", "a/../b", "/tmp/x", "a//b", "a/", "./a", " a"])
def test_a_name_that_leads_out_of_results_is_refused(capsys, name) -> None:
    assert cli.main(ROOT / "configs", [f"name='{name}'", "engine=inline"]) == 2
    assert f"name={name!r} names no folder in results" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="names no folder in results"):
        naming.check_name(name)
    for good in ("first", "study/first", "a b", "ü", "...", "a=1,b=2"):
        assert naming.check_name(good) == good


def test_names_are_short_for_paths_and_different_for_different_runs() -> None:
    def name(path: str) -> str:
        return naming.run_name(Config(dataset=DatasetConfig("files", path=path, text="text")))

    long = name("/home/somebody/data/reviews.csv")
    assert long.startswith("fedsvd,dataset=files,dataset.path=reviews.csv,dataset.text=text-")
    assert name("reviews.csv") == "fedsvd,dataset=files,dataset.path=reviews.csv,dataset.text=text"
    paths = [
        "reviews.csv",
        "a/reviews.csv",
        "b/reviews.csv",
        "a b.csv",
        "a_b.csv",
        "ä.csv",
        "評論" * 40,
        "評論" * 41,
        "reviews.csv/",
    ]
    assert len({name(path) for path in paths}) == len(paths)
    assert all(len(name(path).encode()) < 255 and "/" not in name(path) for path in paths)
    assert naming.run_name(Config(rounds=5), ["seed", "rounds"]) == "fedsvd,seed=0,rounds=5"


def test_a_cell_of_a_sweep_is_a_run_that_stands_there(small) -> None:
    config = small(name="alone", rounds=1)
    assert [summary["status"] for _, summary in cells.run([config])] == ["finished"]
    assert [summary["status"] for _, summary in cells.run([config])] == ["finished"]
