"""Private training as a whole: every strategy with every way to train, what a user gets wrong, and what a run says."""

import itertools
import json
import math

import numpy as np
import pytest
from flwr.app import ConfigRecord

import strategies
from clients.private import Mechanism
from clients.task import Task, simulated_key
from fedlora import engines, seeds
from fedlora.app import experiment, guard, plan, records
from fedlora.arrays import lowrank, messages
from fedlora.compute import workbench
from fedlora.config import Config
from fedlora.privacy.accounting import epsilon
from fedlora.tools import cli
from tests.conftest import ROOT
from tests.test_experiment import rows_of
from tests.test_models import bert  # noqa: F401 (fixture)
from tests.test_private import flat, plain_draws, run  # noqa: F401 (fixture)
from tests.test_selftest import own, reviews  # noqa: F401 (fixture)

LEVELS = {
    "record": {"privacy__noise_multiplier": 0.7},
    "user": {"privacy__noise_multiplier": 0.2, "privacy__sampling": "fixed"},
}
HEADS = (False, True)
OPTIMISERS = ({"train__lr": 0.1}, {"train__optimizer": "adamw", "train__lr": 0.01})
MICRO = (None, 3)  # examples of one forward pass


def fit(cells: list[Config]) -> list[dict[str, np.ndarray]]:
    """The final arrays of each cell, all driven on one grid of the first cell's engine, as `experiment.run` drives them."""
    final = []

    def drive(grid) -> None:
        for cell in cells:
            grid.states.clear()  # what clients keep is a run's own
            bench, strategy = workbench.build(cell), experiment.make_strategy(cell)
            state, keeper = experiment.initial_state(bench, strategy), guard.make(bench)
            job = ConfigRecord({messages.EXPERIMENT: cell.to_json()})
            if keeper is not None:
                strategy.admit, strategy.release = keeper.admit, keeper.release
                keeper.key = lambda purpose, round, *more: seeds.private_key(purpose, round)  # the cells' own would differ
                job[messages.NOISE] = keeper.noise_multipliers
            strategy.start(grid, messages.pack(state.adapters, state.dense), cell.rounds, train_config=job)
            adapters, head = messages.fold(strategy.state.adapters, strategy.state.dense)
            for name, moved in strategy.state.base_correction.items():
                adapters[name] = lowrank.stack([adapters[name], moved], np.ones(2))
            products = {name: pair.A if strategy.personal else pair.B @ pair.A for name, pair in adapters.items()}
            final.append(products | head)

    engine = engines.make(cells[0])
    engine.run(drive)
    engine.close()
    return final


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", strategies.names())
def test_every_strategy_trains_privately_in_every_way(small, name, level, monkeypatch) -> None:
    """Head frozen or trained, SGD or AdamW, whole batches or micro-batches, in this process or on workers."""
    chosen, ways = strategies.strategy_class(name), list(itertools.product(HEADS, OPTIMISERS, MICRO))
    if chosen.two_phase and level == "user":
        pytest.skip("refused: the server never sees a client's own factors")
    steps = 2 if chosen.personal else 1  # of a B that is zero at first, and stays on the client
    cells = [
        small(
            privacy__name=level, strategy={"name": name}, adapter__train_head=head, train__physical_batch_size=micro,
            train__batch_size=8, train__steps=steps, rounds=1, clients_per_round=2, **optimiser, **LEVELS[level],
            evaluate__holdout=0.2 if chosen.personal else 0.0,
        )
        for head, optimiser, micro in ways
    ]  # fmt: skip
    with monkeypatch.context() as patch:  # one identity, so that whole batches and micro-batches have the same noise
        patch.setattr(workbench.Workbench, "identity", "any")
        alike = fit(cells)
    workbench.build_from.cache_clear()
    inline = fit(cells)
    for cell in cells:
        cell.engine.name, cell.engine.workers = "ray", 2
    on_workers = fit(cells)
    for i, ((head, _, micro), here, there) in enumerate(zip(ways, inline, on_workers, strict=True)):
        parts, whole = alike[i], alike[i - i % 2]
        assert all(np.isfinite(array).all() and np.abs(array).max() > 0 for array in here.values())
        assert any("classifier" in key for key in here) == (head and not chosen.personal)
        assert all(np.array_equal(here[key], there[key]) for key in here)
        assert all(np.allclose(parts[key], whole[key], atol=1e-5) for key in parts)
        assert micro is None or any(not np.array_equal(parts[key], whole[key]) for key in parts)  # and were really smaller
    by_sgd, by_adamw = inline[0], inline[2]
    assert any(not np.allclose(by_sgd[key], by_adamw[key], atol=1e-4) for key in by_sgd)


