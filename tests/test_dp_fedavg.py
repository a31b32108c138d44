"""User-level privacy: one client's whole update is bounded, the noise is right, and every strategy merges the release."""

import json
from dataclasses import replace

import numpy as np
import pytest

import strategies
from fedlora import identity, seeds
from fedlora.app import experiment, records
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update, fold, rotation
from fedlora.check import ConfigError, RunError
from fedlora.config import Config, PrivacyConfig
from fedlora.privacy.user_level import user_epsilon
from fedlora.server.dp_fedavg import UserGuard, UserLedger
from fedlora.server.participation import draw_secretly
from tests.test_experiment import rows_of


def guarded(config, save=lambda ledger: None, before=None) -> UserGuard:
    return UserGuard(config, identity.digest(config), save, before)


def guard(noise=0.0, clip=1.0, cohort=4, **settings) -> UserGuard:
    privacy = PrivacyConfig("user", noise_multiplier=noise, clip=clip, **settings)
    return guarded(Config(clients=10, clients_per_round=cohort, rounds=5, privacy=privacy))


def released_noise(one: UserGuard, round: int = 1) -> np.ndarray:
    """The noise of a release of nothing, in units of zS."""
    state = ServerState({"k": Pair(np.zeros((20, 100)), np.zeros((100, 20)))}, {})
    (update,) = one.release(state, [], round, "AB")
    return flat(update) * one.ledger.cohort / one.ledger.noise_multiplier / one.config.clip


def a_state(rng, size=6) -> ServerState:
    layers = {name: Pair(rng.standard_normal((2, size)), rng.standard_normal((size, 2))) for name in ("k", "q")}
    return ServerState(layers, {"head": rng.standard_normal(3)})


def an_update(rng, state, client, step, trains="AB") -> Update:
    def moved(array, factor=True):
        return array + step * rng.standard_normal(array.shape) if factor else array

    adapters = {name: Pair(moved(p.A, "A" in trains), moved(p.B, "B" in trains)) for name, p in state.adapters.items()}
    return Update(client, 5 + client, adapters, {name: moved(array) for name, array in state.dense.items()})


def flat(update: Update | ServerState) -> np.ndarray:
    arrays = [array for pair in update.adapters.values() for array in pair] + list(update.dense.values())
    return np.concatenate([array.ravel() for array in arrays])


@pytest.mark.parametrize("step", [1e-3, 10.0])
def test_one_client_moves_the_sum_by_at_most_the_clip_over_all_that_it_sends(step) -> None:
    rng = np.random.default_rng(0)
    state, one = a_state(rng), guard(clip=0.5)
    updates = [an_update(rng, state, client, step) for client in range(4)]
    whole = flat(one.release(state, updates, 1, "AB")[0])
    moves = []
    for left_out in range(4):
        rest = [update for update in updates if update.client != left_out]
        moves.append(4 * np.linalg.norm(whole - flat(one.release(state, rest, 1, "AB")[0])))
    assert max(moves) <= 0.5 * (1 + 1e-9)
    assert (max(moves) > 0.499) == (step == 10.0)  # short updates are left as they are


def test_without_noise_and_bound_it_is_the_uniform_mean_whatever_the_sizes() -> None:
    rng = np.random.default_rng(1)
    state = a_state(rng)
    updates = [an_update(rng, state, client, 1.0) for client in range(4)]
    (released,) = guard(clip=1e9).release(state, updates, 1, "AB")
    np.testing.assert_allclose(flat(released), np.mean([flat(update) for update in updates], axis=0), atol=1e-9)
    assert released.examples == 1


def test_the_expected_cohort_divides_even_where_fewer_came() -> None:
    rng = np.random.default_rng(2)
    state = a_state(rng)
    updates = [an_update(rng, state, 0, 1.0)]
    (released,) = guard(clip=1e9).release(state, updates, 1, "AB")
    np.testing.assert_allclose(flat(released) - flat(state), (flat(updates[0]) - flat(state)) / 4, atol=1e-9)


