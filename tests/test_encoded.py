"""Compression in runs: bytes as sent, what was lost is sent later, and it stands beside the A of its round."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import strategies
from clients.start import LEFT, LEFT_AT
from fedlora.app import experiment
from fedlora.app.assembly import make_strategy
from fedlora.arrays import compression, messages
from fedlora.check import ConfigError
from fedlora.compute import workbench
from tests.test_wire import bits, play

METHODS = ("float16", "int8", "int4", "top_k")
SENDERS = [name for name in strategies.names() if not strategies.strategy_class(name).two_phase]
FEW: dict[str, Any] = {"clients_per_round": 2, "train__steps": 1, "train__batch_size": 4}


def run(small, name: str = "fedavg", **changes: Any):
    personal = bool(strategies.strategy_class(name).personal)
    return play(small(strategy={"name": name}, evaluate__holdout=0.2 * personal, **(FEW | changes)))


# ---- bytes


@pytest.mark.parametrize(
    ("method", "each"),
    [("float16", 2 * 512 + 128), ("int8", 12 + 4 * 8 + 512 + 128), ("int4", 12 + 4 * 8 + 256 + 128),
     ("top_k", 12 + (4 + 2) * 51 + 128)],
)  # fmt: skip
def test_bytes_up_by_hand(small, method, each) -> None:
    """Two factors of 8 × 64 in each of 8 layers: shape, scales, codes; of top_k, 51 values and their indices."""
    strategy, grid, _ = run(small, compression__up=method)
    assert [report.bytes_up for report in strategy.reports] == [2 * 16 * each] * 2
    names = {f"{key}|{method}" for key in grid.down()[0]}
    assert all(arrays.keys() == names for arrays in grid.up())
    assert strategy.reports[0].bytes_down == 2 * 16 * (4 * 512 + 128)  # the other way is as it was


@pytest.mark.parametrize(
    ("method", "each"), [("float16", 2 * 512 + 128), ("int8", 12 + 32 + 512 + 128), ("int4", 12 + 32 + 384)]
)
def test_bytes_down_by_hand(small, method, each) -> None:
    strategy, grid, _ = run(small, compression__down=method)
    assert [report.bytes_down for report in strategy.reports] == [2 * 16 * each] * 2
    assert all("|" not in key for arrays in grid.up() for key in arrays)
    assert all(key.endswith(f"|{method}") for arrays in grid.down() for key in arrays)


@pytest.mark.parametrize("name", SENDERS)
@pytest.mark.parametrize(("up", "down"), [("int8", "none"), ("none", "int8"), ("top_k", "float16")])
def test_every_strategy_counts_what_it_sends(small, name, up, down) -> None:
    strategy, grid, states = run(small, name, compression__up=up, compression__down=down)
    assert strategy.report.drops == {}
    plain = run(small, name)[0]
    for way, method in (("bytes_up", up), ("bytes_down", down)):
        counted = sum(getattr(report, way) for report in strategy.reports)
        replies = [reply for reply in grid.got if reply.has_content()]
        assert counted == sum(messages.array_bytes(m.content) for m in (replies if way == "bytes_up" else grid.sent))
        before = sum(getattr(report, way) for report in plain.reports)
        assert (counted < before) == (method != "none") or counted == before == 0 or name == "flora"
    assert bits(states[-1]) != bits(states[0])
    if name == "fedsvd":  # the rotation is small, and a rotation only as long as it is exact
        assert all(not key.endswith("|int8") for arrays in grid.down() for key in arrays if ".lora_R." in key)


# ---- what was lost


def decoded(arrays: dict[str, np.ndarray], like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return compression.decode(arrays, {name: array.shape for name, array in like.items()})


@pytest.mark.parametrize("method", METHODS)
def test_what_encoding_lost_stays_with_the_client_and_is_sent_with_the_next(small, method) -> None:
    """Over all rounds a client has sent what it changed, less what it still keeps: shown with one client and a frozen A."""
    config = small(
        strategy={"name": "ffa_lora"}, clients=1, clients_per_round=1, rounds=4, compression__up=method, train__steps=1
    )
    from clients import start

    meant: dict[str, np.ndarray] = {}
    changed = start._changed

    def spy(job, begun, own):
        made = changed(job, begun, own)
        for key, array in made.items():
            meant[key] = meant.get(key, 0.0) + array.astype(float)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "_changed", spy)
        _, grid, states = play(config)
    left = messages.arrays_of(grid.states[1][LEFT])
    assert any(array.any() for array in left.values())
    for key, array in meant.items():
        sent = sum(decoded(arrays, meant)[key].astype(float) for arrays in grid.up())
        np.testing.assert_allclose(sent + left[key], array, atol=1e-6)
        layer = key.removesuffix(".lora_B.weight")
        np.testing.assert_allclose(states[-1].adapters[layer].B, sent, atol=1e-6)  # B began at zero


def test_a_client_that_is_not_drawn_keeps_it(small) -> None:
    strategy, grid, _ = run(small, "ffa_lora", compression__up="int4", rounds=3)
    drawn = {client for report in strategy.reports for client in report.cohort}
    assert {node - 1 for node in grid.states} == drawn


def test_without_encoding_nobody_keeps_anything(small) -> None:
    assert run(small)[1].states == {}
    assert run(small, compression__down="int8")[1].states.keys() <= {1, 2, 3, 4, 5, 6}  # changes, and nothing lost of them


def test_with_fedsvd_it_turns_with_A(small) -> None:
    """What is left of B stands beside another A in the next round; its product is what counts."""
    from clients import start

    config = small(
        strategy={"name": "fedsvd"}, clients=1, clients_per_round=1, rounds=3, compression__up="int4", train__steps=1
    )
    seen, left_of = [], start._left

    def spy(state, begun, factors):
        found = left_of(state, begun, factors)
        if LEFT in state.array_records:
            seen.append((messages.arrays_of(state[LEFT]), messages.arrays_of(state[LEFT_AT]), found, begun))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "_left", spy)
        play(config)
    assert len(seen) == 2
    for left, at, found, begun in seen:
        for layer, pair in begun.adapters.items():
            b, a = f"{layer}.lora_B.weight", f"{layer}.lora_A.weight"
            assert not np.array_equal(at[a], pair.A) and np.abs(found[b] - left[b]).max() > 1e-6
            np.testing.assert_allclose(found[b] @ pair.A, left[b] @ at[a], atol=1e-6 * np.abs(left[b]).max() + 1e-7)


def test_with_rolora_what_is_left_of_B_outlasts_a_round_of_A(small) -> None:
    config = small(
        strategy={"name": "rolora"}, clients=1, clients_per_round=1, rounds=4, compression__up="int4", train__steps=1
    )
    _, grid, states = play(config)
    left, at = (messages.arrays_of(grid.states[1][key]) for key in (LEFT, LEFT_AT))
    assert {key.split(".")[-2] for key in left} == {"lora_A", "lora_B"}
    for layer, pair in states[3].adapters.items():  # what round 4 began with
        assert np.array_equal(at[f"{layer}.lora_A.weight"], pair.A)


def test_beside_an_A_drawn_anew_it_means_nothing(small) -> None:
    """FLoRA's clients send their changes alone."""
    from clients import start

    with pytest.MonkeyPatch.context() as patch:
        seen = []
        encode = compression.encode_with_feedback
        patch.setattr(
            start.compression, "encode_with_feedback", lambda a, left, *rest: seen.append(left) or encode(a, left, *rest)
        )
        config = small(strategy={"name": "flora"}, clients=1, clients_per_round=1, rounds=3, compression__up="int4")
        play(config)
    assert seen == [{}] * 3


