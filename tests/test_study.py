"""The folder of a sweep: how it and its cells are called, what may be added to it, and that no other sweep writes over it."""

import csv
import json
from pathlib import Path

import pytest

from fedlora.app import cells, door, records, study
from fedlora.app.study import Study
from fedlora.check import ConfigError
from fedlora.config import Config, PrivacyConfig
from fedlora.tools import cli
from tests.conftest import ROOT

FAST = ["-m", "engine=inline", "clients=4", "rounds=1", "fraction=null", "train.steps=1", "device=cpu"]


def places(*settings: dict) -> list[str]:
    return [str(Path(cell.results) / str(cell.name)) for cell in Study.of([Config(**each) for each in settings]).cells]


def test_a_sweeps_folder_has_all_that_differs_and_its_cells_what_is_swept_first_and_whole() -> None:
    common = {"clients": 100, "rounds": 20, "min_success": 0.25, "strategy": {"name": "fedsvd", "every": 2}, "threads": 2}
    sweeps = [{"seed": seed, "privacy": PrivacyConfig("record", epsilon=epsilon)} for epsilon in (1.0, 3.5) for seed in (0, 1)]
    found = places(*(common | each for each in sweeps))
    folder = (
        "fedsvd,seed=0,1,privacy.epsilon=1,3.5,strategy.every=2,clients=100,rounds=20,min_success=0.25,threads=2,privacy=record"
    )
    assert {place.split("/")[1][:100] for place in found} == {folder[:100]}
    assert [place.split("/")[2][: len("fedsvd,seed=0,privacy.epsilon=3.5,")] for place in found[2:]] == [
        "fedsvd,seed=0,privacy.epsilon=3.5,", "fedsvd,seed=1,privacy.epsilon=3.5,",
    ]  # fmt: skip
    assert places({"seed": 1, "rounds": 5}, {"seed": 2, "rounds": 5}) != places({"seed": 1}, {"seed": 2})
    assert places({"seed": 1}, {"strategy": {"name": "fedavg"}})[1] == "results/strategy=fedsvd,fedavg,seed=1,0/fedavg,seed=0"
    long = [{"strategy": {"name": "fedsvd"}, "seed": seed, "deploy": "x" * 150 + str(seed)} for seed in (1, 2)]
    assert [f"seed={seed},deploy={'x' * 150}{seed}" in place for seed, place in zip((1, 2), places(*long), strict=True)] == [
        True
    ] * 2


def test_models_in_two_folders_of_one_name_have_cells_of_their_own() -> None:
    from fedlora.config import ModelConfig

    found = places(*({"model": ModelConfig("hf", f"/data/{owner}/bert-base")} for owner in "ab"))
    assert len(set(found)) == 2 and all("model.path=bert-base" in place and "data" not in place for place in found)


def table(folder: Path) -> dict[str, str]:
    """The runs of the table and how many seeds each has."""
    return {row["run"]: row["seeds"] for row in csv.DictReader((folder / "table.csv").open())}


def test_the_same_sweep_again_more_values_and_another_sweep(tmp_path, capsys, monkeypatch) -> None:
    def sweep(*more: str) -> int:
        return cli.main(ROOT / "configs", [*FAST, f"results={tmp_path}", "name=study", *more])

    folder, runs = tmp_path / "study", []
    run = cells._played
    monkeypatch.setattr(cells, "attempt", lambda cell, started: (runs.append(cell.name), run(records.Recorder(cell)))[1])
    assert sweep("seed=1,2") == 0
    assert table(folder) == {"fedsvd": "2"} and len(runs) == 2
    assert sweep("seed=1,2") == 0 and len(runs) == 2
    said = json.loads((folder / "sweep.json").read_text())
    assert said["swept"] == ["seed"] and said["settings"]["rounds"] == 1 and len(said["cells"]) == 2
    assert sweep("seed=3,4") == 0
    assert table(folder) == {"fedsvd": "4"} and len(runs) == 4  # the table has the earlier ones too
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    for other, words in (
        (["seed=1,2", "train.lr=0.1"], "it has train.lr=0.5, and you ask for train.lr=0.1"),
        (["seed=5,6", "strategy=fedavg"], "it has strategy.every=1, strategy=fedsvd, and you ask for"),
        (["strategy=fedavg,fedsvd", "seed=1"], "holds a sweep with other settings: it has strategy"),
    ):
        assert sweep(*other) == 2
        assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert cli.main(ROOT / "configs", [*FAST[1:], f"results={tmp_path}", "name=study", "seed=1"]) == 2
    assert "study holds a sweep and not a run; give the run another name" in capsys.readouterr().err
    assert sweep("strategy=fedavg,fedsvd", "seed=1", "overwrite=true") == 0
    assert table(folder) == {"fedavg": "1", "fedsvd": "1"}
    assert sweep("strategy=fedavg,fedsvd", "seed=1") == 0  # strategies whose settings differ are one sweep too
    monkeypatch.setattr("fedlora.identity.strategy_digest", lambda name: name)
    assert sweep("strategy=fedavg,ffa_lora", "seed=1") == 2
    assert "the strategy code has changed since" in capsys.readouterr().err


def test_a_sweep_is_not_put_into_a_run_nor_into_an_older_sweep(small, tmp_path) -> None:
    (tmp_path / "results" / "mine").mkdir(parents=True)
    two = [small(name="mine", seed=seed) for seed in (1, 2)]
    mine = Study.of(two)
    door.ready(mine.cells, mine)
    (mine.folder / "table.csv").touch()
    with pytest.raises(ConfigError, match="mine holds a sweep of an older version"):
        door.ready(mine.cells, mine)
    (mine.folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="mine holds a run and not a sweep"):
        door.ready(mine.cells, mine)
    assert sorted(path.name for path in mine.folder.iterdir()) == ["config.json", "table.csv"]


def test_a_sweep_file_that_is_damaged_is_one_sentence(small) -> None:
    mine = Study.of([small(name="mine", seed=seed) for seed in (1, 2)])
    mine.folder.mkdir(parents=True)
    for content in ("", "[]", "{", '{"settings": {}}', '{"settings": [], "swept": [], "cells": []}'):
        (mine.folder / "sweep.json").write_text(content)
        with pytest.raises(ConfigError, match=r"cannot read .*sweep.json"):
            door.ready(mine.cells, mine)


def test_cells_that_the_user_names_keep_their_places_and_have_a_table_of_their_own(tmp_path) -> None:
    arguments = [*FAST, f"results={tmp_path}", "name=one,two"]
    assert cli.main(ROOT / "configs", arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "one,two"}
    assert {path.name for path in (tmp_path / "one,two").iterdir()} == {"sweep.json", "table.csv"}
    assert study.Study.of([Config(name=name) for name in ("one", "two")]).named


def test_a_sweep_that_is_planned_leaves_nothing(tmp_path) -> None:
    assert cli.main(ROOT / "configs", [*FAST, f"results={tmp_path}/results", "seed=1,2", "plan=true"]) == 0
    assert not list(tmp_path.iterdir())
