"""What travels: the names and the bytes of every strategy's messages, and that clients derive the rest to the last bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message

import strategies
from clients import start
from clients.start import Start
from fedlora import engines
from fedlora.app import experiment, plan
from fedlora.app.assembly import make_strategy
from fedlora.arrays import messages
from fedlora.arrays.messages import ServerState
from fedlora.compute import workbench
from fedlora.config import Config
from fedlora.engines.inline import InlineGrid
from strategies import LoRAStrategy

every_name = pytest.mark.parametrize("name", strategies.names())


class Tap(InlineGrid):
    """An inline grid that keeps every message and every reply."""

    def __init__(self, config: Config, app: str = engines.CLIENT_APP) -> None:
        super().__init__(config.clients, app, engines.cohort(config))
        self.sent: list[Message] = []
        self.got: list[Message] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        batch = list(messages)
        self.sent += batch
        for reply in super().send_and_receive(batch, timeout=timeout):
            self.got.append(reply)
            yield reply

    def down(self, kind: str = "train") -> list[dict[str, np.ndarray]]:
        """The arrays of the messages of a type, in order."""
        return [_arrays(message) for message in self.sent if message.metadata.message_type == kind]

    def up(self, kind: str = "train") -> list[dict[str, np.ndarray]]:
        """The arrays of the replies that hold any records."""
        return [_arrays(reply) for reply in self.got if reply.metadata.message_type == kind and reply.has_content()]


def _arrays(message: Message) -> dict[str, np.ndarray]:
    return messages.arrays_of(message.content.array_records[messages.ARRAYS])


def play(config: Config, app: str = engines.CLIENT_APP, **changes: Any) -> tuple[LoRAStrategy, Tap, list[ServerState]]:
    """The strategy after its run, all that travelled, and the states before the first round and after each."""
    bench, strategy = workbench.build(config), make_strategy(config)
    for name, value in changes.items():
        setattr(strategy, name, value)
    begun = experiment.initial_state(bench, strategy)
    arrays = messages.pack(begun.adapters, begun.dense)
    job, grid, states = ConfigRecord({messages.EXPERIMENT: config.to_json()}), Tap(config, app), [begun]
    strategy.reports = []  # type: ignore[attr-defined]

    def after(round: int, _: ArrayRecord) -> None:
        if round:
            states.append(strategy.state)  # type: ignore[arg-type]
            strategy.reports.append(strategy.report)  # type: ignore[attr-defined]

    evaluates = ConfigRecord(dict(job))
    strategy.start(grid, arrays, config.rounds, train_config=job, evaluate_config=evaluates, evaluate_fn=after)
    return strategy, grid, states


def bits(state: ServerState) -> dict[str, bytes]:
    arrays = messages.named(state.adapters, state.dense, correction=state.base_correction)
    return {name: array.tobytes() for name, array in arrays.items()}


def settings(name: str, **more: Any) -> dict[str, Any]:
    """Of small runs; a client of a personal strategy has to test its own model."""
    personal = bool(strategies.strategy_class(name).personal)
    return {
        "strategy": {"name": name},
        "train__steps": 1,
        "train__batch_size": 4,
        "clients_per_round": 2,
        "evaluate__holdout": 0.2 * personal,
    } | more


# ---- names and bytes

M = N = 64  # of every layer of the embedded model
RANK, LAYERS, HEAD = 3, 8, {"weight": (10, 64), "bias": (10,)}
SHAPES = {"A": (RANK, N), "B": (M, RANK), "R": (RANK, RANK)}
DOWN = {  # factors that travel in each round; flora, and fedex_lora besides, also what the base has been corrected by
    "fed_sb": "R", "fedask": "AB", "fedavg": "AB", "fedex_lora": "AB", "fedsa_lora": "A", "fedsvd": "BR", "ffa_lora": "B",
    "flexlora": "AB", "flora": "", "hetlora": "AB", "lora_fair": "AB", "rolora": "AB",
}  # fmt: skip
UP = DOWN | {"fedask": "", "fedsvd": "B", "flora": "AB"}


def size(*shape: int) -> int:
    """Of a float32 array on the wire."""
    return 4 * int(np.prod(shape)) + 128


@every_name
def test_names_and_bytes_by_hand(small, name) -> None:
    more = settings(name, evaluate__holdout=0.2, train__steps=2)
    config = small(rounds=3, adapter__rank=RANK, adapter__train_head=True, **more)
    strategy, grid, states = play(config)
    layers = workbench.build(config).model.layers
    head = {f"base_model.model.classifier.{part}": shape for part, shape in HEAD.items()}
    assert len(layers) == LAYERS

    def expected(factors: str, correction: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        named = {f"{layer}.lora_{factor}.weight": SHAPES[factor] for layer in layers for factor in factors}
        return named | correction | ({} if name == "fedsa_lora" else head)

    for round in (1, 2, 3):
        correction = {}
        if name in ("flora", "fedex_lora") and round > 1:  # what two clients add up to has no more than twice their rank
            moved = messages.named({}, {}, correction=states[round - 1].base_correction)
            correction = {key: array.shape for key, array in moved.items()}
            assert len(correction) == 2 * LAYERS and all(
                0 < min(shape) <= (round - 1) * (2 if name == "flora" else 3) * RANK for shape in correction.values()
            )
        up = UP[name] if name != "rolora" else "AB"[round % 2]
        down_names, up_names = expected(DOWN[name], correction), expected(up, {})
        for sent in grid.down()[2 * round - 2 : 2 * round]:
            assert {key: array.shape for key, array in sent.items()} == down_names
        for got in grid.up()[2 * round - 2 : 2 * round]:
            assert {key: array.shape for key, array in got.items()} == up_names
        bytes_up = sum(size(*shape) for shape in up_names.values())
        bytes_down = sum(size(*shape) for shape in down_names.values())
        if name == "fedask":  # sketches (m, 13), bases (m, 13), projections (13, n), and the number of columns
            bytes_up += LAYERS * (size(M, 13) + size(13, N))
            bytes_down += LAYERS * size(M, 13) + 8 + 128
        report = strategy.reports[round - 1]
        tested = grid.down("evaluate")[6 * round - 6 : 6 * round]
        assert len(tested) == 6
        evaluated = sum(size(*array.shape) for arrays in tested for array in arrays.values())
        assert (report.bytes_up, report.bytes_down) == (2 * bytes_up, 2 * bytes_down + evaluated)
    assert all(not reply.content.array_records for reply in grid.got if reply.metadata.message_type == "evaluate")


@every_name
def test_the_plan_foretells_the_bytes(small, name) -> None:
    """Of a first round, in which nothing has been moved into the base yet."""
    config = small(rounds=1, **settings(name, evaluate__holdout=0.0))
    if strategies.strategy_class(name).personal:
        config = small(rounds=1, **settings(name, evaluate__every=2))
    strategy, _, states = play(config)
    foretold = plan.estimate(workbench.build(config), strategy, states[0])
    assert (foretold.up, foretold.down) == (strategy.report.bytes_up, strategy.report.bytes_down)


# ---- what clients derive


@pytest.fixture
def starts(monkeypatch) -> list[tuple[int, Start]]:
    """(round, start) of every client that was trained or tested."""
    seen: list[tuple[int, Start]] = []
    begin = start.begin

    def spy(bench, job, sent, state):
        seen.append((int(job[messages.ROUND]), begin(bench, job, sent, state)))
        return seen[-1][1]

    monkeypatch.setattr(start, "begin", spy)
    return seen


@every_name
@pytest.mark.parametrize("init", ["kaiming", "orthonormal", "pissa"])
def test_clients_begin_with_the_very_bits_of_the_server(small, starts, name, init) -> None:
    if init not in {"flora": ("kaiming", "orthonormal"), "fed_sb": ("orthonormal",)}.get(name, (init,)):
        pytest.skip("this strategy has no such init")
    strategy, _, states = play(small(rounds=4, **settings(name, strategy={"name": name, "init": init})))
    trained = [(round, begun) for round, begun in starts if begun is not None]
    assert {round for round, _ in trained} == {1, 2, 3, 4}
    for round, begun in trained:
        before = [states[round - 1], states[round]] if strategy.personal else [states[round - 1]]  # trains, or tests
        assert any(
            all(np.array_equal(pair.A, one.adapters[layer].A) for layer, pair in begun.adapters.items()) for one in before
        )
        if not strategy.personal:
            (state,) = before
            assert all(np.array_equal(pair.B, state.adapters[layer].B) for layer, pair in begun.adapters.items())
            assert begun.dense.keys() == state.dense.keys()
            assert all(np.array_equal(array, state.dense[key]) for key, array in begun.dense.items())
            assert {k: v.tobytes() for k, v in messages.named({}, {}, correction=begun.correction).items()} == {
                k: v.tobytes() for k, v in messages.named({}, {}, correction=state.base_correction).items()
            }
        assert begun.scale == states[0].scale
    moved = [not np.array_equal(states[0].adapters[x].A, states[-1].adapters[x].A) for x in states[0].adapters]
    assert all(moved) == (name not in ("ffa_lora", "fed_sb"))


@pytest.mark.parametrize("every", [1, 3])
def test_fedsvd_keeps_A_between_refactorings_to_the_bit(small, every) -> None:
    strategy = {"name": "fedsvd", "every": every}
    _, grid, states = play(small(rounds=6, **settings("fedsvd", strategy=strategy)))
    for round, (before, after) in enumerate(itertools.pairwise(states), 1):
        for layer, pair in before.adapters.items():
            assert np.array_equal(pair.A, after.adapters[layer].A) == (round % every > 0)
    assert all(sent[key].dtype == np.float32 for sent in grid.down() for key in sent)


def test_flora_draws_anew_in_every_round_and_clients_know(small, starts) -> None:
    _, grid, states = play(small(rounds=3, **settings("flora")))
    layer = next(iter(states[0].adapters))
    drawn = [state.adapters[layer].A.tobytes() for state in states]
    assert len(set(drawn)) == 4
    assert [begun.adapters[layer].A.tobytes() for _, begun in starts] == [drawn[round - 1] for round, _ in starts]
    assert not any(".lora_" in key for sent in grid.down() for key in sent)


# ---- who cannot derive, and who is not asked to


@every_name
def test_anybodys_clients_are_sent_all_that_there_is_by_pefts_names(small, name) -> None:
    _strategy, grid, states = play(small(rounds=2, adapter__train_head=True, **settings(name)), derive=False, beyond_peft=True)
    for round, sent in zip((1, 1, 2, 2), grid.down(), strict=True):
        assert {key: array.tobytes() for key, array in sent.items()} == bits(states[round - 1])
    peft = {f"{layer}.lora_{factor}.weight" for layer in states[0].adapters for factor in "AB"}
    assert all(peft <= sent.keys() for sent in grid.down())


@every_name
def test_lean_and_full_broadcasts_end_in_the_same_model(small, name) -> None:
    config = small(rounds=2, adapter__train_head=True, **settings(name))
    (_, lean, ended), (_, full, expected) = play(config), play(config, derive=False, beyond_peft=True)
    if name == "fedsvd":  # lean, A is what R · A0 rounds to
        for layer, pair in expected[-1].adapters.items():
            found = ended[-1].adapters[layer]
            np.testing.assert_allclose(found.B @ found.A, pair.B @ pair.A, atol=1e-5)
    else:
        assert bits(ended[-1]) == bits(expected[-1])
    sent = [sum(messages.array_bytes(message.content) for message in grid.sent) for grid in (lean, full)]
    assert sent[0] < sent[1] or (DOWN[name] == "AB" and sent[0] == sent[1])


@every_name
def test_a_run_that_follows_another_on_the_same_nodes_does_not_see_what_that_left(small, name) -> None:
    """What clients of a personal strategy, or of encoded messages, have kept concerns nobody else."""
    config, before = small(rounds=2, **settings(name)), small(rounds=1, adapter__train_head=True, **settings("fedsa_lora"))
    expected = play(config)[2][-1]
    left = play(before)[1].states
    assert left
    bench, strategy = workbench.build(config), make_strategy(config)
    begun = experiment.initial_state(bench, strategy)
    grid = Tap(config)
    if not strategy.personal:
        grid.states = dict(left)
    job = ConfigRecord({messages.EXPERIMENT: config.to_json()})
    arrays = messages.pack(begun.adapters, begun.dense)
    strategy.start(grid, arrays, 2, train_config=job, evaluate_config=ConfigRecord(dict(job)))
    assert strategy.state is not None and bits(strategy.state) == bits(expected)
