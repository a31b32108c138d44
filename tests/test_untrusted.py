"""What comes from outside: a damaged reply is a named drop of who was asked, and nothing else of the round changes."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

import strategies
from fedlora import untrusted
from fedlora.arrays import messages
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.arrays.sums import Sum
from fedlora.check import RunError
from fedlora.server import inbox, wire
from fedlora.server.updates import capped, shares, too_long
from fedlora.untrusted import Malformed
from tests.fuzz import mutate
from tests.fuzz.replies import CHECKED, MANY, Hostile, part, play
from tests.test_rounds import (
    B,
    StubGrid,
    changed,
    every_strategy,
    honest,
    initial,
    make,
    outside_of_flower,  # noqa: F401
    poisoned,
    with_failures,
)

# ---- damaged replies; `python -m tests.fuzz replies` sends many more


@every_strategy
@pytest.mark.parametrize("encodes", ["none", "top_k"])
def test_damaged_replies_are_named_drops(name: str, encodes: str) -> None:
    """Clients 0 to 18 of 40 send what they like; whoever is dropped is one of them, and the state stays a model."""
    if strategies.strategy_class(name).two_phase and encodes != "none":
        pytest.skip("its clients send no changes")
    strategy = make(name, min_available_nodes=MANY, encodes=("none", encodes, 0.1), **CHECKED)
    came = play(strategy, Hostile(np.random.default_rng(len(name)), honest(), kinds=("train", "evaluate")), 6)
    assert came["named drops"] > 40 and came["tests left out"]


def test_damaged_replies_to_secure_sums_and_to_the_roll_call(monkeypatch) -> None:
    with part(None) as case:  # type: ignore[arg-type]
        came = sum((case(seed) for seed in (0, 2, 3, 14)), Counter())
    assert came["named drops"] > 100 and came["sums that ended by a sentence"] and came["refused at the roll call"]


@pytest.mark.parametrize("kind", ["<f8", "<f2", "<i8", "|b1"])
def test_an_answer_of_another_type_of_numbers_costs_nobody_else(kind: str) -> None:
    """The first sketch, in float64, made a basis of float64, which every other client then refused."""
    others = honest()

    def client(number: int, message: Message) -> RecordDict | None:
        content = others(number, message)
        if number == 0 and message.metadata.message_type in ("train.sketch", "train.project") and content is not None:
            arrays = messages.arrays_of(content.array_records["arrays"])
            content["arrays"] = messages.record({name: array.astype(kind) for name, array in arrays.items()})
        return content

    strategy = make("fedask")
    strategy.start(StubGrid(client), initial(), 1, train_config=ConfigRecord({messages.EXPERIMENT: '{"seed": 0}'}))
    assert not strategy.report.drops and {pair.B.dtype.str for pair in strategy.state.adapters.values()} == {"<f4"}


# ---- the parser


def sent(data: bytes, stype: str = "numpy.ndarray") -> ArrayRecord:
    return ArrayRecord({"x": Array("float32", (2,), stype, data)})


def npy(header: str, body: bytes = bytes(8)) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
BAD = {
    "no bytes": b"",
    "a zip": b"PK\x03\x04" + bytes(30),
    "a pickle": b"\x80\x04]\x94.",
    "version 2": npy(GOOD).replace(b"\x01\x00", b"\x02\x00", 1),
    "objects": npy(GOOD.replace("<f4", "|O")),
    "complex": npy(GOOD.replace("<f4", "<c8")),
    "long double": npy(GOOD.replace("<f4", "<f16")),
    "an expression": npy(GOOD.replace("(2,)", "(1+1,)")),
    "a negative axis": npy(GOOD.replace("2", "-2")),
    "too many bytes": npy(GOOD, bytes(9)),
    "too few": npy(GOOD, bytes(7)),
    "gigabytes": npy(GOOD.replace("2", "99999999999")),
    "empty and too large": npy(GOOD.replace("(2,)", f"(0, {10**17}, {10**17})"), b""),
    "too many axes": npy(GOOD.replace("(2,)", f"({'1, ' * 40})"), bytes(4)),
    "a header of a megabyte": npy(GOOD + " " * 60_000),
    "a header beyond the end": b"\x93NUMPY\x01\x00\xff\xff" + GOOD.encode(),
}


@pytest.mark.parametrize("case", BAD)
def test_bytes_that_hold_no_array_are_malformed(case: str) -> None:
    tracemalloc.start()
    with pytest.raises(Malformed, match=r"^x "):
        untrusted.arrays(sent(BAD[case]), 10**6)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_records_that_are_too_large_or_of_another_kind_are_malformed() -> None:
    assert untrusted.arrays(sent(npy(GOOD)), 10**6)["x"].tolist() == [0, 0]
    assert untrusted.arrays(sent(npy(GOOD.replace("<f4", "|b1"), b"\x00\x02")), 10**6)["x"].tolist() == [False, True]
    for record, most in ((sent(npy(GOOD)), 10), (sent(npy(GOOD), "pickle"), 10**6), (sent(npy(GOOD), "x" * 10**6), 10**6)):
        with pytest.raises(Malformed) as error:
            untrusted.arrays(record, most)
        assert len(str(error.value)) < 200
    with pytest.raises(Malformed, match="is a name of 1000 characters"):
        untrusted.arrays(ArrayRecord({"n" * 1000: Array(np.zeros(1))}), 10**6)
    with pytest.raises(ValueError, match="sent twice"):
        messages.sort({"q.lora_A.weight": np.zeros(1), "q.lora_A": np.zeros(1)})


def test_ten_thousand_damaged_arrays_are_malformed_or_arrays() -> None:
    rng, whole = np.random.default_rng(0), Array(np.arange(12, dtype=np.float32).reshape(3, 4)).data
    malformed = 0
    for _ in range(10_000):
        try:
            (array,) = untrusted.arrays(sent(mutate.data(whole, rng)), 10**6).values()
            assert array.nbytes <= 10**3
        except Malformed:
            malformed += 1
    assert 5_000 < malformed < 10_000


@pytest.mark.parametrize("value", [True, None, "1", [1], [], float("nan"), float("inf"), -1, 11, 10**400])
def test_what_is_no_number_in_range(value: object) -> None:
    for read in (untrusted.number, untrusted.count):
        with pytest.raises(Malformed, match="which is not a"):
            read(value, 0, 10)  # type: ignore[operator]


def test_numbers_and_text() -> None:
    assert untrusted.number(3, 0, 10) == 3.0 and untrusted.count(3.0, 0, 10) == 3
    with pytest.raises(Malformed, match=r"0\.5, which is not a whole number from 0 to 10"):
        untrusted.count(0.5, 0, 10)
    assert untrusted.text("a\x1b[2Jb\nc\u202ed σ") == "a?[2Jb c?d σ"
    assert untrusted.text("x" * 10**6) == "x" * 200 + "…"


# ---- foreign clients


class Odd(StubGrid):
    """Client 2 answers messages of a kind with this content."""

    def __init__(self, content: RecordDict, kind: str = "train") -> None:
        super().__init__(lambda k, m: content if k == 2 and m.metadata.message_type == kind else honest("AB")(k, m))


@pytest.mark.parametrize(
    ("client", "reason"), [([1], "client [1], which"), (2.5, "client 2.5, which"), (float("nan"), "client nan, which")]
)
def test_a_client_that_is_no_number_is_dropped(client: Any, reason: str) -> None:
    metrics = MetricRecord({messages.CLIENT: client, messages.EXAMPLES: 3})
    strategy = make("fedavg")
    strategy.start(Odd(RecordDict({"arrays": ArrayRecord(), "metrics": metrics})), initial(), 1)
    assert reason in strategy.report.drops[2]
    strategy = make("fedavg", min_available_nodes=4)
    strategy.start(Odd(RecordDict({"metrics": metrics}), "query"), initial(), 1)
    assert reason in strategy.report.refused[102] and strategy.report.cohort == [0, 1, 3, 4]


@pytest.mark.parametrize("accuracy", [[0.5], 1.5, -0.1, float("nan")])
def test_an_accuracy_outside_its_range_is_left_out_and_named(accuracy: Any) -> None:
    content = RecordDict({"metrics": MetricRecord({messages.EXAMPLES: 3, "accuracy": accuracy})})
    strategy = make("fedavg", fraction_evaluate=1.0)
    strategy.start(Odd(content, "evaluate"), initial(), 1)
    assert strategy.report.client_accuracy == {1: 0.1, 3: 0.3, 4: 0.4}
    assert strategy.report.untested[2].startswith("its accuracy is ")


def test_an_accuracy_is_that_of_the_client_that_was_asked() -> None:
    """Whoever it names in its reply to a grid that counts messages; and once, however many records it sends."""
    metrics = MetricRecord({messages.EXAMPLES: 3, "accuracy": 1.0, messages.CLIENT: 4})
    strategy = make("fedavg", fraction_evaluate=1.0)
    strategy.start(Odd(RecordDict({"a": metrics, "b": metrics}), "evaluate"), initial(), 1)
    assert strategy.report.client_accuracy == {1: 0.1, 3: 0.3, 4: 0.4}
    assert strategy.report.untested == {2: "it says that it is client 4 now; start the run again"}


# ---- weights and norms


def test_more_examples_than_in_the_roll_call_drop_who_claims_them() -> None:
    others = honest("AB")

    def client(number: int, message: Message) -> RecordDict | None:
        content = others(number, message)
        if message.metadata.message_type == "query" and content is not None:
            content["metrics"][messages.EXAMPLES] = 12
        return content

    strategy = make("fedavg")
    strategy.start(StubGrid(client), initial(), 1)
    assert strategy.report.drops == {
        client: f"it claims {10 + client} examples and told 12 in the roll call; start the run again" for client in (3, 4)
    }


def test_shares_are_capped() -> None:
    state = messages.state_of(initial(), 1.0)

    def p(examples: list[int], most: float) -> list[float]:
        updates = [Update(k, n, state.adapters) for k, n in enumerate(examples)]
        return list(np.round(shares(capped(updates, most)), 4))

    assert p([10, 20, 30, 10**9], 1.0)[-1] == 1.0
    assert p([10, 20, 30, 10**9], 0.5) == [0.0833, 0.1667, 0.25, 0.5]  # the others as among themselves
    assert p([100, 100, 100, 100], 0.3) == [0.25] * 4
    assert p([5, 7, 10**9], 0.1) == [0.3333] * 3  # less than one of three cannot be had
    assert p([7], 0.1) == [1.0]


def test_max_weight_bounds_what_a_claim_of_a_billion_does() -> None:
    liar = changed(lambda arrays: None, examples=10**9)
    for most, share in ((1.0, 1.0), (0.4, 0.4)):
        strategy = make("fedavg", max_weight=most)
        strategy.start(StubGrid(with_failures({4: liar})), initial(), 1)
        head = strategy.state.dense["head"][0]  # client k adds k to it: Σ p_k k, the others at 10 … 13 examples
        others = sum(k * (10 + k) for k in range(4)) / 46
        assert head == pytest.approx(share * 4 + (1 - share) * others, rel=1e-2)


@pytest.mark.filterwarnings("ignore:overflow")
@every_strategy
@pytest.mark.parametrize("value", [1e30, -3e38])
def test_a_finite_number_that_would_spoil_the_state_drops_who_sent_it(name: str, value: float) -> None:
    strategy = make(name)
    if strategy.two_phase:
        pytest.skip("answers are bounded in test_damaged_replies_are_named_drops")
    array = B if "R" not in strategy.trains else messages.rotation("model.query")
    strategy.start(StubGrid(with_failures({2: poisoned(array, value)})), initial(name), 1)
    assert list(strategy.report.drops) == [2] and "its update has norm " in strategy.report.drops[2]


def test_the_length_of_an_update_is_held_against_the_lower_median() -> None:
    assert too_long({0: 1.0, 1: 1e30}, 5.0, 100.0).keys() == {1}
    assert too_long({0: 1.0, 1: 99.0, 2: 101.0}, 5.0, 100.0) == {}  # the median is 99
    assert too_long({0: 0.0, 1: 0.0, 2: 4.9}, 5.0, 100.0) == {}  # no longer than the state
    assert too_long({0: 0.0, 1: 0.0, 2: 5.1}, 5.0, 100.0).keys() == {2}
    assert too_long({0: 499.0}, 5.0, 100.0) == {} and too_long({0: 501.0}, 5.0, 100.0).keys() == {0}
    assert too_long({0: 1.0, 1: float("inf")}, 5.0, float("inf")) == {} == too_long({}, 5.0, 100.0)


def test_a_merge_that_is_not_finite_ends_the_round_and_leaves_the_state(monkeypatch) -> None:
    strategy = make("fedavg")
    strategy.optimizer = lambda before, merged, sends: ServerState(
        {layer: Pair(pair.A, np.full_like(pair.B, np.inf)) for layer, pair in merged.adapters.items()}, merged.dense
    )
    grid = StubGrid(honest("AB"))
    with pytest.raises(RunError, match=r"round 1: the merged model.query.lora_B.weight has numbers that are not finite"):
        strategy.start(grid, initial(), 1)
    assert all(np.isfinite(pair.B).all() for pair in strategy.state.adapters.values())


# ---- sums


def test_a_sum_is_taken_from_this_program_s_own_clients_only(monkeypatch) -> None:
    for module in (wire, inbox):
        monkeypatch.setattr(module, "MANY", 2)
    state, forged = messages.state_of(initial(), 1.0), Sum()
    forged.add({name: 1e6 + array for name, array in messages.named(state.adapters, state.dense).items()}, 1)
    content = RecordDict({"sum": forged.record(), "metrics": MetricRecord({messages.EXAMPLES: 1})})
    grid, strategy = Odd(content), make("fedavg", derive=True)
    strategy.start(grid, initial(), 1)
    assert list(strategy.report.drops) == [2] and "is missing" in strategy.report.drops[2]
    for damage in (
        lambda arrays: arrays.update({"high/head": np.full(3, np.nan)}),
        lambda arrays: arrays.update({"high/x": np.zeros(3)}),
        lambda arrays: arrays.pop("low/head"),
        lambda arrays: arrays.update({"low/head": np.zeros(4)}),
        lambda arrays: arrays.update({"low/head": np.zeros(3, np.float32)}),
    ):
        arrays = messages.arrays_of(forged.record())
        damage(arrays)  # type: ignore[no-untyped-call]
        own = Odd(RecordDict({"sum": messages.record(arrays), "metrics": MetricRecord({messages.EXAMPLES: 1})}))
        own.own_clients = True  # type: ignore[attr-defined]
        with pytest.raises(RunError, match="a worker's sum is damaged: a sum has"):
            make("fedavg", derive=True).start(own, initial(), 1)


def test_a_large_cohort_of_devices_is_held_until_all_lengths_are_known(monkeypatch) -> None:
    for module in (wire, inbox):
        monkeypatch.setattr(module, "MANY", 2)
    ends = []
    for client in (poisoned(B, 1e30), lambda number, message: None):
        strategy = make("fedavg")
        strategy.start(StubGrid(with_failures({2: client}), shuffle=3), initial(), 1)
        ends.append((list(strategy.report.drops), strategy.state.adapters["model.query"].B.tobytes()))
    assert ends[0] == ends[1]
