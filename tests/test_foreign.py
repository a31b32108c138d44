"""Strategies in somebody else's Flower app: every one works rightly with plain PEFT clients, or refuses before it begins."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, arrays_size_mod, fixedclipping_mod, message_size_mod
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

import strategies
from fedlora.arrays import lowrank, messages
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.check import ConfigError, RunError
from fedlora.server import foreign
from fedlora.server.updates import capped, layers, shares
from fedlora.tools import cli
from strategies import LoRAStrategy
from strategies.base import LoRAStrategy as Base
from tests import foreign_app
from tests.foreign_app import LAYERS, RANK, SCALE
from tests.test_rounds import StubGrid
from tests.test_wire import play as play_own
from tests.test_wire import settings

CLIENTS = 3
PLAIN = [name for name in strategies.names() if not foreign.needs(strategies.make(name))]
every_plain = pytest.mark.parametrize("name", PLAIN)
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(autouse=True)
def outside_of_flower(one_thread: None) -> Iterator[None]:
    before = {key: getattr(TaskIdentity, f"_{key}") for key in ("task_id", "run_id", "node_id")}
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    yield
    for key, value in before.items():
        setattr(TaskIdentity, f"_{key}", value)


class Federation(StubGrid):
    """Nodes that play a ClientApp, every message and reply going through Flower's bytes; what came back is kept."""

    def __init__(self, app: ClientApp, clients: int = CLIENTS) -> None:
        super().__init__(lambda number, message: None, clients)
        self.app, self.got = app, list[Message]()

    def _call(self, message: Message) -> Message:
        number = self.nodes[message.metadata.dst_node_id]
        message.metadata.__dict__["_message_id"] = f"m{len(self.seen)}"
        self.seen.append(message)
        arrived = Message(messages.from_bytes(messages.to_bytes(message.content)), 7, message.metadata.message_type)
        try:
            reply = self.app(arrived, Context(1, number, {"partition-id": number}, RecordDict(), {}))
            content: Any = Error(1, reply.error.reason) if reply.has_error() else reply.content
        except Exception as error:
            content = Error(2, f"{type(error).__name__}: {error}")
        self.got.append(Message(content, reply_to=message))
        return self.got[-1]

    def sent(self, kind: str = "train", key: str = "arrays") -> list[ArrayRecord]:
        return [message.content[key] for message in self.seen if message.metadata.message_type == kind]

    def replies(self, kind: str = "train") -> list[RecordDict]:
        return [m.content for m in self.got if m.metadata.message_type == kind and m.has_content()]


def make(name: str, **keywords: Any) -> LoRAStrategy:
    return strategies.make(name, **{"scale": SCALE, "min_available_nodes": CLIENTS, "patience": 1.0} | keywords)


def run(strategy: Any, grid: Federation, rounds: int = 2, **keywords: Any) -> list[dict[str, np.ndarray]]:
    """The arrays before the first round and after each."""
    history: list[dict[str, np.ndarray]] = []
    keep = lambda _, arrays: history.append(messages.arrays_of(arrays))  # noqa: E731
    strategy.start(grid, foreign_app.initial(), rounds, evaluate_fn=keep, **keywords)
    return history


# ---- what each strategy comes to


def best(W: np.ndarray) -> np.ndarray:
    U, s, Vt = np.linalg.svd(W)
    return (U[:, :RANK] * s[:RANK]) @ Vt[:RANK]


def expected(name: str, round: int, before: Pair, pairs: list[Pair], p: np.ndarray) -> dict[str, np.ndarray]:
    """What must come of a layer, by hand from dense matrices: factors where the paper says which, else their product."""
    A, B = (sum(weight * getattr(pair, f) for weight, pair in zip(p, pairs, strict=True)) for f in "AB")
    ideal = sum(weight * pair.B @ pair.A for weight, pair in zip(p, pairs, strict=True))
    norms = np.array([np.linalg.norm(pair.B @ pair.A) for pair in pairs])
    w = norms / norms.sum()
    if name == "fedavg":
        return {"A": A, "B": B}
    if name == "ffa_lora":
        return {"A": before.A, "B": B}
    if name == "fedsvd":
        return {"BA": B @ before.A, "AAᵀ": np.eye(RANK)}
    if name == "flexlora":
        return {"BA": best(ideal), "AAᵀ": np.eye(RANK)}
    if name == "hetlora":
        return {f: sum(weight * getattr(pair, f) for weight, pair in zip(w, pairs, strict=True)) for f in "AB"}
    if name == "lora_fair":
        return {"A": A, "B": B + (ideal - B @ A) @ A.T @ np.linalg.inv(A @ A.T + 0.01 * np.eye(RANK))}
    if name == "rolora":
        return {"A": before.A, "B": B} if round % 2 else {"A": A, "B": before.B}
    raise AssertionError(f"{name}: say by hand what its merge is")


