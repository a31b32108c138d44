"""How many clients share a pass: what is measured, what is remembered, and who is grouped with whom."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from clients import cost
from clients.task import Task
from fedlora import cache
from fedlora.check import ConfigError
from fedlora.compute import workbench
from fedlora.config import TrainConfig


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own, not there yet."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- who goes with whom


def task(client: int, examples: int, **settings) -> Task:
    return Task(
        np.arange(examples),
        TrainConfig(**{"steps": None, "epochs": 1, "batch_size": 4} | settings),
        "B",
        (1, 1),
        (0, client, 1),
    )


def test_groups_by_hand() -> None:
    """Work = steps × batch. One epoch in batches of 4: 9 examples take 3 · 4, 2 take 1 · 2, 16 take 4 · 4, 8 take 2 · 4."""
    tasks = [task(k, examples) for k, examples in enumerate([9, 2, 16, 8, 2])]
    assert cost.group(tasks, 2) == [[2, 0], [3, 1], [4]]
    assert cost.group(tasks, 1) == [[2], [0], [3], [1], [4]]
    assert cost.group(tasks, 100) == [[2, 0, 3, 1, 4]]
    assert cost.group([task(0, 9), task(1, 11), task(2, 3, steps=10, epochs=None)], 1) == [[2], [0], [1]]  # 12, 12 and 30
    assert cost.group([task(k, 9, steps=2, epochs=None) for k in range(3)], 2) == [[0, 1], [2]]  # equals keep their order


# ---- how many


def test_the_size_is_measured_once_and_then_read(small, folder, monkeypatch) -> None:
    bench, calls = workbench.build(small()), []
    monkeypatch.setattr(cost, "measure", lambda bench, trains: calls.append(trains) or 8)
    assert [cost.cohort_size(bench, trains, 10**6) for trains in ("B", "B", "AB", "B")] == [8, 8, 8, 8]
    assert calls == ["B", "AB"]
    assert list(folder.iterdir()) == [folder / "cohort.json"]
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert [cost.cohort_size(bench, "B", clients) for clients in (1, 3, 7, 100)] == [1, 1, 3, 8]  # a cohort a core at least
    other = workbench.build(small(train__batch_size=3))
    cost.cohort_size(other, "B", 10**6)
    private = workbench.build(small(privacy__name="record", privacy__noise_multiplier=1.0))
    cost.cohort_size(private, "B", 10**6)
    assert calls == ["B", "AB", "B", "B"]  # each of them is another question


def test_a_measured_size_is_one_of_those_tried_and_leaves_training_alone(small, folder, monkeypatch) -> None:
    monkeypatch.setattr(cost, "PATIENCE", 0.0)
    bench = workbench.build(small())
    assert cost.cohort_size(bench, "B", 10**6) == 1  # no patience: the first one tried
    monkeypatch.setattr(cost, "PATIENCE", 5.0)
    monkeypatch.setattr(cost, "quickest", lambda run: (run(), clock.pop(0))[1])
    for seconds, best in (
        ([1.0, 1.0, 1.0, 1.95, 3.9], 4),
        ([1.0, 1.95, 3.9], 1),
        ([1.0, 1.8, 3.4, 6.7, 13.4], 4),
        ([1.0, 1.95, 1.0, 2.0, 4.0], 4),  # the second had a busy moment
        ([1.0] * 7, 64),
    ):
        clock = list(seconds)
        assert cost.measure(bench, "B") == best and not clock


def test_where_sharing_is_refused_the_size_is_one_and_nothing_is_measured(small, folder, monkeypatch) -> None:
    bench = workbench.build(small())
    monkeypatch.setattr(bench.rows, "refusal", "windows")
    monkeypatch.setattr(cost, "measure", lambda bench, trains: pytest.fail("measured"))
    assert cost.cohort_size(bench, "B", 10**6) == 1 and not folder.exists()


@pytest.mark.parametrize("value", ["0", "-1", "x", "2.5", "", "²", " 3"])
def test_impossible_cohorts_are_one_sentence(small, value) -> None:
    with pytest.raises(ConfigError, match=rf"engine.cohort={value} must be auto or a number of clients from 1 on"):
        small(engine__cohort=value)


# ---- what is remembered


def test_what_is_added_is_read_and_others_stay(folder) -> None:
    assert cache.read("sizes") == {}
    cache.add("sizes", {"a": 1.5})
    cache.add("sizes", {"b": 2.0, "a": 3.0})
    cache.add("other", {"c": 1.0})
    assert cache.read("sizes") == {"a": 3.0, "b": 2.0}
    assert sorted(path.name for path in folder.iterdir()) == ["other.json", "sizes.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_no_file_and_is_made_whole_again(folder, content) -> None:
    folder.mkdir()
    (folder / "sizes.json").write_bytes(content)
    assert cache.read("sizes") == {}
    cache.add("sizes", {"a": 1.0})
    assert cache.read("sizes") == {"a": 1.0}


def test_values_that_are_no_positive_numbers_are_left_out(folder) -> None:
    folder.mkdir()
    values = {"a": 0, "b": -1, "c": math.inf, "d": math.nan, "e": "1", "f": None, "g": [1], "h": True, "i": 2.0, "j": 3}
    (folder / "sizes.json").write_text(json.dumps(values))
    assert cache.read("sizes") == {"i": 2.0}


def test_a_folder_that_cannot_be_read_or_written_costs_nothing(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "file"))
    cache.add("sizes", {"a": 1.0})
    assert cache.read("sizes") == {}
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    (tmp_path / "sizes.json").mkdir()  # a folder where the file should be
    cache.add("sizes", {"a": 1.0})
    assert cache.read("sizes") == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "sizes.json"]  # nothing half-written is left
