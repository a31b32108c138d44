"""aggregation=secure in runs: the model of plain sums to the documented step, and nobody's own changes in any message."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

import strategies
from clients import asked
from fedlora.app import experiment
from fedlora.app.assembly import make_strategy
from fedlora.arrays import messages
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState
from fedlora.check import ConfigError, RunError
from fedlora.compute import workbench
from fedlora.server import secure
from tests.test_experiment import rows_of
from tests.test_rounds import StubGrid, honest, make, outside_of_flower, trained  # noqa: F401
from tests.test_rounds import play as play_stub
from tests.test_wire import bits, play

LINEAR = [name for name in strategies.names() if strategies.strategy_class(name).linear]
ROUND = ["train", "train.advertise", "train.share", "train.mask", "train.unmask"]
FEW: dict[str, Any] = {"clients": 4, "clients_per_round": 4, "train__steps": 1, "train__batch_size": 4}
NAMES = {
    "train": set(), "train.advertise": {"keys", "proof"}, "train.share": {"shares", "digests"},
    "train.mask": {"masked", "opened"}, "train.unmask": {"shares"},
}  # fmt: skip


def settings(name: str, **more: Any) -> dict[str, Any]:
    personal = bool(strategies.strategy_class(name).personal)
    return {"strategy": {"name": name}, "evaluate__holdout": 0.2 * personal} | FEW | more


def wide(state: ServerState) -> np.ndarray:
    """All that is trained, products included, as one vector."""
    adapters, _ = messages.fold(state.adapters, state.dense)
    parts = [pair.B.astype(float) @ pair.A for pair in adapters.values()] + [pair.A for pair in state.adapters.values()]
    return np.concatenate([part.ravel() for part in (*parts, *state.dense.values())])


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("head", [False, True])
def test_the_model_is_that_of_plain_sums_to_a_step(small, name, head) -> None:
    """Of one round, K · step / (2N) a coordinate; where a merge multiplies factors it grows with their size."""
    config = small(rounds=1, adapter__train_head=head, **settings(name, train__steps=2))
    hidden = small(rounds=1, adapter__train_head=head, **settings(name, train__steps=2, aggregation="secure"))
    plain, (strategy, grid, states) = play(config)[2], play(hidden)
    examples = [len(workbench.build(config).examples_of(client)[0]) for client in range(4)]
    bound = 8.0
    step = bound * max(examples) / ((2**31 - 1) // 4)
    error = 4 * step / (2 * sum(examples))
    assert np.abs(wide(states[-1]) - wide(plain[-1])).max() <= 10 * error + 5e-6
    assert np.abs(wide(states[-1]) - wide(states[0])).max() > 1e-4
    assert strategy.report.drops == {}
    kinds = list(dict.fromkeys(m.metadata.message_type for m in grid.sent if m.metadata.message_type.startswith("train")))
    assert kinds == ROUND


def test_the_step_by_hand() -> None:
    """One coordinate, a bound so wide that the step shows: what is merged is the rounded sum."""
    strategy, expected = make("ffa_lora"), make("ffa_lora")
    strategy.sum_of = secure.SecureMean(4096.0)
    plain, found = (play_stub(one, StubGrid(silent()), rounds=1) for one in (expected, strategy))
    assert plain[0] == found[0] and plain[1] != found[1]
    terms = [10 + client for client in range(5)]
    step = 4096.0 * max(terms) / ((2**31 - 1) // 5)
    assert expected.state is not None and strategy.state is not None
    for layer, pair in expected.state.adapters.items():
        error = np.abs(strategy.state.adapters[layer].B.astype(float) - pair.B)
        assert 0 < error.max() <= 5 * step / (2 * sum(terms)) + 1e-6


def silent():
    """Honest clients that keep what they changed where the round asks for it, as this project's do."""
    others, kept = honest(), {}

    def client(number: int, message: Message) -> RecordDict | None:
        kind = message.metadata.message_type
        if not kind.startswith("train"):
            return others(number, message)
        job, arrays = message.content.config_records[messages.CONFIG], message.content.array_records[messages.ARRAYS]
        if not job[messages.SILENT]:
            return others(number, message)
        if kind == "train":
            content, before = trained(number, message), messages.arrays_of(arrays)
            moved = {k: a - before[k] for k, a in messages.arrays_of(content.array_records["arrays"]).items()}
            counted = {messages.EXAMPLES: np.array([10 + number])}
            kept[number] = RecordDict({"trained": messages.record(moved | counted)})
            content["arrays"] = messages.record({})
            return content
        answer = asked.answer(kind.removeprefix("train."), number, kept[number], job, messages.arrays_of(arrays))
        return RecordDict({"arrays": messages.record(answer)})

    return client


