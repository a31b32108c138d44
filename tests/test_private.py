"""DP-SGD on a client: sensitivity, noise, sampling, and that nothing but the mechanism touches the numbers."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from clients.cohort import Member, train_together
from clients.private import Mechanism
from clients.task import Task, poisson, sampling_rate, simulated_key
from clients.train import perform, train
from fedlora import seeds
from fedlora.check import ConfigError, RunError
from fedlora.compute import workbench
from fedlora.compute.dropout import ByRecord
from fedlora.config import Config, PrivacyConfig, TrainConfig
from fedlora.validate import checked


@pytest.fixture
def bench(small):
    return workbench.build(small(adapter__train_head=True))


@pytest.fixture
def plain_draws(monkeypatch) -> None:
    """Private batches drawn as plain ones, so that the two can be compared."""

    def drawn(task):
        settings = dataclasses.replace(task.settings, sampling="poisson")
        return usual(dataclasses.replace(task, mechanism=None, key=None, settings=settings))

    usual = Task.batches
    monkeypatch.setattr(Task, "batches", lambda task: drawn(task) if task.mechanism else usual(task))


def run(bench, mechanism, trains="B", indices=None, streams=(0, 0, 1), start=None, **settings):
    """The change of every trained array over one client's local training, by name, and what was measured."""
    start = start or start_of(bench)
    bench.model.write(start, bench.model.initial_head)
    indices = bench.shards[0] if indices is None else indices
    settings = {"steps": 1, "batch_size": 8, "lr": 1.0} | settings
    measured = train(bench.model, bench.train, indices, TrainConfig(**settings), trains, (1, 1), streams, mechanism)
    moved = {f"{n}.A": p.A - start[n].A for n, p in bench.model.adapters().items()}
    moved |= {f"{n}.B": p.B - start[n].B for n, p in bench.model.adapters().items()}
    moved |= {n: array - bench.model.initial_head[n] for n, array in bench.model.dense().items()}
    return moved, measured


def start_of(bench):
    return {name: pair._replace(B=pair.B + 0.01) for name, pair in bench.model.initial("kaiming", 0).items()}


def vector(adapters, dense) -> np.ndarray:
    arrays = [array for name in sorted(adapters) for array in adapters[name]] + [dense[name] for name in sorted(dense)]
    return np.concatenate([array.ravel() for array in arrays]).astype(np.float64)


def length(moved) -> float:
    return float(np.sqrt(sum(np.sum(array.astype(np.float64) ** 2) for array in moved.values())))


def flat(moved) -> np.ndarray:
    return np.concatenate([array.ravel() for array in moved.values()])


@pytest.mark.parametrize("trains", ["AB", "B"])
@pytest.mark.parametrize("physical", [None, 3])
def test_without_noise_one_record_moves_the_sum_by_at_most_the_clip(bench, trains, physical) -> None:
    """With q = 1 the step is the clipped sum over n; one record more or less must change that sum by at most C."""
    everyone, clip = bench.shards[0][:12], 0.05
    settings = {"batch_size": 12, "physical_batch_size": physical}
    whole, measured = run(bench, Mechanism(0.0, clip), trains, everyone, **settings)
    assert measured["clipped"] > 0.8  # the bound is tested where it binds
    changes = []
    for left_out in range(4):
        rest = np.delete(everyone, left_out)
        without, _ = run(bench, Mechanism(0.0, clip), trains, rest, **settings | {"batch_size": 11})
        changes.append(length({name: 12 * whole[name] - 11 * without[name] for name in whole}))
    assert 0.99 * clip < max(changes) <= clip * (1 + 1e-3)


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "fused"])
@pytest.mark.parametrize("physical", [None, 3])
def test_with_dropout_one_record_moves_the_sum_by_at_most_the_clip(small, fused, physical) -> None:
    """The server may know every mask: one that moves to another record when one is missing moves many gradients."""
    bench = workbench.build(small(adapter__train_head=True, adapter__dropout=0.5))
    everyone, clip, start = bench.shards[0][:12], 0.05, start_of(bench)

    def total(indices) -> np.ndarray:
        """The clipped sum of a client's step; fused, another one shares its pass."""
        settings = TrainConfig(steps=1, batch_size=len(indices), lr=1.0, physical_batch_size=physical)
        mechanism, key = Mechanism(0.0, clip), bytes(32)
        task = Task(indices, settings, "AB", (1, 1), (0, 0, 1), mechanism, key)
        if fused:
            other = Task(bench.shards[1][:5], settings, "AB", (1, 1), (0, 1, 1), mechanism, bytes(31) + b"1")
            team = [Member(each, start, bench.model.initial_head, bench.model.scale) for each in (other, task)]
            ends = train_together(bench.rows, bench.train, team)
            return len(indices) * (vector(ends[1].adapters, ends[1].dense) - vector(start, bench.model.initial_head))
        bench.model.write(start, bench.model.initial_head)
        perform(task, bench.model, bench.train)
        moved = vector(bench.model.adapters(), bench.model.dense()) - vector(start, bench.model.initial_head)
        return len(indices) * moved

    whole = total(everyone)
    changes = [np.linalg.norm(whole - total(np.delete(everyone, left_out))) for left_out in range(4)]
    assert 0.99 * clip < max(changes) <= clip * (1 + 1e-3)