@pytest.mark.parametrize("name", strategies.names())
def test_every_strategy_merges_rightly_or_refuses_before_anything_is_sent(name: str, caplog: pytest.LogCaptureFixture) -> None:
    grid = Federation(foreign_app.make())
    if name not in PLAIN:
        with pytest.raises(ConfigError, match=rf"strategy={name} .*fedlora's own clients \(python run.py\)"):
            run(make(name), grid)
        assert not grid.seen
        return
    history = run(make(name), grid)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert {message.metadata.message_type for message in grid.seen} == {"train"}  # a roll call would be a traceback
    p = np.array([10, 11, 12]) / 33
    for round in (1, 2):
        before = messages.state_of(messages.record(history[round - 1]), SCALE)
        after = messages.state_of(messages.record(history[round]), SCALE)
        sent = [messages.unpack(reply["mine"]) for reply in grid.replies()[CLIENTS * (round - 1) : CLIENTS * round]]
        assert len(sent) == CLIENTS and len(after.adapters) == LAYERS
        for layer, (A, B) in after.adapters.items():
            pairs = [Pair(**own.factors[layer]) for own in sent]
            got = {"A": A, "B": B, "BA": B @ A, "AAᵀ": A @ A.T}
            for what, value in expected(name, round, before.adapters[layer], pairs, p).items():
                assert got[what] == pytest.approx(value, abs=2e-6), (layer, what)
        for key, array in after.dense.items():
            assert array == pytest.approx(sum(w * own.dense[key] for w, own in zip(p, sent, strict=True)), abs=1e-6)
    assert any((history[2][key] != history[1][key]).any() for key in history[1])


def test_r_that_is_not_in_the_initial_arrays_is_one_sentence_even_for_clients_that_know_it() -> None:
    with pytest.raises(
        ConfigError, match=r"strategy=fed_sb trains .*layers\.0\.query\.lora_R\.weight, which the initial arrays lack"
    ):
        run(make("fed_sb", beyond_peft=True), Federation(foreign_app.make()))


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"init": "orthonormal"}, "init=orthonormal is for python run.py"),
        ({"encodes": ("none", "int8", 0.1)}, "they must send what they changed, encoded"),
    ],
)
def test_a_setting_that_foreign_clients_do_not_read_is_refused(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(make("ffa_lora", **keywords), Federation(foreign_app.make()))


def test_factors_of_other_than_linear_layers_are_refused() -> None:
    arrays = ArrayRecord({f"conv.lora_{f}.weight": Array(np.zeros((2, 2, 3, 3), np.float32)) for f in "AB"})
    with pytest.raises(ConfigError, match=r"conv has lora_A of shape .* strategies are for linear layers"):
        make("fedavg").start(Federation(foreign_app.make()), arrays, 1)


# ---- what was not to be trained


@pytest.mark.parametrize("name", ["ffa_lora", "fedsvd", "rolora"])
def test_clients_that_train_what_is_frozen_are_named_and_none_is_merged(name: str) -> None:
    with pytest.raises(RunError, match=r"0 of 3 clients .*client 0: it changed base_model.*query\.lora_[AB],"):
        run(make(name), Federation(foreign_app.make(careless=lambda client: True)), rounds=2)


def test_one_that_does_is_left_out_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    strategy, grid = make("fedsvd"), Federation(foreign_app.make(careless=lambda client: client == 1))
    history = run(strategy, grid, rounds=1)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith("round 1: client 1 (node 101) is left out: it changed base_model.model.layers.")
    assert said.endswith("lora_A, which this round does not train; freeze lora_A at the client")
    without = make("fedsvd", min_available_nodes=2)
    grid = Federation(foreign_app.make())
    del grid.nodes[101]
    assert {key: a.tobytes() for key, a in run(without, grid, rounds=1)[1].items()} == {
        k: a.tobytes() for k, a in history[1].items()
    }


def test_a_model_in_half_precision_changes_nothing_that_is_frozen() -> None:
    strategy = make("ffa_lora")
    history = run(strategy, Federation(foreign_app.make(half=True)))
    assert strategy.report is not None and not strategy.report.drops
    assert all(np.array_equal(array, history[2][key]) for key, array in history[0].items() if "lora_A" in key)


# ---- order


@every_plain
def test_arrays_keep_their_order_and_clients_may_go_by_position(name: str) -> None:
    grids = [Federation(foreign_app.make(load)) for load in (foreign_app.by_name, foreign_app.by_position)]
    histories = [run(make(name, fraction_evaluate=1.0), grid, rounds=3) for grid in grids]
    order = list(foreign_app.initial())
    assert order.index("base_model.model.layers.2.query.lora_A.weight") < order.index(
        "base_model.model.layers.10.query.lora_A.weight"
    )
    for grid, history in zip(grids, histories, strict=True):
        assert all(list(arrays) == order for arrays in (*grid.sent(), *grid.sent("evaluate"), *history))
    for named, placed in zip(*histories, strict=True):
        assert all(np.array_equal(named[key], placed[key]) for key in order)


@pytest.mark.parametrize("keywords", [{"ranks": [1, 2, 2]}, {"derive": True}])
def test_so_do_those_cut_to_ranks_or_without_what_clients_derive(keywords: dict[str, Any]) -> None:
    grid = Federation(foreign_app.make())
    strategy = make("flexlora", min_success=1e-9, **keywords)
    order = list(foreign_app.initial())
    strategy.configure_train(1, foreign_app.initial(), ConfigRecord(), grid)
    assert all(list(message.content["arrays"]) == order for message in strategy._sent)


def test_what_has_moved_into_the_base_comes_last(small) -> None:  # type: ignore[no-untyped-def]
    strategy, _, states = play_own(small(rounds=1, **settings("fedex_lora")))
    strategy._order = ("b", "base_model.x", *reversed(messages.named(states[0].adapters, {})))
    sent = list(strategy._record(strategy.sent_down(states[1])))
    lora = [name for name in strategy._order if ".lora_" in name]
    assert sent[: len(lora)] == lora and all(".base_" in name for name in sent[len(lora) :]) and len(sent) == 2 * len(lora)


# ---- Flower's wrappers and mods


def same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], close: float = 1e-6) -> bool:
    return got.keys() == wanted.keys() and all(np.allclose(got[key], wanted[key], atol=close) for key in wanted)