@pytest.mark.parametrize("name", LINEAR)
def test_no_message_of_a_client_holds_its_changes(small, name) -> None:
    """Replies hold keys, sealed shares and masked words alone, and what is kept is gone when the sum is known."""
    from clients import start

    meant: list[np.ndarray] = []
    changed = start._changed

    def spy(job, begun, own):
        made = changed(job, begun, own)
        meant.extend(made.values())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "_changed", spy)
        strategy, grid, _ = play(small(rounds=2, **settings(name, aggregation="secure", train__steps=2)))
    for reply in grid.got:
        kind = reply.metadata.message_type
        if kind in NAMES:
            arrays = messages.arrays_of(reply.content[messages.ARRAYS])
            assert set(arrays) == NAMES[kind] and all(array.dtype in (np.uint8, np.uint32) for array in arrays.values())
    everything = b"".join(
        array.data for m in grid.got for record in m.content.array_records.values() for array in record.values()
    )
    assert any(array.any() for array in meant)
    assert not any(array.tobytes() in everything for array in meant if array.any())
    kept = {"personal"} if strategy.personal else set()
    assert all(set(state) == kept for state in grid.states.values())


@pytest.mark.parametrize("examples", [10**12, 2**32 // 5 + 1, float("inf"), float("nan"), [5.0], -3])
def test_examples_that_no_sum_can_count_cost_who_says_them(examples) -> None:
    """One client of five says so; the others are merged, as if it had not been there."""
    others, strategy, expected = silent(), make("ffa_lora"), make("ffa_lora")
    strategy.sum_of, expected.sum_of = secure.SecureMean(8.0), secure.SecureMean(8.0)

    def liar(number: int, message: Message) -> RecordDict | None:
        reply = others(number, message)
        if number == 2 and message.metadata.message_type == "train" and reply is not None:
            reply["metrics"][messages.EXAMPLES] = examples
        return reply

    def absent(number: int, message: Message) -> RecordDict | None:
        return None if number == 2 and message.metadata.message_type == "train" else others(number, message)

    found, wanted = play_stub(strategy, StubGrid(liar), rounds=1), play_stub(expected, StubGrid(absent), rounds=1)
    assert strategy.report is not None and strategy.report.drops.keys() == {2}
    assert found == wanted


def test_of_a_cohort_of_which_two_are_left_nothing_is_summed(small, monkeypatch) -> None:
    """Each of the two would have the other's changes; changes that are private by themselves may be summed."""
    answer = asked.answer

    def broken(asked_for, client, *rest):
        if client == 2:
            raise RuntimeError("the battery is empty")
        return answer(asked_for, client, *rest)

    monkeypatch.setattr(asked, "answer", broken)
    few = {"clients": 3, "clients_per_round": 3, "aggregation": "secure"}
    with pytest.raises(RunError, match="asks for threshold=3 clients, and only 2 of 3 answered 'advertise'"):
        play(small(rounds=1, **settings("ffa_lora", **few)))
    private = {"privacy__name": "record", "privacy__noise_multiplier": 0.5}
    config = small(rounds=1, **settings("ffa_lora", **few, **private))
    assert experiment.run(config, 0.0)["status"] == "finished"


def test_a_client_asks_for_the_threshold_that_its_privacy_needs(small) -> None:
    """Whatever the server says: a threshold of 2 without privacy is refused by all of them."""
    strategy = {"strategy": {"name": "ffa_lora"}}
    config = small(rounds=1, clients=4, clients_per_round=4, train__steps=1, aggregation="secure", **strategy)
    with pytest.raises(RunError, match="asks for threshold=2 clients, and only 0 of 3 answered 'advertise'"):
        play(config, sum_of=TwoOfThree(8.0))


class TwoOfThree(secure.SecureMean):
    """A server that sums three clients at the threshold of two."""

    def __init__(self, bound: float) -> None:
        super().__init__(bound, least=2)

    def __call__(self, state, updates, *rest):
        return super().__call__(state, updates[:3], *rest)


@pytest.mark.parametrize("action", ["advertise", "share", "mask"])
def test_a_client_that_drops_out_costs_its_own_changes_only(small, monkeypatch, action) -> None:
    """What is merged is the mean of the others, as if it had failed in training."""
    answer = asked.answer

    def broken(asked_for, client, *rest):
        if client == 2 and asked_for == action:
            raise RuntimeError("the battery is empty")
        return answer(asked_for, client, *rest)

    monkeypatch.setattr(asked, "answer", broken)
    config = small(rounds=1, **settings("ffa_lora", aggregation="secure"))
    strategy, _grid, states = play(config)
    assert strategy.report.drops == {2: "RuntimeError: the battery is empty"}
    begun, updates = states[0], []
    full = play(small(rounds=1, **settings("ffa_lora")))[1]
    for arrays, reply in zip(full.up(), [r for r in full.got if r.metadata.message_type == "train"], strict=True):
        client, examples = (int(reply.content["metrics"][key]) for key in ("client", "num-examples"))
        if client != 2:
            adapters = {x: Pair(pair.A, arrays[f"{x}.lora_B.weight"]) for x, pair in begun.adapters.items()}
            updates.append(strategies.Update(client, examples, adapters))
    expected = strategies.make("ffa_lora").merge(begun, updates, 1)
    for layer, pair in expected.adapters.items():
        np.testing.assert_allclose(states[-1].adapters[layer].B, pair.B, atol=1e-7)
        assert pair.B.any()


def test_a_client_beyond_the_bound_drops_out(small) -> None:
    config = small(rounds=1, **settings("ffa_lora", aggregation="secure", server__secure_bound=1e-9))
    with pytest.raises(RunError, match="the secure sum asks for threshold=3 clients, and only 0 of 4 answered 'mask'"):
        play(config)


def test_too_few_end_the_run_in_one_sentence(small, monkeypatch) -> None:
    answer = asked.answer

    def broken(asked_for, client, *rest):
        if client < 2:
            raise RuntimeError("the battery is empty")
        return answer(asked_for, client, *rest)

    monkeypatch.setattr(asked, "answer", broken)
    config = small(rounds=1, **settings("ffa_lora", aggregation="secure"))
    with pytest.raises(RunError, match="the secure sum asks for threshold=3 clients, and only 2 of 4 answered 'advertise'"):
        experiment.run(config, 0.0)


def test_runs_are_equal_to_the_bit_whatever_the_keys(small) -> None:
    config = small(rounds=2, **settings("fedsvd", aggregation="secure"))
    assert bits(play(config)[2][-1]) == bits(play(config)[2][-1])


def test_a_whole_run_and_its_bytes(small) -> None:
    more = {"privacy__name": "record", "privacy__noise_multiplier": 0.5, "server__optimizer": "momentum", "save_merged": True}
    config = small(rounds=2, **settings("ffa_lora", aggregation="secure", **more))
    summary = experiment.run(config, 0.0)
    rows = rows_of(config)[1:]
    assert summary["status"] == "finished" and all(row["drops"] == {} for row in rows)
    words = 4 * (8 * 64 * 8 + 1) + 128  # B of each layer, and the number of examples
    keys, sealed, opened = 2 * (3 * 32 + 128), 4 * (60 + 2 * 16) + 2 * 128, 4 + 128 + 4 * 16 + 128
    assert all(row["bytes_up"] == 4 * (words + keys + sealed + opened) for row in rows)


@pytest.mark.parametrize("name", sorted(set(strategies.names()) - set(LINEAR)))
def test_strategies_that_need_every_client_are_refused(small, name) -> None:
    with pytest.raises(ConfigError, match=f"aggregation=secure does not go with strategy={name}, whose server step needs"):
        make_strategy(small(strategy={"name": name}, aggregation="secure"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"aggregation": "hidden"}, "aggregation=hidden is not known"),
        ({"aggregation": "secure", "server__mean": "median"}, "aggregation=secure does not go with server.mean=median"),
        ({"aggregation": "secure", "compression__up": "int8"}, "aggregation=secure does not go with compression.up=int8"),
        ({"aggregation": "secure", "privacy__name": "user", "privacy__epsilon": 8.0}, "does not go with privacy=user"),
        ({"aggregation": "secure", "clients_per_round": 2}, "aggregation=secure needs 3 clients a round"),
        (
            {"aggregation": "secure", "clients_per_round": 1, "privacy__name": "record", "privacy__epsilon": 8.0},
            "aggregation=secure needs 2 clients a round, and clients_per_round is 1; raise it",
        ),
        ({"aggregation": "secure", "server__secure_bound": -1.0}, "server.secure_bound=-1.0 is out of range"),
    ],
)
def test_refusals(small, changes, sentence) -> None:
    with pytest.raises(ConfigError) as error:
        small(**changes)
    assert sentence in str(error.value) and "\n" not in str(error.value)