def test_masks_are_a_records_own(bench) -> None:
    """Not those of its batch mates, its place, its padding; and each step, call and key has others."""

    def masks(records, step=0, call=1, positions=4, key=bytes(32)) -> np.ndarray:
        mask = torch.zeros(len(records), positions, 50)
        ByRecord(key, step, np.array(records)).fill(mask, 0.25, call)
        return mask.numpy()

    usual = masks([3, 8, 5])
    assert np.array_equal(masks([5, 3]), usual[[2, 0]])
    assert np.array_equal(masks([8], positions=6)[:, :4], usual[[1]])
    others = [masks([3], step=1), masks([3], call=2), masks([3], key=b"1" * 32), usual[[1]]]
    for other in others:
        assert abs(np.corrcoef(other.ravel(), usual[0].ravel())[0, 1]) < 0.3
    many = masks(range(200))
    assert set(np.unique(many)) == {0.0, 1.0} and many.mean() == pytest.approx(0.75, abs=0.01)
    with pytest.raises(RunError, match="a layer sees 2 rows for 3 records"):
        ByRecord(bytes(32), 0, np.arange(3)).fill(torch.zeros(2, 5), 0.5, 1)


def test_dropout_acts_in_private_steps_and_a_step_has_its_own_masks(small) -> None:
    bench = workbench.build(small(adapter__dropout=0.5))
    indices, mechanism = bench.shards[0][:8], Mechanism(0.0, 1e9)
    dropped, again = (run(bench, mechanism, "B", indices, batch_size=8)[0] for _ in range(2))
    other, _ = run(bench, mechanism, "B", indices, batch_size=8, streams=(0, 0, 2))
    bench = workbench.build(small(adapter__dropout=0.0))
    whole, _ = run(bench, mechanism, "B", indices, batch_size=8)
    assert np.array_equal(flat(dropped), flat(again))
    for moved in (other, whole):
        assert not np.allclose(flat(dropped), flat(moved), rtol=0.05)


def test_with_no_noise_and_no_bound_it_is_plain_gradient_descent(bench) -> None:
    indices = bench.shards[0][:10]
    private, measured = run(bench, Mechanism(0.0, 1e9), "AB", indices, batch_size=10)
    plain, _ = run(bench, None, "AB", indices, batch_size=10)
    assert measured["clipped"] == 0.0
    np.testing.assert_allclose(flat(private), flat(plain), rtol=2e-4, atol=1e-7)


def test_noise_has_the_right_size_on_every_coordinate_and_on_empty_batches(bench) -> None:
    indices, sigma, clip = bench.shards[0][:10], 3.0, 0.5
    for batch_size, expected in ((10, 10), (1e-9, 1e-9)):  # the second never draws anybody
        quiet, _ = run(bench, Mechanism(0.0, clip), "AB", indices, batch_size=batch_size)
        loud, _ = run(bench, Mechanism(sigma, clip), "AB", indices, batch_size=batch_size)
        noise = (flat(loud) - flat(quiet)) * expected
        assert noise.size == 8842
        assert np.std(noise) == pytest.approx(sigma * clip, rel=0.03)
        assert abs(np.mean(noise)) < 4 * sigma * clip / np.sqrt(noise.size)
        assert stats.kstest(noise / (sigma * clip), "norm").pvalue > 1e-3