# ---- what it costs, and what is refused


@pytest.mark.parametrize(
    "changes", [{"compression__up": "int8"}, {"compression__down": "float16"}, {"compression__up": "float16"}]
)
def test_accuracy_is_near_that_of_plain_messages(small, changes) -> None:
    plain = experiment.run(small(strategy={"name": "fedavg"}, rounds=4, train__lr=0.1), 0.0)
    found = experiment.run(small(strategy={"name": "fedavg"}, rounds=4, train__lr=0.1, **changes), 0.0)
    assert abs(found["accuracy"] - plain["accuracy"]) < 0.03 and found["loss"] != plain["loss"]
    assert found["loss"] == pytest.approx(plain["loss"], rel=0.05)


def test_a_change_is_added_to_the_exact_state(small) -> None:
    """What is lost on the way down is not lost from the model: clients say what they changed, not where they are."""
    config = small(
        strategy={"name": "fedavg"}, clients=1, clients_per_round=1, rounds=2, compression__down="int4", train__lr=1e-30
    )
    _, _, states = play(config)
    for layer, pair in states[0].adapters.items():
        np.testing.assert_allclose(states[-1].adapters[layer].A, pair.A, atol=1e-12)


def test_together_is_one_by_one(small) -> None:
    ends = [play(small(strategy={"name": "fedavg"}, compression__up="float16", engine__cohort=n))[2][-1] for n in ("1", "4")]
    for layer, pair in ends[0].adapters.items():
        np.testing.assert_allclose(ends[1].adapters[layer].B, pair.B, atol=2e-3 * np.abs(pair.B).max())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"compression__up": "int9"}, "compression.up=int9 is not known; did you mean int"),
        ({"compression__down": "top_k"}, "compression.down=top_k is not known"),
        ({"compression__top_k": 0.0}, "compression.top_k=0.0 is out of range"),
        ({"compression__top_k": 1.5}, "compression.top_k=1.5 is out of range"),
        ({"compression__up": "int8", "strategy": {"name": "fedask"}}, "compression.up=int8 does not go with strategy=fedask"),
        ({"compression__up": "int8", "aggregation": "secure"}, "aggregation=secure does not go with compression.up=int8"),
    ],
)
def test_refusals(small, settings, sentence) -> None:
    with pytest.raises(ConfigError) as error:
        make_strategy(small(**settings))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_unequal_ranks_and_record_level_privacy_go_with_it(small) -> None:
    more = {"adapter__ranks": {2: 0.5, 8: 0.5}, "privacy__name": "record", "privacy__noise_multiplier": 0.5}
    summary = experiment.run(small(strategy={"name": "hetlora"}, compression__up="int8", compression__down="int8", **more), 0.0)
    assert summary["status"] == "finished" and workbench.build(small()).model.rank == 8
