"""Record-level privacy of whole runs: what is derived, what is spent, who stops, and that it is written down first."""

import json

import numpy as np
import pytest

from fedlora.app import experiment, records
from fedlora.check import ConfigError, RunError
from fedlora.config import Config, PrivacyConfig
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.record_level import Client, Guard, noise_multipliers
from fedlora.server.participation import draw_cohort, schedule
from tests.test_experiment import rows_of

CLIENTS = [Client(0.25, 10, rounds) for rounds in (1, 4, 9, 0)]


def private(small, **settings) -> Config:
    return small(**{"privacy__name": "record", "privacy__delta": 1e-4, "train__lr": 0.1} | settings)


def test_the_schedule_is_what_the_rounds_really_draw() -> None:
    counted = schedule(seed=3, rounds=7, clients=9, size=4)
    drawn = [client for round in range(1, 8) for client in draw_cohort(3, round, list(range(9)), 4)]
    assert sum(counted.values()) == 28 and all(counted[client] == drawn.count(client) for client in range(9))
    assert schedule(3, 6, 9, 4) + schedule(3, 7, 9, 4) - schedule(3, 6, 9, 4) == counted  # a longer run begins the same


def test_by_the_schedule_every_client_spends_its_budget_and_no_more() -> None:
    sigmas = noise_multipliers(PrivacyConfig("record", epsilon=3.0), CLIENTS, rounds=10, fraction=0.35)
    for client, sigma in zip(CLIENTS, sigmas, strict=True):
        spent = epsilon({(sigma, client.rate): client.steps * max(1, client.rounds)}, 1e-5)
        assert 2.98 <= spent <= 3.0
    assert sigmas[0] < sigmas[1] < sigmas[2] and sigmas[3] == sigmas[0]


def test_worst_covers_every_round_and_expected_is_no_guarantee() -> None:
    worst = noise_multipliers(PrivacyConfig("record", epsilon=3.0, participation="worst"), CLIENTS, 10, 0.35)
    assert len(set(worst)) == 1 and 2.98 <= epsilon({(worst[0], 0.25): 100}, 1e-5) <= 3.0
    expected = noise_multipliers(PrivacyConfig("record", epsilon=3.0, participation="expected"), CLIENTS, 10, 0.35)
    assert epsilon({(expected[2], 0.25): 90}, 1e-5) > 4.0  # drawn in 9 rounds where 4 were expected


def test_infinite_budget_is_no_noise_and_a_given_sigma_is_taken_as_it_is() -> None:
    assert noise_multipliers(PrivacyConfig("record", epsilon=float("inf")), CLIENTS, 10, 0.35) == [0.0] * 4
    assert noise_multipliers(PrivacyConfig("record", noise_multiplier=1.5), CLIENTS, 10, 0.35) == [1.5] * 4


def test_a_client_stops_before_it_would_exceed_its_budget() -> None:
    saved = []
    config = PrivacyConfig("record", epsilon=4.0, noise_multiplier=1.5)
    guard = Guard(config, CLIENTS, 10, 0.35, lambda ledger: saved.append(ledger.to_json()))
    times = 0
    with pytest.raises(
        RunError, match=r"take part any more; client 0 has spent ε = 3\.\d+, and 10 more steps .*; raise privacy"
    ):
        for round in range(1, 9):
            assert guard.admit(round, [0, 1]) == [0, 1]
            times += 1
    assert 1 <= times < 8 and guard.stopped == set(guard.stops) == {0, 1}
    with pytest.raises(RunError, match=r"round 9: no drawn client may take part any more; raise"):
        guard.admit(9, [0, 1])
    assert guard.stops == {}  # each is told of once
    assert guard.ledger.epsilon(0, 1e-5) <= 4.0 < epsilon({(1.5, 0.25): 10 * (times + 1)}, 1e-5)
    assert len(saved) == times + 2 and Ledger.from_json(saved[-1]) == guard.ledger
    assert guard.spent()["clients_stopped"] == 2 and guard.spent()["epsilon_lower_quartile"] == 0.0


