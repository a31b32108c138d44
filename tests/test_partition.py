"""Partitions: every example to exactly one client, the floor held, the same for the same seed."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import seeds
from fedlora.check import ConfigError
from fedlora.config import Config, PartitionConfig
from fedlora.data import Examples, partition
from fedlora.validate import checked

DRAWN = [name for name in partition.names() if name not in ("natural", "domains", "own")]  # two read groups, one sizes


def examples_of(labels: list[int] | np.ndarray, groups: list[str] | None = None) -> Examples:
    """Examples whose inputs do not matter."""
    labels = np.asarray(labels, np.int64)
    return Examples(["x"] * len(labels), labels, None if groups is None else np.array(groups))


def balanced(n: int, classes: int) -> Examples:
    """`n` examples with the labels 0, 1, …, classes - 1, 0, 1, …"""
    return examples_of(np.arange(n) % classes)


def assert_dealt(parts: list[np.ndarray], n: int) -> None:
    """Each of n examples is in exactly one part, and each part is sorted int64."""
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Whether two splits are the same."""
    return len(one) == len(other) and all(map(np.array_equal, one, other))


# ---------------------------------------------------------------- what holds for all


@pytest.mark.parametrize("name", DRAWN)
@settings(max_examples=60, deadline=None)
@given(drawn=st.data())
def test_each_example_once_and_the_floor_held(name: str, drawn: st.DataObject) -> None:
    clients = drawn.draw(st.integers(1, 12), "clients")
    floor = drawn.draw(st.integers(1, 4), "floor")
    n = drawn.draw(st.integers(clients * floor, clients * floor + 60), "examples")
    labels = drawn.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n), "labels")
    alpha = drawn.draw(st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 1e6]), "alpha")
    seed = drawn.draw(st.integers(0, 2**32), "seed")
    config = PartitionConfig(name, alpha=alpha, shards_per_client=floor, min_examples=floor)
    parts = partition.split(config, examples_of(labels), clients, seed)
    assert len(parts) == clients
    assert_dealt(parts, n)
    assert min(map(len, parts)) >= floor
    assert equal(parts, partition.split(config, examples_of(labels), clients, seed))


@pytest.mark.parametrize("name", DRAWN)
def test_another_seed_is_another_split(name: str) -> None:
    config = PartitionConfig(name)
    one, other = (partition.split(config, balanced(200, 4), 8, seed) for seed in (0, 1))
    assert not equal(one, other)


@pytest.mark.parametrize("name", DRAWN)
def test_which_example_of_a_label_goes_where_is_random(name: str) -> None:
    config, one_label = PartitionConfig(name, alpha=1e12), examples_of([0] * 160)  # so large an alpha fixes the sizes
    one, other = (partition.split(config, one_label, 4, seed) for seed in (0, 1))
    assert [len(part) for part in one] == [len(part) for part in other] == [40] * 4
    assert not any(map(np.array_equal, one, other))


@pytest.mark.parametrize("name", DRAWN)
def test_a_split_depends_on_nothing_but_seed_settings_clients_and_labels(name: str) -> None:
    config, examples = PartitionConfig(name), balanced(200, 4)
    before = partition.split(config, examples, 8, 3)
    np.random.seed(5)  # the global state must not matter
    seeds.stream(3, "partition").random(10)
    other_inputs = Examples(["y"] * 200, examples.labels, np.array(["g"] * 200))
    assert equal(before, partition.split(config, other_inputs, 8, 3))


@pytest.mark.parametrize("name", DRAWN)
def test_500_clients_are_quick(name: str) -> None:
    config, examples = PartitionConfig(name, alpha=0.1), balanced(1438, 10)
    start = time.perf_counter()
    parts = partition.split(config, examples, 500, 0)
    assert time.perf_counter() - start < 1
    assert_dealt(parts, 1438)
    assert min(map(len, parts)) >= 2


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize(
    ("n", "clients", "floor", "parts"),
    [
        (19, 10, 2, ["clients=10 × partition.min_examples=2 needs 20 examples", "has 19; lower one of them"]),
        (9, 10, 1, ["clients=10 is more than the 9 examples of the training data"]),
    ],
)
def test_too_few_examples(name: str, n: int, clients: int, floor: int, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        partition.split(PartitionConfig(name, min_examples=floor), balanced(n, 2), clients, 0)
    for part in parts:
        assert part in str(caught.value)


def test_names_are_the_schema_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"dirichlet", "domains", "iid", "natural", "quantity", "shards"} <= set(partition.names())
    with pytest.raises(ConfigError, match=r"partition.name=shard is not known; did you mean shards\?"):
        checked(Config(partition=PartitionConfig("shard")))
    with pytest.raises(ConfigError, match=r"partition.name=shard is not known; did you mean shards\?"):
        partition.split(PartitionConfig("shard"), balanced(10, 2), 2, 0)
    monkeypatch.setitem(partition.PARTITIONS, "odd", lambda config, examples, clients, rng: [np.arange(len(examples))])
    assert checked(Config(partition=PartitionConfig("odd"))).partition.name == "odd"
    assert partition.split(PartitionConfig("odd"), balanced(4, 2), 1, 0)[0].tolist() == [0, 1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 9))