@every_plain
@pytest.mark.parametrize("side", ["server", "client"])
def test_flowers_clipping_wrappers_bound_the_updates_of_twelve_layers(name: str, side: str) -> None:
    """A bound that nobody reaches changes nothing; a small one keeps every update that it merges below it."""
    plain = run(make(name), Federation(foreign_app.make()))
    fixed, adaptive = (
        flower.DifferentialPrivacyServerSideFixedClipping,
        flower.DifferentialPrivacyServerSideAdaptiveClipping,
    ) if side == "server" else (
        flower.DifferentialPrivacyClientSideFixedClipping,
        flower.DifferentialPrivacyClientSideAdaptiveClipping,
    )  # fmt: skip
    mods = {fixed: [fixedclipping_mod], adaptive: [adaptiveclipping_mod]} if side == "client" else {}
    for wide in (fixed(make(name), 0.0, 1e3, CLIENTS), adaptive(make(name), 0.0, CLIENTS, 1e3)):
        history = run(wide, Federation(foreign_app.make(mods=mods.get(type(wide)))))
        assert same(history[2], plain[2], 1e-4)
    inner = make(name)
    grid = Federation(foreign_app.make(mods=mods.get(fixed)))
    history = run(fixed(inner, 0.0, 0.01, CLIENTS), grid)
    for start, sent in zip(grid.sent(), grid.replies(), strict=True):
        given, own = messages.arrays_of(start), messages.arrays_of(sent["mine"])
        assert np.sqrt(sum(np.sum((own[key] - array) ** 2) for key, array in given.items())) < 0.01 * (1 + 1e-3)
    assert not same(history[2], plain[2], 1e-4) and inner.report is not None and not inner.report.drops


def test_what_a_wrapper_adds_to_the_arrays_is_what_clients_test_and_train() -> None:
    """Its noise must not be missing from any message, whatever the strategy remembers of its own merge."""
    for keywords in ({}, {"ranks": [2, 2, 2]}):
        np.random.seed(0)
        inner, grid = make("fedavg", fraction_evaluate=1.0, **keywords), Federation(foreign_app.make())
        noisy = flower.DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 1.0, CLIENTS)
        history = run(noisy, grid)
        sent = [messages.arrays_of(arrays) for arrays in (*grid.sent("evaluate")[:CLIENTS], *grid.sent()[CLIENTS:])]
        assert len(sent) == 2 * CLIENTS and all(same(arrays, history[1], 0.0) for arrays in sent)