@pytest.mark.parametrize("count", [0, 3])
def test_noise_is_z_times_the_clip_on_every_coordinate_that_is_sent_and_on_no_other(count) -> None:
    rng = np.random.default_rng(3)
    state = a_state(rng, size=4000)
    updates = [an_update(rng, state, client, 1.0, "B") for client in range(count)]
    quiet, noisy = (guard(z, clip=2.0).release(state, updates, 1, "B")[0] for z in (0.0, 1.5))
    for name in state.adapters:
        assert np.array_equal(noisy.adapters[name].A, state.adapters[name].A)
        noise = 4 * (noisy.adapters[name].B - quiet.adapters[name].B)
        assert np.std(noise) == pytest.approx(3.0, rel=0.03) and abs(noise.mean()) < 4 * 3.0 / np.sqrt(noise.size)
    assert not np.array_equal(noisy.dense["head"], quiet.dense["head"])
    other = guard(1.5, clip=2.0).release(state, updates, 2, "B")[0]
    first, second = (4 * (u.adapters["q"].B - quiet.adapters["q"].B).ravel() for u in (noisy, other))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


@pytest.mark.parametrize("name", [name for name in strategies.names() if not strategies.strategy_class(name).two_phase])
def test_every_strategy_merges_the_release(name) -> None:
    rng = np.random.default_rng(4)
    strategy, state = strategies.make(name), a_state(rng)
    if "R" in strategy.trains:
        state.dense |= {rotation(layer): rng.normal(size=(pair.rank,) * 2) for layer, pair in state.adapters.items()}
    sends = strategy.sends(1)
    updates = [an_update(rng, state, client, 0.1, sends) for client in range(4)]
    released = guard(0.5).release(state, updates, 1, sends)
    merged = strategy.merge(replace(state, dense=released[0].dense), released, 1)
    ended, sent = (fold(one.adapters, one.dense)[0] for one in (merged, released[0]))
    for layer, pair in sent.items():  # one client is a fixed point of the product
        whole = [pair for pair in (ended[layer], merged.base_correction.get(layer)) if pair is not None]
        np.testing.assert_allclose(sum(p.B @ p.A for p in whole), pair.B @ pair.A, atol=1e-6)


def own_run(**settings) -> UserGuard:
    """A guard of a run of its own, z = 1 and S = 1 unless another is set."""
    privacy = {"noise_multiplier": 1.0, "sampling": "none"} | settings.pop("privacy", {})
    return guarded(Config(clients=10, privacy=PrivacyConfig("user", **privacy), **settings))


@pytest.mark.parametrize(
    "other",
    [{"privacy": {"noise_multiplier": 2.0}}, {"privacy": {"clip": 2.0}}, {"rounds": 6}, {"strategy": {"name": "fedavg"}}],
)
def test_runs_of_a_sweep_share_neither_noise_nor_cohorts(other) -> None:
    """Or their difference would be free of noise; a run by itself has the same twice."""
    runs = [own_run(), own_run(), own_run(**other)]
    first, again, of_other = (released_noise(run) for run in runs)
    assert np.array_equal(first, again) and np.std(first) == pytest.approx(1.0, rel=0.05)
    assert abs(np.corrcoef(first, of_other)[0, 1]) < 0.07 and abs(np.corrcoef(first, released_noise(runs[0], 2))[0, 1]) < 0.07
    cohorts = [[run.draw(round, list(range(10)), 4) for round in range(1, 9)] for run in runs]
    assert cohorts[0] == cohorts[1] != cohorts[2]


def test_on_devices_noise_and_cohorts_come_from_no_seed_and_never_twice() -> None:
    """All that a device knows, the whole experiment with its seed, leads to other noise and to other cohorts."""
    server, device = own_run(deploy="here"), own_run(deploy="here")
    noises = [released_noise(run) for run in (server, server, device, own_run())]
    correlations = np.corrcoef(noises) - np.eye(4)
    assert np.abs(correlations).max() < 0.08
    everyone = list(range(1000))
    cohorts = {tuple(run.draw(1, everyone, 500)) for run in (server, server, device, own_run())}
    assert len(cohorts) == 4


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
def test_with_devices_no_amplification_is_claimed(small, sampling) -> None:
    edge = {
        "deploy": "here",
        "partition__name": "own",
        "dataset__name": "files",
        "dataset__text": "t",
        "dataset__classes": ["a"],
    }
    user = {"privacy__name": "user", "privacy__epsilon": 8.0}
    with pytest.raises(ConfigError, match=rf"privacy.sampling={sampling}; traffic and timing .* set privacy.sampling=none"):
        small(**edge, **user, privacy__sampling=sampling)
    assert small(**edge, **user, privacy__sampling="none").fresh_noise