def test_the_repair_moves_only_what_is_short(sizes: list[int], floor: int, seed: int) -> None:
    sizes[0] += len(sizes) * floor  # so that the floor can be met
    ends = np.cumsum(sizes)
    before = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    after = partition._repaired(before, floor, np.random.default_rng(seed))
    assert_dealt([np.sort(part) for part in after], ends[-1])
    moved = sum(len(np.setdiff1d(new, old)) for new, old in zip(after, before, strict=True))
    assert moved == sum(max(0, floor - size) for size in sizes)
    for old, new in zip(before, after, strict=True):
        if len(old) < floor:
            assert len(new) == floor and np.isin(old, new).all()
        else:
            assert len(new) >= floor and np.isin(new, old).all()


def test_the_repair_takes_from_the_largest() -> None:
    parts = [np.arange(0, 10), np.arange(10, 17), np.array([], np.int64), np.arange(17, 20)]
    after = partition._repaired(parts, 5, np.random.default_rng(0))
    assert [len(part) for part in after] == [5, 5, 5, 5]  # 10 and 7 give 5 to the third and 2 to the fourth


# ---------------------------------------------------------------- each by itself


def test_iid_is_even_in_sizes_and_labels() -> None:
    parts = partition.split(PartitionConfig("iid"), balanced(10_003, 2), 10, 0)
    assert sorted({len(part) for part in parts}) == [1000, 1001]
    assert all(0.4 < np.mean(part % 2) < 0.6 for part in parts)


def label_skew(parts: list[np.ndarray], labels: np.ndarray) -> float:
    """The share of its most common class, averaged over the clients."""
    return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))


def test_dirichlet_goes_from_one_class_a_client_to_even() -> None:
    examples = balanced(10_000, 10)
    skew = {
        alpha: label_skew(partition.split(PartitionConfig("dirichlet", alpha=alpha), examples, 10, 0), examples.labels)
        for alpha in (0.05, 0.5, 1e5)
    }
    assert skew[0.05] > 0.6 > skew[0.5] > 0.25 > skew[1e5]
    assert skew[1e5] < 0.11  # even is 0.1


def test_dirichlet_at_vanishing_alpha_gives_each_class_to_one_client() -> None:
    examples = balanced(400, 4)
    parts = partition.split(PartitionConfig("dirichlet", alpha=1e-9, min_examples=1), examples, 3, 0)
    whole = [np.flatnonzero(np.bincount(examples.labels[part], minlength=4) >= 98).size for part in parts]
    assert sum(whole) == 4  # but for the one or two examples that the repair moves


@pytest.mark.parametrize("name", ["dirichlet", "quantity"])
def test_an_infinite_alpha_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"partition.alpha=inf is not finite; .* use partition=iid"):
        partition.split(PartitionConfig(name, alpha=float("inf")), balanced(20, 2), 2, 0)


def test_shards_bound_the_labels_of_a_client() -> None:
    labels = np.arange(1000) % 10
    parts = partition.split(PartitionConfig("shards", shards_per_client=2), examples_of(labels), 50, 0)
    assert all(len(part) == 20 for part in parts)
    assert max(len(np.unique(labels[part])) for part in parts) == 2  # shards of 10 never straddle classes of 100


def test_more_shards_than_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"clients=5 × partition.shards_per_client=3 makes 15 shards, .* has 14"):
        partition.split(PartitionConfig("shards", shards_per_client=3), balanced(14, 2), 5, 0)


def test_quantity_varies_sizes_and_not_labels() -> None:
    examples = balanced(20_000, 2)
    parts = partition.split(PartitionConfig("quantity", alpha=0.5), examples, 10, 0)
    sizes = np.array([len(part) for part in parts])
    assert sizes.max() > 5 * sizes.min()
    assert all(0.4 < examples.labels[part].mean() < 0.6 for part in parts if len(part) > 200)


def test_natural_is_the_groups_in_the_order_of_their_names() -> None:
    examples = examples_of([0] * 6, ["10", "9", "10", "9", "2", "2"])
    parts = partition.split(PartitionConfig("natural"), examples, 3, 0)
    assert [part.tolist() for part in parts] == [[4, 5], [1, 3], [0, 2]]
    integers = Examples(examples.inputs, examples.labels, np.array([10, 9, 10, 9, 2, 2]))
    assert equal(parts, partition.split(PartitionConfig("natural"), integers, 3, 1))