def test_local_noise_on_both_factors_goes_through_and_on_a_frozen_one_is_named() -> None:
    mods = [LocalDpMod(1.0, 1e-3, 1.0, 1e-2)]
    strategy = make("fedavg")
    run(strategy, Federation(foreign_app.make(mods=mods)), rounds=1)
    assert strategy.report is not None and not strategy.report.drops
    with pytest.raises(RunError, match=r"it changed .*lora_A, which this round does not train"):
        run(make("ffa_lora"), Federation(foreign_app.make(mods=mods)), rounds=1)


@every_plain
def test_flowers_mods_can_count_what_is_sent(name: str) -> None:
    strategy = make(name, fraction_evaluate=1.0)
    run(strategy, Federation(foreign_app.make(mods=[message_size_mod, arrays_size_mod])), rounds=1)
    assert strategy.report is not None and not strategy.report.drops and not strategy.report.untested


@pytest.mark.parametrize("name", strategies.names())
def test_no_text_in_a_message_is_empty(name: str) -> None:
    strategy = strategies.make(name, derive=True)
    assert all(ConfigRecord(strategy.job(round, tests)).count_bytes() > 0 for round in (1, 2) for tests in (True, False))


# ---- Flower's keywords


def test_metrics_of_any_name_are_averaged_by_weight() -> None:
    result = make("fedavg", fraction_evaluate=1.0).start(Federation(foreign_app.make()), foreign_app.initial(), 1)
    trained, tested = result.train_metrics_clientapp[1], result.evaluate_metrics_clientapp[1]
    assert trained["train_loss"] == pytest.approx(trained["client_train_loss"])
    assert trained["each"] == pytest.approx([(11 * 1 + 12 * 2) / 33, 1.0])
    assert dict(tested) == {"f1": pytest.approx((2 * 0.1 + 3 * 0.2) / 6)}
    assert "num-examples" not in trained


def test_a_strange_metric_of_one_client_spoils_nobodys() -> None:
    said: list[dict[str, Any]] = [
        {"num-examples": 1, "loss": 1.0, "list": [1.0, 2.0], "mixed": 1.0, "client": 4},
        {"num-examples": 3, "loss": 2.0, "list": [1.0], "mixed": [1.0], "x": float("nan"), "empty": []},
        {"num-examples": 0, "loss": 99.0},
        {"loss": 99.0},
        {"num-examples": float("nan"), "loss": 99.0},
        {"num-examples": 1, "y": 2**62, "x": 7, "a\nb": 1.0, "z" * 99: 1.0},
    ]
    contents = [RecordDict({"m": MetricRecord(metrics)}) for metrics in said]
    assert dict(foreign.mean_metrics(contents, "num-examples")) == {"loss": 1.75, "y": 2.0**62, "x": 7.0}
    assert not foreign.mean_metrics([], "num-examples")


def test_aggregation_functions_are_given_the_replies_and_their_result_is_passed_on() -> None:
    seen: list[tuple[int, str, set[str]]] = []

    def mine(contents: list[RecordDict], key: str) -> MetricRecord:
        seen.append((len(contents), key, {name for content in contents for name in content}))
        return MetricRecord({"mine": float(len(seen))})

    strategy = make(
        "ffa_lora", fraction_evaluate=1.0, train_metrics_aggr_fn=mine, evaluate_metrics_aggr_fn=mine, min_success=0.1
    )
    grid = Federation(foreign_app.make(careless=lambda client: client == 2))
    result = strategy.start(grid, foreign_app.initial(), 1)
    assert seen == [(2, "num-examples", {"mine", "said"}), (3, "num-examples", {"said"})]  # of whom is merged
    assert result.train_metrics_clientapp[1]["mine"] == 1.0 and "update_norm" in result.train_metrics_clientapp[1]
    assert dict(result.evaluate_metrics_clientapp[1]) == {"mine": 2.0}