def test_noise_is_of_one_client_and_one_round(bench) -> None:
    indices, mechanism = bench.shards[0][:1], Mechanism(1.0, 1.0)
    keys = ((0, 0, 1), (0, 1, 1), (0, 0, 2), (1, 0, 1))  # (seed, client, round)
    noise = {streams: flat(run(bench, mechanism, "AB", indices, streams, batch_size=1e-9)[0]) for streams in keys}
    again = flat(run(bench, mechanism, "AB", indices, (0, 0, 1), batch_size=1e-9)[0])
    assert np.array_equal(again, noise[0, 0, 1])
    correlations = np.corrcoef(list(noise.values())) - np.eye(4)
    assert np.abs(correlations).max() < 0.05  # 4.5 standard deviations over 8,842 coordinates


def test_noise_does_not_repeat_where_32_bits_of_a_seed_do(bench) -> None:
    """The low half of these two seeds of torch is the same, which is all that its generator takes on a CPU."""
    twins = ((0, 212, 153), (0, 479, 41))
    assert len({seeds.torch_seed(seed, "noise", *rest) % 2**32 for seed, *rest in twins}) == 1
    noise = [flat(run(bench, Mechanism(1.0, 1.0), "AB", bench.shards[0][:1], t, batch_size=1e-9)[0]) for t in twins]
    assert abs(np.corrcoef(noise)[0, 1]) < 5 / np.sqrt(noise[0].size)


@pytest.mark.parametrize("std", [0.3, 8.0, 1e-4])
def test_what_is_released_is_on_a_public_grid(std) -> None:
    """Whatever the clipped sum: its own low bits are gone, and so are those of the noise."""
    grid = 2.0 ** np.floor(np.log2(std)) * 2.0**-20
    for total in (0.0, std * np.pi, -3e-9):
        flat = torch.nn.Parameter(torch.zeros(5000))
        descent = Mechanism(std, 1.0).descent(torch.optim.SGD([flat], lr=1.0), 1.0, seeds.Stream(bytes(32)))
        flat.summed_grad = torch.full((5000,), total)
        descent.optimizer.add_noise()
        released = flat.grad.double().numpy()
        assert np.array_equal(released, np.round(released / grid) * grid)
        assert stats.kstest((released - total) / std, "norm").pvalue > 1e-3