def test_a_round_that_is_taken_again_with_other_noise_goes_off_those_to_come() -> None:
    """Devices: the file has round 2, of which the checkpoint after round 1 knows nothing."""
    config = PrivacyConfig("record", epsilon=3.0)

    def begun(before: Ledger | None = None, **changes) -> Guard:
        settings = PrivacyConfig(**vars(config) | changes)
        return Guard(settings, [Client(0.25, 10, 4), Client(0.25, 10, 5)], 5, 1.0, lambda ledger: None, before)

    guard = begun()
    guard.admit(1, [0, 1])
    memory = guard.memory()
    even = begun(Ledger.from_json(memory["ledger"]))  # broken off right after the checkpoint: nothing is twice
    even.go_on(memory)
    for round, cohort in enumerate([[0, 1], [0, 1], [0, 1], [1]], start=2):
        assert even.admit(round, cohort) == cohort
    assert not even.stopped and 2.98 <= even.spent()["epsilon_max"] <= 3.0
    guard.admit(2, [0])
    again = begun(guard.ledger)
    again.go_on(memory)
    assert again.spent()["epsilon_max"] == guard.spent()["epsilon_max"] > begun(even.before).spent()["epsilon_max"]
    for round in (2, 3):
        assert again.admit(round, [0, 1]) == [0, 1]
    assert sum(again.ledger.history(0).values()) == 40 and sum(again.ledger.history(1).values()) == 30
    assert again.admit(4, [0, 1]) == [1] and list(again.stops) == [0]
    careless = begun(guard.ledger, participation="expected")  # which is no guarantee, and stops nobody
    careless.go_on(memory)
    assert [careless.admit(round, [0, 1]) for round in range(2, 9)] == [[0, 1]] * 7


def test_what_is_reported_is_what_the_ledger_says_and_only_what_has_changed_is_computed(monkeypatch) -> None:
    guard = Guard(PrivacyConfig("record", noise_multiplier=1.5), CLIENTS, 10, 0.35, lambda ledger: None)
    assert guard.spent()["epsilon_max"] == 0.0
    asked = []
    monkeypatch.setattr(Ledger, "epsilon", lambda self, c, *a, real=Ledger.epsilon: asked.append(c) or real(self, c, *a))
    for round, cohort in enumerate(([0, 2], [2, 3], [1], [2]), 1):
        guard.admit(round, cohort)
        asked.clear()
        spent = guard.spent()
        assert sorted(asked) == cohort
        epsilons = sorted(epsilon(guard.ledger.history(client), 1e-5) for client in range(4))
        names = ("epsilon_lower_quartile", "epsilon_median", "epsilon_upper_quartile", "epsilon_max")
        assert [spent[name] for name in names] == epsilons


def test_what_is_derived_is_said_in_one_line() -> None:
    guard = Guard(PrivacyConfig("record", epsilon=3.0), CLIENTS, 10, 0.35, lambda ledger: None)
    name, value, reason = guard.derivation()
    assert name == "σ" and value.count(" to ") == 1
    assert reason == "ε = 3, δ = 1e-05, add_remove, q = 0.25, 10 to 90 steps by the schedule, PRV"
    expected = PrivacyConfig("record", epsilon=3.0, participation="expected")
    assert "NOT A GUARANTEE" in Guard(expected, CLIENTS, 10, 0.35, lambda ledger: None).derivation()[2]