def test_keys_of_the_records_and_a_weight_that_is_no_number_of_examples() -> None:
    strategy = make("fedavg", arrayrecord_key="model", configrecord_key="asked", weighted_by_key="worth")
    grid = Federation(foreign_app.make(keys=("model", "asked", "worth")))
    history = run(strategy, grid, rounds=1, train_config=ConfigRecord({"lr": 0.1}))
    assert all(set(message.content) == {"model", "asked"} and message.content["asked"]["lr"] == 0.1 for message in grid.seen)
    sent = [messages.arrays_of(reply["mine"]) for reply in grid.replies()]
    p = np.array([0.25, 0.5, 0.75]) / 1.5
    for key, array in history[1].items():
        assert array == pytest.approx(sum(w * arrays[key] for w, arrays in zip(p, sent, strict=True)), abs=1e-6)


@pytest.mark.parametrize("most", [0.34, 0.4, 0.5])
def test_a_cap_holds_for_weights_of_any_kind(most: float) -> None:
    updates = [Update(client, weight, {}) for client, weight in enumerate((0.2, 0.3, 7.5))]
    p = shares(capped(updates, most))
    assert p.max() == pytest.approx(max(most, 1 / 3), rel=1e-5) and p[0] <= p[1] <= p[2]


def test_fractions_and_least_numbers_of_nodes() -> None:
    def counts(**keywords: Any) -> tuple[int, int, set[int]]:
        """Messages of training and of testing in a round, and the nodes that tested in two rounds."""
        grid = Federation(foreign_app.make(), clients=10)
        make("fedavg", **keywords).start(grid, foreign_app.initial(), 2)
        tested = {message.metadata.dst_node_id for message in grid.seen if message.metadata.message_type == "evaluate"}
        return len(grid.sent()) // 2, len(grid.sent("evaluate")) // 2, tested

    assert counts(fraction_train=0.4, fraction_evaluate=0.3)[:2] == (4, 3)
    assert counts(fraction_train=0.1, min_train_nodes=3)[:2] == (3, 0)
    tests = counts(fraction_train=0.1, fraction_evaluate=0.1, min_evaluate_nodes=4)
    assert tests[:2] == (2, 4) and len(tests[2]) > 4  # Flower's min_train_nodes is 2; rounds draw anew
    assert tests == counts(fraction_train=0.1, fraction_evaluate=0.1, min_evaluate_nodes=4)
    assert counts(fraction_train=0.0, fraction_evaluate=1.0)[:2] == (0, 10)


@pytest.mark.parametrize("least", ["min_train_nodes", "min_evaluate_nodes", "min_available_nodes"])
def test_more_nodes_than_come_are_waited_for(least: str) -> None:
    with pytest.raises(RunError, match=r"3 of 4 nodes came online in 0\.3 s"):
        run(make("fedavg", fraction_evaluate=1.0, patience=0.3, **{least: 4}), Federation(foreign_app.make()), rounds=1)


# ---- a strategy of one's own


class Mine(Base):
    """Declares nothing that has a default."""

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        p = shares(updates)
        merged = {name: lowrank.mean(pairs, p) for name, pairs in layers(updates).items()}
        return replace(state, adapters=merged)


def test_a_strategy_that_declares_nothing_trains_and_is_listed(small, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(strategies._CLASSES, "mine", Mine)
    monkeypatch.setattr(Mine, "name", "mine")
    history = run(make("mine"), Federation(foreign_app.make()))
    assert same(history[2], run(make("fedavg"), Federation(foreign_app.make()))[2])
    strategy, _, states = play_own(small(rounds=1, **settings("mine")))
    assert strategy.report is not None and len(states) == 2
    assert cli.main(DOCS.parent / "configs", ["--list"]) == 0
    assert re.search(r"mine +.*AB.*biased", capsys.readouterr().out)


def test_what_moves_into_the_base_is_declared() -> None:
    """`needs` rests on it."""
    for name in strategies.names():
        source = Path(str(__import__(f"strategies.{name}", fromlist=["x"]).__file__)).read_text()
        assert strategies.strategy_class(name).corrects == ("base_correction=" in source)


# ---- the documentation


def test_the_table_says_what_works_strategy_by_strategy() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \|", (DOCS / "extending.md").read_text(), re.MULTILINE)
    assert dict(rows) == {name: "yes" if name in PLAIN else "no" for name in strategies.names()}


def test_the_app_in_the_documentation_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    section = (DOCS / "extending.md").read_text().split("## In your own Flower app")[1]
    printed = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert printed
    app: dict[str, Any] = {}
    exec(printed[1], app)
    grid = Federation(app["client"], clients=4)
    app["server"](grid, Context(1, 1, {}, RecordDict(), {}))
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0
    assert len(grid.sent()) == 20 and len(grid.replies()) == 20