@pytest.mark.parametrize("clip", [1e30, math.inf])
@pytest.mark.parametrize("name", ["fedavg", "fedsvd"])
def test_without_noise_and_bound_a_private_run_is_one_with_poisson_sampling(small, name, clip, plain_draws) -> None:  # noqa: F811
    usual = {"strategy": {"name": name}, "adapter__train_head": True, "train__lr": 0.1, "train__physical_batch_size": 5}
    open_, shuffled = small(**usual, train__sampling="poisson"), small(**usual)
    private = small(**usual, privacy__name="record", privacy__noise_multiplier=0.0, privacy__clip=clip)
    expected, found, other = fit([open_, private, shuffled])
    assert max(float(np.abs(expected[key] - found[key]).max()) for key in expected) < 1e-6
    assert max(float(np.abs(expected[key] - other[key]).max()) for key in expected) > 1e-3


@pytest.mark.parametrize("sampling", ["fixed", "none"])
def test_without_noise_and_bound_a_release_is_the_uniform_mean(small, sampling) -> None:
    config = small(privacy__name="user", privacy__epsilon=math.inf, privacy__clip=math.inf, privacy__sampling=sampling)
    experiment.run(config, 0.0)
    rows = rows_of(config)
    assert all(row["updates_clipped"] == 0 and row["epsilon_max"] is None for row in rows[1:])


# ---- the streams of a simulation


def sent(cell: Config) -> np.ndarray:
    """What the one client of a round of FFA-LoRA has trained, as one vector."""
    bench, strategy = workbench.build(cell), experiment.make_strategy(cell)
    state, keeper = experiment.initial_state(bench, strategy), guard.make(bench)
    job = ConfigRecord({messages.EXPERIMENT: cell.to_json(), messages.NOISE: keeper.noise_multipliers})
    arrays, engine = messages.pack(state.adapters, state.dense), engines.make(cell)
    engine.run(lambda grid: strategy.start(grid, arrays, 1, train_config=job))
    engine.close()
    trained = [strategy.state.adapters[name].B for name in bench.model.layers] + [*strategy.state.dense.values()]
    return np.concatenate([array.ravel() for array in trained]).astype(float)


ONE_CLIENT = {
    "privacy__name": "record", "privacy__accountant": "rdp", "privacy__noise_multiplier": 1.0, "strategy": {"name": "ffa_lora"},
    "rounds": 1, "clients_per_round": 1, "train__steps": 1, "adapter__train_head": True,
}  # fmt: skip


def test_cells_that_differ_in_one_setting_share_no_noise(small) -> None:
    """Each record is taken in every step, so that nothing but the noise differs between a cell and the one without."""
    usual = ONE_CLIENT | {"train__batch_size": 10_000}

    def noise(**change) -> np.ndarray:
        silent = {"privacy__noise_multiplier": 0.0, "privacy__epsilon": None}
        return sent(small(**usual | change)) - sent(small(**usual | change | silent))

    budgets = [{"privacy__noise_multiplier": None, "privacy__epsilon": budget} for budget in (1.0, 6.0)]
    others = [{"strategy": {"name": "ffa_lora", "init": "orthonormal"}}, {"evaluate__every": 2}, {"round_timeout": 99.0}]
    cells = np.stack([noise(**change) for change in [*budgets, *others, {}]])
    correlations = np.corrcoef(cells) - np.eye(len(cells))
    assert np.abs(correlations).max() < 5 / np.sqrt(cells.shape[1])
    assert np.array_equal(noise(strategy={"name": "ffa_lora", "init": "kaiming"}), cells[-1])  # the default, spelt out


def test_cells_that_differ_in_the_budget_share_no_batches(small) -> None:
    usual = ONE_CLIENT | {"privacy__noise_multiplier": 1.0, "train__batch_size": 8}
    drawn = []
    for budget in (1.0, 6.0):
        bench = workbench.build(small(**usual, privacy__epsilon=budget))
        key = simulated_key((0, 0, 1), bench.identity, Mechanism(1.0, 1.0))
        drawn.append(
            list(Task(bench.shards[0], bench.config.train, "B", (1, 1), (0, 0, 1), Mechanism(1.0, 1.0), key).batches())
        )
    assert not all(np.array_equal(one, other) for one, other in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    "same", [{"engine__name": "ray", "engine__workers": 1}, {"checkpoint__every": 0}, {"name": "x"}], ids=str
)
def test_where_and_under_which_name_a_run_is_changes_no_noise(small, same) -> None:
    assert np.array_equal(sent(small(**ONE_CLIENT)), sent(small(**ONE_CLIENT | same)))