@pytest.mark.parametrize("strategy", ["fedavg", "fedsvd"])
def test_a_private_run_spends_its_budget_and_keeps_its_books(small, strategy) -> None:
    config = private(small, privacy__epsilon=4.0, strategy={"name": strategy}, rounds=3, adapter__train_head=True)
    experiment.run(config, 0.0)
    folder = records.Recorder(config).folder
    ledger = Ledger.from_json((folder / "privacy.json").read_text())
    drawn = schedule(config.seed, 3, config.clients, config.cohort_size)
    for client in range(config.clients):
        assert sum(ledger.history(client).values()) == drawn[client] * 2  # two local steps a round
        if drawn[client]:
            assert 3.98 <= ledger.epsilon(client, 1e-4) <= 4.0
    rows = rows_of(config)
    spent = [row["epsilon_max"] for row in rows]
    assert spent[0] == 0.0 and spent == sorted(spent) and 3.98 <= spent[-1] <= 4.0
    assert all(0 < row["client_clipped"] <= 1 and row["client_gradient_norm"] > 0 for row in rows[1:])


def test_the_ledger_is_on_disk_before_anything_is_sent(small) -> None:
    config = private(small, privacy__noise_multiplier=1.0)
    with pytest.raises(RunError):
        experiment.run(config, 0.0, "tests.apps:all_raise")
    ledger = json.loads((records.Recorder(config).folder / "privacy.json").read_text())
    assert len(ledger) == config.cohort_size  # no client answered, and yet all have spent


def test_a_run_whose_clients_have_all_spent_their_budget_ends_and_says_so(small) -> None:
    config = private(small, privacy__noise_multiplier=0.5, privacy__epsilon=3.0, rounds=20)
    with pytest.raises(RunError, match=r"round \d+: no drawn client may take part any more"):
        experiment.run(config, 0.0)
    ledger = Ledger.from_json((records.Recorder(config).folder / "privacy.json").read_text())
    assert max(ledger.epsilons(1e-4).values(), default=0.0) <= 3.0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"privacy__name": "none", "privacy__epsilon": 1.0}, "need privacy=record or user"),
        ({}, "privacy=record needs privacy.epsilon=<budget> or privacy.noise_multiplier=<σ>"),
        ({"privacy__epsilon": 0.0}, "privacy.epsilon=0.0 is out of range"),
        ({"privacy__epsilon": 1.0, "privacy__delta": 1.5}, "privacy.delta=1.5 is out of range"),
        ({"privacy__epsilon": 1.0, "privacy__clip": 0.0}, "privacy.clip=0.0 is out of range"),
        ({"privacy__noise_multiplier": -1.0}, "privacy.noise_multiplier=-1.0 is out of range"),
        ({"privacy__epsilon": 1.0, "privacy__participation": "always"}, "privacy.participation=always is not known"),
        ({"privacy__epsilon": 1.0, "privacy__accountant": "gdp"}, "privacy.accountant=gdp is not known"),
        ({"privacy__epsilon": 1.0, "train__max_grad_norm": 1.0}, "train.max_grad_norm=1.0 clips whole batches"),
    ],
)
def test_settings_that_make_no_sense_are_refused(small, settings, sentence) -> None:
    with pytest.raises(ConfigError) as error:
        private(small, **settings)
    assert sentence in str(error.value)


def test_a_ledger_merges_equal_keys_and_survives_json() -> None:
    ledger = Ledger()
    ledger.spend(3, 1.1, 0.1 + 0.2, 5)
    ledger.spend(3, 1.1, 0.30000000000000004, 5)
    ledger.spend(3, 2.0, 0.3, 1)
    ledger.spend(1, 0.0, 0.5, 1)
    assert list(ledger) == [1, 3] and ledger.history(3) == {(1.1, 0.1 + 0.2): 10, (2.0, 0.3): 1}
    assert Ledger.from_json(ledger.to_json()) == ledger
    assert ledger.epsilons(1e-5)[1] == np.inf and ledger.epsilon(7, 1e-5) == 0.0
    before = ledger.to_json()
    assert ledger.would_exceed(3, 1.1, 0.3, 1000, 5.0, 1e-5) and not ledger.would_exceed(7, 50.0, 0.1, 1, 5.0, 1e-5)
    assert ledger.to_json() == before
