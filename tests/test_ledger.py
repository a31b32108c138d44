"""The ledger never forgets a step: merging, round trips, writing ahead, damaged files, and the budget's edge."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.check import ConfigError, RunError
from fedlora.privacy import accounting
from fedlora.privacy.ledger import Ledger

DELTA = 1e-5
keys = st.tuples(st.floats(0, 1e6), st.floats(0, 1, exclude_min=True))
histories = st.dictionaries(st.integers(0, 10**6), st.dictionaries(keys, st.integers(1, 10**9)), max_size=5)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger({0: {(1.1, 0.2): 30}, 1: {(1.1, 0.2): 30}, 2: {(0.9, 0.05): 10, (1.3, 0.05): 20}})


# ---- spending


def test_equal_keys_are_counted_together() -> None:
    ledger = Ledger()
    for steps in (1, 2, 3):
        ledger.spend(7, 1.5, 0.1, steps)
    ledger.spend(7, 1.5, 0.2, 4)
    assert ledger.history(7) == {(1.5, 0.1): 6, (1.5, 0.2): 4}
    assert list(ledger) == [7]


def test_a_history_is_a_copy(ledger) -> None:
    ledger.history(0).clear()
    assert ledger.history(0) == {(1.1, 0.2): 30}


def test_nothing_is_kept_of_no_steps_or_infinite_noise() -> None:
    ledger = Ledger({0: {(1.0, 0.1): 0}, 1: {(math.inf, 0.1): 9}})
    assert list(ledger) == [] and ledger == Ledger()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-1.0, 0.1, 1), "privacy.noise_multiplier=-1.0"),
        ((math.nan, 0.1, 1), "privacy.noise_multiplier=nan"),
        ((1.0, 0.0, 1), "sampling rate=0.0"),
        ((1.0, 1.5, 1), "sampling rate=1.5"),
        ((1.0, 0.1, -1), "steps=-1"),
        ((1.0, 0.1, 2**53 + 1), "steps=9007199254740993"),
    ],
)
def test_what_no_mechanism_has_is_refused(arguments, named, ledger) -> None:
    before = ledger.to_json()
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        ledger.spend(0, *arguments)
    assert ledger.to_json() == before


def test_steps_are_whole() -> None:
    with pytest.raises(TypeError):
        Ledger().spend(0, 1.0, 0.1, 2.5)  # type: ignore[arg-type]


def test_merging_adds_up(ledger) -> None:
    other = Ledger({2: {(0.9, 0.05): 5}, 3: {(2.0, 1.0): 1}})
    ledger.merge(other)
    assert ledger.history(2) == {(0.9, 0.05): 15, (1.3, 0.05): 20} and ledger.history(3) == {(2.0, 1.0): 1}
    assert other.history(2) == {(0.9, 0.05): 5}


@given(histories, histories)
def test_merging_does_not_care_which_is_first(left, right) -> None:
    one, two = Ledger(left), Ledger(right)
    one.merge(Ledger(right))
    two.merge(Ledger(left))
    assert one == two


# ---- ε


def test_epsilon_is_that_of_the_history(ledger) -> None:
    assert ledger.epsilon(2, DELTA) == accounting.epsilon({(0.9, 0.05): 10, (1.3, 0.05): 20}, DELTA)
    assert ledger.epsilon(2, DELTA, "rdp") == accounting.epsilon(ledger.history(2), DELTA, "rdp")
    assert ledger.epsilon(99, DELTA) == 0.0
    ledger.spend(2, 0.0, 0.05, 1)
    assert ledger.epsilon(2, DELTA) == math.inf


def test_equal_histories_are_evaluated_once(ledger, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(accounting, "prv", lambda *a, prv=accounting.prv: calls.append(a) or prv(*a))
    accounting._epsilon.cache_clear()
    epsilons = ledger.epsilons(DELTA)
    assert len(calls) == 2 and list(epsilons) == [0, 1, 2] and epsilons[0] == epsilons[1] != epsilons[2]


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
def test_would_exceed_agrees_with_epsilon_and_counts_nothing(ledger, accountant) -> None:
    """At every distance from the budget, where a quick bound decides and where it does not."""
    before = ledger.to_json()
    answers = []
    for steps in (0, 5, 10, 20, 40, 80, 160):
        after = Ledger({0: ledger.history(0)})
        after.spend(0, 1.1, 0.2, steps)
        spent = after.epsilon(0, DELTA, accountant)
        for budget in (8.0, spent, spent - 1e-6, spent + 0.015, 1.05 * spent, 1.3 * spent):
            answers.append(ledger.would_exceed(0, 1.1, 0.2, steps, budget, DELTA, accountant))
            assert answers[-1] == (spent > budget)
    assert True in answers and False in answers
    assert ledger.to_json() == before


def test_a_step_without_noise_exceeds_every_budget_but_infinity(ledger) -> None:
    assert ledger.would_exceed(5, 0.0, 0.1, 1, 1e9, DELTA)
    assert not ledger.would_exceed(5, 0.0, 0.1, 1, math.inf, DELTA)
    assert not ledger.would_exceed(5, 0.0, 0.1, 0, 1.0, DELTA)


# ---- on disk


@settings(max_examples=200)
@given(histories)
def test_json_round_trip_is_exact(spent) -> None:
    ledger = Ledger(spent)
    again = Ledger.from_json(ledger.to_json())
    assert again == ledger and again.to_json() == ledger.to_json()
    assert {client: again.history(client) for client in again} == {client: h for client, h in spent.items() if h}


def test_save_and_load(ledger, tmp_path) -> None:
    path = tmp_path / "ledger.json"
    Ledger().save(path)
    assert Ledger.load(path) == Ledger()
    ledger.save(path)
    assert Ledger.load(path) == ledger and list(tmp_path.iterdir()) == [path]


def test_a_crash_while_writing_leaves_the_old_ledger(ledger, tmp_path, monkeypatch) -> None:
    """The new file is flushed to disk before it takes the place of the old one."""
    path, steps = tmp_path / "ledger.json", []
    ledger.save(path)
    monkeypatch.setattr(os, "fsync", lambda descriptor, fsync=os.fsync: steps.append("fsync") or fsync(descriptor))

    def crash(source, target) -> None:
        steps.append("replace")
        assert Ledger.load(source) == longer
        raise OSError(28, "No space left on device")

    longer = Ledger.from_json(ledger.to_json())
    longer.spend(0, 1.1, 0.2, 10)
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(RunError, match=r"ledger\.json \(No space left on device\); the run stops"):
        longer.save(path)
    assert steps == ["fsync", "replace"] and Ledger.load(path) == ledger


def test_a_folder_that_is_gone_stops_the_run(ledger, tmp_path) -> None:
    with pytest.raises(RunError, match="cannot write the privacy ledger"):
        ledger.save(tmp_path / "gone" / "ledger.json")


ROW = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 3}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"0": 5}',
        '{"0": [5]}',
        json.dumps({"x": [ROW]}),
        json.dumps({"0": [ROW | {"steps": 2.5}]}),
        json.dumps({"0": [ROW | {"steps": -1}]}),
        json.dumps({"0": [ROW | {"noise_multiplier": math.nan}]}),
        json.dumps({"0": [ROW | {"sampling_rate": 0}]}),
        json.dumps({"0": [{"steps": 3}]}),
        json.dumps({"0": [ROW | {"noise_multiplier": 10**400}]}),
        json.dumps({"0": [ROW | {"steps": 10**400}]}),
        "[" * 20_000,
    ],
)
def test_a_damaged_ledger_is_refused(content, tmp_path) -> None:
    """It would otherwise pass for a smaller one."""
    (tmp_path / "ledger.json").write_text(content)
    with pytest.raises(ConfigError, match="what was spent is unknown"):
        Ledger.load(tmp_path / "ledger.json")


def test_an_absent_ledger_is_not_an_empty_one(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory.*unknown"):
        Ledger.load(tmp_path / "ledger.json")