# ---- the mechanism


def test_the_noise_over_many_coordinates_is_within_a_hundredth_and_of_one_client_and_round(small) -> None:
    """79,578 coordinates: 9 rounds of 8,842, for two clients, on full batches and on empty ones."""
    bench, sigma, clip = workbench.build(small(adapter__train_head=True)), 3.0, 0.5
    indices = bench.shards[0][:10]
    for expected in (10, 1e-9):  # the second never draws anybody
        moves = {
            noise: np.stack([
                np.concatenate([
                    flat(run(bench, Mechanism(noise, clip), "AB", indices, (0, client, round), batch_size=expected)[0])
                    for round in range(1, 10)
                ])
                for client in (0, 1)
            ])
            for noise in (0.0, sigma)
        }  # fmt: skip
        drawn = expected * (moves[sigma] - moves[0.0]) / (sigma * clip)
        assert drawn.shape == (2, 79_578) and drawn.std(axis=1) == pytest.approx([1, 1], rel=0.01)
        rounds = drawn[:, : 4 * 2 * 8842].reshape(2, 2, -1)  # client, half of the rounds
        for one, other in ((drawn[0], drawn[1]), rounds[0], rounds[1]):
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.02


def test_padding_changes_no_private_step(bert, reviews) -> None:  # noqa: F811
    """Texts of 2 to 8 words: padded to the longest of the batch, and one by one without padding."""
    sizes = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(sizes | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    bench = workbench.build(cli.compose(ROOT / "configs", own(bert, reviews)))
    indices = np.arange(8)
    assert len({len(bench.train.tokens[index]) for index in indices}) > 2
    whole, alone = (
        run(bench, Mechanism(1.0, 0.1), "AB", indices, batch_size=8, physical_batch_size=rows)[0] for rows in (None, 1)
    )
    assert np.abs(flat(whole)).max() > 0.01
    np.testing.assert_allclose(flat(alone), flat(whole), atol=1e-6)


# ---- what a user gets wrong, as he meets it

PRIVATE = ("engine=inline", "device=cpu", "clients=4", "clients_per_round=2", "rounds=2", "train.steps=1", "privacy.delta=1e-4")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ("privacy=record", "privacy.epsilon=6", "model=hf", "model.path=x", "model.dropout=true"),
            "model.dropout=true draws masks for places in a batch, so that one record moves the gradients of others; with "
            "privacy=record set it to false (adapter.dropout works, record by record)",
        ),
        (("privacy=record", "privacy.epsilon=0"), "privacy.epsilon=0.0 is out of range; it must be above 0"),
        (("privacy=record", "privacy.epsilon=-1"), "privacy.epsilon=-1.0 is out of range; it must be above 0"),
        (("privacy=user", "privacy.epsilon=nan"), "privacy.epsilon=nan is out of range; it must be above 0"),
        (
            ("privacy=record", "privacy.epsilon=0.005"),
            "privacy.epsilon=0.005 is out of reach: even privacy.noise_multiplier=1e+06 certifies no less than 0.0",
        ),
        (
            ("privacy=user", "privacy.epsilon=0.005"),
            "privacy.epsilon=0.005 is out of reach: even privacy.noise_multiplier=1e+06 certifies no less than 0.0",
        ),
        (
            ("privacy=user", "privacy.epsilon=3", "privacy.noise_multiplier=1"),
            "privacy=user takes privacy.epsilon or privacy.noise_multiplier, not both; remove one",
        ),
        (
            ("privacy=record", "privacy.epsilon=3", "privacy.clip=inf"),
            "privacy.clip=inf bounds nothing, so that no noise protects; set a number, or privacy.epsilon=inf",
        ),
        (
            ("privacy=user", "privacy.noise_multiplier=1", "privacy.clip=inf"),
            "privacy.clip=inf bounds nothing, so that no noise protects; set a number, or privacy.epsilon=inf",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence_and_status_2(capsys, tmp_path, settings, sentence) -> None:
    assert cli.main(ROOT / "configs", [*PRIVATE, f"results={tmp_path}", *settings]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}") and error.count("\n") == 1
    assert not list(tmp_path.rglob("rounds.jsonl"))


def cautions(config: Config) -> list[str]:
    bench, strategy = workbench.build(config), experiment.make_strategy(config)
    rows = plan.derive(bench, strategy, experiment.initial_state(bench, strategy), guard.make(bench))
    return [f"{value} ({reason})" for name, value, reason in rows if name == "warning"]


def test_a_delta_of_one_in_n_or_more_is_warned_of(small) -> None:
    """1438 training examples, or 6 clients."""
    sigma = {"privacy__noise_multiplier": 1.0}
    for level, n in (("record", 1438), ("user", 6)):
        assert cautions(small(privacy__name=level, privacy__delta=0.999 / n, **sigma)) == []
        (warning,) = cautions(small(privacy__name=level, privacy__delta=1 / n, **sigma))
        assert warning.startswith(f"privacy.delta={1 / n:g} (not below 1/n of n = {n} ")
    assert cautions(small()) == []


def test_a_batch_larger_than_a_clients_data_is_warned_of(small) -> None:
    usual = {"privacy__name": "record", "privacy__noise_multiplier": 1.0}
    counts = [len(shard) for shard in workbench.build(small()).shards]
    assert cautions(small(**usual, train__batch_size=min(counts))) == []
    (warning,) = cautions(small(**usual, train__batch_size=min(counts) + 1))
    assert warning.startswith(f"train.batch_size={min(counts) + 1} (larger than the data of 1 of 6 clients (the smallest has ")
    assert cautions(small(train__batch_size=min(counts) + 1)) == []  # nothing is amplified without noise


def test_a_client_that_stops_is_named_with_its_round_on_the_terminal_and_in_the_records(small, capsys) -> None:
    """All take part in each round; the budget lies between the first two rounds of the one with the fewest examples."""
    usual = {"privacy__name": "record", "privacy__noise_multiplier": 1.0, "privacy__delta": 1e-4, "clients_per_round": 6}
    counts = [len(shard) for shard in workbench.build(small(**usual)).shards]
    first = int(np.argmin(counts))
    rates = [16 / count for count in counts]
    after = [epsilon({(1.0, rates[first]): 2 * rounds}, 1e-4) for rounds in (1, 2)]
    budget = after[1] - 0.01
    assert all(epsilon({(1.0, rate): 4}, 1e-4) < budget for k, rate in enumerate(rates) if k != first)
    config = small(**usual, privacy__epsilon=budget)
    experiment.run(config, 0.0)
    rows = rows_of(config)
    assert [row["stops"] for row in rows[:2]] == [{}, {}] and [row["clients_stopped"] for row in rows] == [0, 0, 1]
    reason = f"has spent ε = {after[0]:.4g}, and 2 more steps would take it above privacy.epsilon={budget:g}"
    assert rows[2]["stops"] == {str(first): reason} and first not in rows[2]["cohort"]
    printed = capsys.readouterr().out
    assert f"  client {first} takes no part from round 2 on: it {reason}\n" in printed
    assert f"clients stop at ε = {budget:g}" in printed
    assert f"  ε {rows[1]['epsilon_max']:.2f}  up" in printed


def test_every_round_reports_epsilon_over_all_clients_and_the_last_is_what_was_promised(small) -> None:
    config = small(
        privacy__name="record", privacy__epsilon=3.0, privacy__delta=1e-4, rounds=4, clients_per_round=2, evaluate__every=4
    )
    summary = experiment.run(config, 0.0)
    rows, ledger = rows_of(config), {}
    folder = records.Recorder(config).folder
    sigmas = {int(c): row[0] for c, row in json.loads((folder / "privacy.json").read_text()).items()}
    for row in rows:
        for client in row.get("cohort", []):
            ledger[client] = ledger.get(client, 0) + 2
        spent = sorted(
            epsilon({(sigmas[c]["noise_multiplier"], sigmas[c]["sampling_rate"]): ledger[c]}, 1e-4) if c in ledger else 0.0
            for c in range(6)
        )
        names = ("epsilon_lower_quartile", "epsilon_median", "epsilon_upper_quartile", "epsilon_max")
        assert [row[name] for name in names] == [spent[1], spent[2], spent[4], spent[5]]
    assert ["accuracy" in row for row in rows] == [True, False, False, False, True]
    assert 2.98 <= rows[-1]["epsilon_max"] == summary["epsilon"] <= 3.0


def test_at_user_level_every_round_reports_epsilon_too(small) -> None:
    config = small(privacy__name="user", privacy__epsilon=8.0, privacy__delta=1e-2, rounds=3, evaluate__every=3)
    summary = experiment.run(config, 0.0)
    spent = [row["epsilon_max"] for row in rows_of(config)]
    assert spent[0] == 0 and spent == sorted(set(spent)) and 7.98 <= spent[3] == summary["epsilon"] <= 8.0