def test_what_was_counted_before_stays_counted_and_a_spent_budget_ends_the_run(tmp_path) -> None:
    path, config = tmp_path / "privacy.json", Config(clients=10, rounds=3, deploy="here")
    config.privacy = PrivacyConfig("user", epsilon=8.0, sampling="none")
    for before, rounds in ((None, [1, 2]), (2, [2])):  # broken off in round 2, which is taken again
        spent = None if before is None else UserLedger.load(path)
        guard = guarded(config, lambda ledger: ledger.save(path), spent)
        guard.go_on({"rounds": 1} if spent else {"rounds": 0})
        for round in rounds:
            assert guard.admit(round, [5]) == [5]
    assert UserLedger.load(path).rounds == guard.ledger.rounds == 3 and guard.spent()["epsilon_max"] <= 8.0
    with pytest.raises(RunError, match=r"round 3: privacy.epsilon=8 is spent: .* rounds=3 releases"):
        guard.admit(3, [5])
    with pytest.raises(ConfigError, match="counts rounds with other noise or other cohorts"):
        guarded(config, print, UserLedger(guard.ledger.noise_multiplier, 10, 3, "none", 2))


@pytest.mark.parametrize("damage", [lambda t: t.replace(b'"rounds": 3', b'"rounds": 2'), lambda t: t[:-9], lambda t: b"[]"])
def test_a_ledger_that_is_not_as_it_was_written_is_refused(tmp_path, damage) -> None:
    path = tmp_path / "privacy.json"
    UserLedger(1.0, 10, 4, "none", 3).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"the privacy ledger .* is damaged"):
        UserLedger.load(path)


def test_poisson_cohorts_have_the_rate_and_may_be_empty() -> None:
    everyone = list(range(50))
    cohorts = [draw_secretly(seeds.private_key(round), everyone, 5, poisson=True) for round in range(1, 2001)]
    counts = np.bincount(np.concatenate([np.array(c, int) for c in cohorts]), minlength=50)
    assert np.abs(counts / 2000 - 0.1).max() < 5 * np.sqrt(0.09 / 2000)
    assert len({len(cohort) for cohort in cohorts}) > 5 and min(map(len, cohorts)) == 0
    fixed = [draw_secretly(seeds.private_key(round), everyone, 5, poisson=False) for round in range(1, 2001)]
    counts = np.bincount(np.concatenate(fixed), minlength=50)
    assert np.abs(counts / 2000 - 0.1).max() < 5 * np.sqrt(0.09 / 2000) and {len(set(cohort)) for cohort in fixed} == {5}


@pytest.mark.parametrize("strategy", ["fedsvd", "lora_fair"])
@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
def test_a_private_run_keeps_its_budget_and_its_books(small, monkeypatch, strategy, sampling) -> None:
    if sampling == "poisson":  # which has an empty cohort sooner or later
        monkeypatch.setattr(UserGuard, "draw", lambda self, round, clients, size: [] if round == 3 else [round % 6])
    config = small(
        privacy__name="user", privacy__epsilon=8.0, privacy__delta=1e-2, privacy__sampling=sampling, rounds=6,
        clients_per_round=1, strategy={"name": strategy}, train__lr=0.1, adapter__train_head=True,
    )  # fmt: skip
    experiment.run(config, 0.0)
    rows = rows_of(config)
    sizes = [len(row["cohort"]) for row in rows[1:]]
    assert (0 in sizes) == (sampling == "poisson")  # an empty cohort is a round of noise, and the run goes on
    spent = [row["epsilon_max"] for row in rows]
    assert spent[0] == 0.0 and spent == sorted(spent) and 7.9 <= spent[-1] <= 8.0
    ledger = json.loads((records.Recorder(config).folder / "privacy.json").read_text())
    z = ledger["noise_multiplier"]
    assert ledger["rounds"] == 6 and user_epsilon(z, 6, 1, 6, 1e-2, sampling) == pytest.approx(spent[-1])
    assert all(row["update_norm"] > 0 for row in rows[1:])
