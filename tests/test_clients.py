"""Local training: schedules, batches, optimisers, and that only what is meant to move does."""

import numpy as np
import pytest
import torch

from clients.task import batches, local_steps, rate
from clients.train import train
from fedlora.compute import workbench
from fedlora.config import TrainConfig


@pytest.mark.parametrize(
    ("schedule", "warmup", "progress", "within", "expected"),
    [
        ("constant", 0.0, (1, 10), 0.0, 1.0),
        ("constant", 0.0, (10, 10), 0.9, 1.0),
        ("linear", 0.0, (1, 10), 0.0, 1.0),
        ("linear", 0.0, (6, 10), 0.0, 0.5),
        ("linear", 0.0, (10, 10), 0.5, 0.05),
        ("cosine", 0.0, (1, 10), 0.0, 1.0),
        ("cosine", 0.0, (6, 10), 0.0, 0.5),
        ("linear", 0.2, (1, 10), 0.0, 0.0),
        ("linear", 0.2, (2, 10), 0.0, 0.5),
        ("linear", 0.2, (3, 10), 0.0, 1.0),
        ("linear", 0.2, (7, 10), 0.0, 0.5),
    ],
)
def test_the_schedule_runs_over_the_whole_run(schedule, warmup, progress, within, expected) -> None:
    assert rate(TrainConfig(schedule=schedule, warmup=warmup), progress, within) == pytest.approx(expected)


@pytest.mark.parametrize(("examples", "size", "steps", "sizes"), [
    (10, 4, 5, [4, 4, 2, 4, 4]), (3, 4, 2, [3, 3]), (8, 4, 2, [4, 4]), (1, 4, 3, [1, 1, 1]),
])  # fmt: skip
def test_batches_pass_over_all_examples_before_any_comes_again(examples, size, steps, sizes) -> None:
    indices = np.arange(100, 100 + examples)
    drawn = list(batches(indices, size, steps, np.random.default_rng(0)))
    assert [len(batch) for batch in drawn] == sizes
    seen = np.concatenate(drawn)
    for start in range(0, len(seen) - examples + 1, examples):
        assert sorted(seen[start : start + examples]) == list(indices)


def test_steps_of_an_epoch_count_the_short_last_batch() -> None:
    assert local_steps(TrainConfig(epochs=2, batch_size=4), 10) == 6
    assert local_steps(TrainConfig(steps=7), 10) == 7


@pytest.mark.parametrize("trains", ["A", "B", "AB"])
def test_only_what_is_trained_moves_and_the_base_never_does(small, trains) -> None:
    bench = workbench.build(small(adapter__train_head=True))
    adapters = {name: pair._replace(B=pair.B + 0.01) for name, pair in bench.model.initial("kaiming", 0).items()}
    bench.model.write(adapters, bench.model.initial_head)
    frozen = {n: p.clone() for n, p in bench.model.peft.named_parameters() if "lora_" not in n and "modules_to_save" not in n}
    head = bench.model.dense()
    train(bench.model, bench.train, bench.shards[0], TrainConfig(steps=2), trains, (1, 1), (0, 0, 1))
    moved = bench.model.adapters()
    for name, pair in adapters.items():
        assert np.array_equal(pair.A, moved[name].A) == ("A" not in trains)
        assert np.array_equal(pair.B, moved[name].B) == ("B" not in trains)
    assert any(not np.array_equal(head[name], array) for name, array in bench.model.dense().items())
    assert all(torch.equal(p, frozen[n]) for n, p in bench.model.peft.named_parameters() if n in frozen)


def test_a_step_of_sgd_by_hand_and_its_clipped_length(small) -> None:
    bench = workbench.build(small())
    start = bench.model.initial("kaiming", 0)
    shard = bench.shards[0][:8]
    moves = {}
    for clip in (None, 0.001):
        bench.model.write(start, {})
        settings = TrainConfig(steps=1, batch_size=8, lr=0.5, max_grad_norm=clip)
        train(bench.model, bench.train, shard, settings, "B", (1, 1), (0, 0, 1))
        moves[clip] = {name: pair.B - start[name].B for name, pair in bench.model.adapters().items()}
    bench.model.write(start, {})
    parameters = bench.model.trainable("B")
    bench.model.peft.train()
    bench.model.forward(bench.train.batch(shard, bench.model.device)).loss.backward()
    for parameter, move in zip(parameters, moves[None].values(), strict=True):
        np.testing.assert_allclose(move, -0.5 * parameter.grad.numpy(), rtol=1e-4, atol=1e-7)
    length = np.sqrt(sum(np.sum(move**2) for move in moves[0.001].values()))
    assert length == pytest.approx(0.5 * 0.001, rel=1e-3)


def test_streams_are_a_clients_and_a_rounds_own(small) -> None:
    bench = workbench.build(small(adapter__dropout=0.3))
    start = bench.model.initial("kaiming", 0)

    def run(streams) -> bytes:
        bench.model.write(start, {})
        torch.manual_seed(len(str(streams)))  # whatever stands in the global generator must not matter
        train(bench.model, bench.train, bench.shards[0], TrainConfig(steps=2), "B", (1, 1), streams)
        return b"".join(pair.B.tobytes() for pair in bench.model.adapters().values())

    assert run((0, 0, 1)) == run((0, 0, 1))
    assert len({run((0, 0, 1)), run((1, 0, 1)), run((0, 1, 1)), run((0, 0, 2))}) == 4