@pytest.mark.parametrize(
    ("groups", "clients", "floor", "message"),
    [
        (None, 2, 1, "name their column by dataset.group"),
        (["a", "a", "b", "c"], 2, 1, "clients=2 does not fit .* has 3 groups; set clients=3"),
        (["a", "a", "b", "c"], 50, 1, "clients=50 does not fit .* has 3 groups; set clients=3"),
        (["a", "a", "b", "b", "bo", "b"], 3, 2, "min_examples=2 is more than the natural client 'bo' has .1.; set"),
    ],
)
def test_what_natural_refuses(groups: list[str] | None, clients: int, floor: int, message: str) -> None:
    examples = examples_of([0] * len(groups or "four"), groups)
    with pytest.raises(ConfigError, match=message):
        partition.split(PartitionConfig("natural", min_examples=floor), examples, clients, 0)


@settings(max_examples=60, deadline=None)
@given(drawn=st.data())
def test_domains_gives_each_client_an_even_share_of_one_group(drawn: st.DataObject) -> None:
    sizes = drawn.draw(st.lists(st.integers(12, 40), min_size=1, max_size=5), "examples of each group")
    clients = drawn.draw(st.integers(len(sizes), 2 * len(sizes) + 3), "clients")
    floor = drawn.draw(st.integers(1, 12 // -(-clients // len(sizes))), "floor")
    names = np.repeat([str(9 + i) for i in range(len(sizes))], sizes)  # "9", "10", …, which are ordered by value
    examples = examples_of([0] * len(names), np.random.default_rng(0).permutation(names).tolist())
    config = PartitionConfig("domains", min_examples=floor)
    parts = partition.split(config, examples, clients, 3)
    assert len(parts) == clients
    assert_dealt(parts, len(names))
    for client, part in enumerate(parts):
        group = client % len(sizes)
        assert set(np.asarray(examples.groups)[part]) == {str(9 + group)}
        holders = len(range(group, clients, len(sizes)))
        assert len(part) in (sizes[group] // holders, -(-sizes[group] // holders)) and len(part) >= floor
    assert equal(parts, partition.split(config, examples, clients, 3))


def test_domains_deals_a_group_at_random() -> None:
    examples = examples_of([0] * 100, ["a"] * 60 + ["b"] * 40)
    one, other = (partition.split(PartitionConfig("domains"), examples, 5, seed) for seed in (0, 1))
    assert [len(part) for part in one] == [len(part) for part in other] == [20] * 5  # a, b, a, b, a
    assert not any(map(np.array_equal, one, other))
    alone = partition.split(PartitionConfig("domains"), examples, 2, 0)
    assert [part.tolist() for part in alone] == [list(range(60)), list(range(60, 100))]


@pytest.mark.parametrize(
    ("groups", "clients", "floor", "message"),
    [
        (None, 2, 1, r"make them from images by dataset.domains=\[plain,rotation\] or name their column by dataset.group$"),
        (["a", "a", "b", "c"], 2, 1, "clients=2 is less than the 3 groups of partition=domains; set clients=3 or more"),
        (["a"] * 9 + ["b"] * 3, 4, 2, "'b' with 2 of clients=4 × partition.min_examples=2 needs 4 examples, it has 3; lower"),
        (["a"] * 9 + ["b"], 2, 2, "'b' with 1 of clients=2 × partition.min_examples=2 needs 2 examples, it has 1; lower"),
        (["a", "b"], 3, 1, "clients=3 is more than the 2 examples of the training data"),
    ],
)
def test_what_domains_refuses(groups: list[str] | None, clients: int, floor: int, message: str) -> None:
    examples = examples_of([0] * len(groups or "four"), groups)
    with pytest.raises(ConfigError, match=message):
        partition.split(PartitionConfig("domains", min_examples=floor), examples, clients, 0)


# ---------------------------------------------------------------- holding out


@pytest.mark.parametrize(
    ("n", "share", "held"),
    [(10, 0.0, 0), (10, 0.2, 2), (10, 0.01, 1), (10, 0.99, 9), (2, 0.1, 1), (2, 0.9, 1), (1, 0.5, 0), (0, 0.5, 0)],
)
def test_holdout_sizes(n: int, share: float, held: int) -> None:
    indices = np.arange(100, 100 + n)
    train, out = partition.holdout(indices, share, 0, 0)
    assert len(out) == held
    assert np.array_equal(np.sort(np.concatenate([train, out])), indices)
    assert np.all(np.diff(train) > 0) and np.all(np.diff(out) > 0)


def test_holdout_has_a_stream_for_each_seed_and_client() -> None:
    indices = np.arange(100)
    draws = {tuple(partition.holdout(indices, 0.2, seed, client)[1]) for seed in (0, 1) for client in (0, 1)}
    assert len(draws) == 4
    assert all(map(np.array_equal, partition.holdout(indices, 0.2, 0, 1), partition.holdout(indices, 0.2, 0, 1)))