@pytest.mark.parametrize("clip", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e20])
def test_no_clip_that_is_allowed_lets_a_record_add_more(clip, scale) -> None:
    """A clip of 1e-45 let one record add 5.5 C, since float32 has no number to scale its gradient by."""
    flat = torch.nn.Parameter(torch.zeros(4096))
    descent = Mechanism(0.0, clip).descent(torch.optim.SGD([flat], lr=1.0), 1.0, seeds.Stream(bytes(32)))
    descent.take(scale * torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)), 1.0)
    assert float(flat.detach().double().norm()) <= clip * (1 + 1e-5)
    for settings, sentence in (
        (
            {"privacy": PrivacyConfig("record", 1.0, clip=1e-44)},
            "privacy.clip=1e-44 is out of range; it must lie between 1e-12",
        ),
        ({"train": TrainConfig(lr=math.inf)}, "train.lr=inf is out of range; it must be finite"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            checked(Config(**settings))


def test_micro_batches_and_the_order_of_records_change_nothing(bench) -> None:
    indices, mechanism = bench.shards[0][:16], Mechanism(1.0, 0.1)
    whole, _ = run(bench, mechanism, "AB", indices, batch_size=16, steps=3)
    parts, _ = run(bench, mechanism, "AB", indices, batch_size=16, steps=3, physical_batch_size=5)
    turned, _ = run(bench, mechanism, "AB", indices[::-1].copy(), batch_size=16, steps=3)
    np.testing.assert_allclose(flat(parts), flat(whole), atol=2e-6)
    np.testing.assert_allclose(flat(turned), flat(whole), atol=2e-6)


def test_hooks_are_gone_when_a_client_is_done(bench) -> None:
    before, _ = run(bench, None)
    run(bench, Mechanism(1.0, 1.0))
    after, _ = run(bench, None)
    assert np.array_equal(flat(before), flat(after))
    assert not any(getattr(parameter, "grad_sample", None) is not None for parameter in bench.model.peft.parameters())


def test_poisson_batches_take_each_record_independently_with_the_rate() -> None:
    indices, rate, steps = np.arange(40), 0.3, 4000
    drawn = list(poisson(indices, rate, steps, np.random.default_rng(0)))
    counts = np.bincount(np.concatenate(drawn), minlength=40)
    assert np.abs(counts / steps - rate).max() < 5 * np.sqrt(rate * 0.7 / steps)
    sizes = np.array([len(batch) for batch in drawn])
    assert sizes.var() == pytest.approx(40 * rate * (1 - rate), rel=0.1)  # binomial, not fixed
    assert [len(batch) for batch in poisson(indices, 1.0, 2, np.random.default_rng(0))] == [40, 40]
    assert any(len(batch) == 0 for batch in poisson(indices, 0.02, 50, np.random.default_rng(0)))


@pytest.mark.parametrize(("batch", "examples", "rate"), [(16, 64, 0.25), (16, 16, 1.0), (16, 3, 1.0)])
def test_the_rate_of_a_small_client_is_one(batch, examples, rate) -> None:
    assert sampling_rate(batch, examples) == rate


def test_the_rate_is_used_exactly_and_not_rounded_to_a_batch_size(bench) -> None:
    """Opacus' own loader truncates the expected batch size: here 7 of 12 stays 7, and 2.5 would stay 2.5."""
    indices = bench.shards[0][:12]
    quiet, _ = run(bench, Mechanism(0.0, 0.01), "B", indices, streams=(0, 0, 3), batch_size=2.5)
    key = simulated_key((0, 0, 3), "", Mechanism(0.0, 0.01))
    drawn = next(poisson(indices, 2.5 / 12, 1, seeds.Stream(seeds.derive(key, "batches"))))
    assert len(drawn)
    alone = [flat(run(bench, Mechanism(0.0, 0.01), "B", np.array([index]), batch_size=1)[0]) for index in drawn]
    np.testing.assert_allclose(flat(quiet), np.sum(alone, axis=0) / 2.5, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("physical", [None, 4])
def test_without_noise_and_bound_private_steps_are_those_of_poisson_sampling(bench, physical, plain_draws) -> None:
    settings = {"steps": 6, "batch_size": 3, "sampling": "poisson", "physical_batch_size": physical}
    private, _ = run(bench, Mechanism(0.0, 1e9), "AB", **settings)
    plain, _ = run(bench, None, "AB", **settings)
    np.testing.assert_allclose(flat(private), flat(plain), rtol=2e-3, atol=1e-5)
    shuffled, _ = run(bench, None, "AB", **settings | {"sampling": "shuffle"})
    assert not np.allclose(flat(private), flat(shuffled), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("trains", ["AB", "B", "A"])
@pytest.mark.parametrize("sigma", [0.5, 30.0])
def test_the_noise_in_the_product_is_what_the_formula_foretells(bench, trains, sigma) -> None:
    measured = [run(bench, Mechanism(sigma, 0.5), trains, streams=(0, 0, round), steps=4, lr=0.3)[1] for round in range(1, 9)]
    q_n = 8  # every shard here is larger than a batch
    assert measured[0]["noise_std"] == pytest.approx(0.3 * sigma * 0.5 / q_n * 2)  # √4 steps
    drawn = np.sqrt(np.mean([m["noise_product"] ** 2 for m in measured]))
    foretold = np.sqrt(np.mean([m["noise_product_expected"] ** 2 for m in measured]))
    assert drawn == pytest.approx(foretold, rel=0.08)


def test_noise_is_not_foretold_where_the_optimiser_reshapes_it(bench) -> None:
    _, measured = run(bench, Mechanism(1.0, 0.5), "B", optimizer="adamw", lr=0.01)
    assert "noise_product" not in measured and "clipped" in measured


def test_a_record_whose_gradient_is_not_finite_takes_no_part_and_leaves_no_trace(bench, monkeypatch) -> None:
    indices, mechanism = bench.shards[0][:8], Mechanism(0.5, 0.1)
    pixels = bench.train.pixels.clone()
    pixels[indices[3]] = float("nan")
    expected = {"batch_size": 8}
    monkeypatch.setattr("clients.task.poisson", lambda indices, rate, steps, rng: iter([np.delete(indices, 3)]))
    without, _ = run(bench, mechanism, "B", indices, **expected)
    monkeypatch.setattr("clients.task.poisson", lambda indices, rate, steps, rng: iter([indices]))
    spoilt = dataclasses.replace(bench.train, pixels=pixels)
    monkeypatch.setattr(type(bench), "train", property(lambda self: spoilt))
    broken, _ = run(bench, mechanism, "B", indices, **expected)
    np.testing.assert_allclose(flat(broken), flat(without), atol=1e-6)
