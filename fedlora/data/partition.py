"""Dealing the training examples out to clients: every example goes to exactly one.

A partition is one function here, registered by `@partition`; its name is the setting's value. It may leave clients
short of `partition.min_examples`: a repair follows that moves random examples, one at a time, from whichever client has
the most to those below the floor. No client is pushed below it by that, and a split that has the floor stays as it is.

| Case                                  | What happens                                                               |
|---------------------------------------|----------------------------------------------------------------------------|
| clients × min_examples > N            | ConfigError: no split can have the floor                                   |
| natural: groups ≠ clients             | ConfigError with the number of groups; groups are never merged nor split   |
| natural: a group below the floor      | ConfigError that names the group; natural is never repaired                |
| domains: clients < groups             | ConfigError: some groups would have no client                              |
| domains: a group without room         | ConfigError that names the group; no example moves between groups          |
| shards: more shards than examples     | ConfigError: some shards would be empty                                    |
| alpha → 0                             | each class goes to a single client (dirichlet); repaired                   |
| one client                            | it gets everything                                                         |

All randomness comes from the stream (seed, "partition"), so the split depends on nothing but the seed, these settings,
the number of clients and the labels (natural, domains: the groups).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fedlora import check, seeds
from fedlora.check import ConfigError
from fedlora.data.examples import ordered

if TYPE_CHECKING:
    from fedlora.config import PartitionConfig
    from fedlora.data.examples import Examples

Partition = Callable[["PartitionConfig", "Examples", int, np.random.Generator], list[np.ndarray]]
PARTITIONS: dict[str, Partition] = {}


def partition(function: Partition) -> Partition:
    """Register a function (settings, examples, clients, rng) -> one index array a client, under its own name."""
    PARTITIONS[function.__name__] = function
    return function


def names() -> list[str]:
    """The partitions there are."""
    return sorted(PARTITIONS)


def split(config: PartitionConfig, examples: Examples, clients: int, seed: int) -> list[np.ndarray]:
    """The indices of each client's examples: one sorted int64 array a client, each index in exactly one of them.

    Raises ConfigError where the partition is unknown or impossible with these examples and this number of clients.
    """
    check.one_of(names(), **{"partition.name": config.name})
    if config.name not in ("natural", "own"):  # there the number of clients is given, and a group that is too small named
        _require_room(clients, config.min_examples, len(examples))
    rng = seeds.stream(seed, "partition")
    parts = PARTITIONS[config.name](config, examples, clients, rng)
    if min(map(len, parts)) < config.min_examples and config.name != "own":
        parts = _repaired(parts, config.min_examples, rng)
    return [np.sort(np.asarray(part, np.int64)) for part in parts]


@partition
def iid(config: PartitionConfig, examples: Examples, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """A random deal; sizes differ by one at most."""
    return np.array_split(rng.permutation(len(examples)), clients)


@partition
def dirichlet(config: PartitionConfig, examples: Examples, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Label skew: of each class, independently, the clients get shares drawn from Dir(alpha, …, alpha).

    Sizes vary too. This is the split of Yurochkin et al. 2019 (Bayesian Nonparametric Federated Learning) and of Li et
    al. 2022 (NIID-Bench); Hsu et al. 2019 draw a mixture of classes for each client instead.
    """
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(examples.labels):
        members = rng.permutation(np.flatnonzero(examples.labels == label))
        for part, share in zip(parts, _dirichlet_shares(members, config.alpha, clients, rng), strict=True):
            part.append(share)
    return [np.concatenate(part) for part in parts]


@partition
def shards(config: PartitionConfig, examples: Examples, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Few labels a client: sort by label, cut into equal shards, deal `shards_per_client` to each.

    McMahan et al. 2017 (Communication-Efficient Learning), with 2 shards a client. Ties are in random order.
    """
    total = clients * config.shards_per_client
    if total > len(examples):
        raise ConfigError(
            f"clients={clients} × partition.shards_per_client={config.shards_per_client} makes {total} shards, the "
            f"training data has {len(examples)} examples; lower one of them"
        )
    shuffled = rng.permutation(len(examples))
    by_label = shuffled[np.argsort(examples.labels[shuffled], kind="stable")]
    cut = np.array_split(by_label, total)
    deal = rng.permutation(total).reshape(clients, config.shards_per_client)
    return [np.concatenate([cut[shard] for shard in hand]) for hand in deal]


@partition
def natural(config: PartitionConfig, examples: Examples, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """One client for each group of the dataset, in the order of their names; nothing is random."""
    if examples.groups is None:
        raise ConfigError("partition=natural needs natural client ids; name their column by dataset.group")
    groups = _members(examples.groups)
    if len(groups) != clients:
        raise ConfigError(
            f"clients={clients} does not fit partition=natural: the training data has {len(groups)} groups; "
            f"set clients={len(groups)}"
        )
    smallest, members = min(groups.items(), key=lambda group: len(group[1]))
    if len(members) < config.min_examples:
        raise ConfigError(
            f"partition.min_examples={config.min_examples} is more than the natural client '{smallest}' has "
            f"({len(members)}); set partition.min_examples={len(members)} or remove that client from the data"
        )
    return list(groups.values())


@partition
def domains(config: PartitionConfig, examples: Examples, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Feature skew: each client holds one of the G groups, client k the group k mod G in the order of their names.

    Within a group its clients get equal shares at random.
    """
    if examples.groups is None:
        raise ConfigError(
            "partition=domains needs groups of examples; make them from images by dataset.domains=[plain,rotation] or name "
            "their column by dataset.group"
        )
    groups = _members(examples.groups)
    if clients < len(groups):
        raise ConfigError(
            f"clients={clients} is less than the {len(groups)} groups of partition=domains; set clients={len(groups)} or more"
        )
    parts: dict[int, np.ndarray] = {}
    for first, (name, members) in enumerate(groups.items()):
        holders = range(first, clients, len(groups))
        if len(members) < len(holders) * config.min_examples:
            raise ConfigError(
                f"partition=domains: the group '{name}' with {len(holders)} of clients={clients} × partition.min_examples="
                f"{config.min_examples} needs {len(holders) * config.min_examples} examples, it has {len(members)}; "
                "lower one of them"
            )
        parts |= zip(holders, np.array_split(rng.permutation(members), len(holders)), strict=True)
    return [parts[client] for client in range(clients)]


@partition
def own(config: PartitionConfig, examples: Examples, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Each client has its examples where it is, numbered from 0, and so many as `sizes` says (deploy only)."""
    everyone = np.arange(max(config.sizes, default=0))  # of which each is a part: sizes are what devices say
    return [everyone[:size] for size in config.sizes]


@partition
def quantity(config: PartitionConfig, examples: Examples, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Size skew: clients get shares of the examples drawn from Dir(alpha, …, alpha); labels are dealt at random."""
    return _dirichlet_shares(rng.permutation(len(examples)), config.alpha, clients, rng)


def holdout(indices: np.ndarray, share: float, seed: int, client: int) -> tuple[np.ndarray, np.ndarray]:
    """A client's indices as (train, held out), both sorted; the stream is (seed, "holdout", client).

    Held out are round(share · n) of n, but at least 1 and at most n - 1; none where share = 0 or n = 1.
    """
    return _hold_out(indices, share, seeds.stream(seed, "holdout", client))


def split_off_test(labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The indices (train, test) of a split by class, each class as in `holdout`; the same for every run.

    The seed is fixed, because results over several run seeds are to be compared on the same test examples.
    """
    halves = [
        _hold_out(np.flatnonzero(labels == label), share, seeds.stream(0, "test split", int(label)))
        for label in np.unique(labels)
    ]
    train, test = zip(*halves, strict=True)
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def held_out(n: int, share: float) -> int:
    """How many of a client's n examples `holdout` holds out."""
    return min(max(round(share * n), 1), n - 1) if share and n else 0


def _hold_out(indices: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    held = held_out(len(indices), share)
    shuffled = rng.permutation(indices)
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])


def _dirichlet_shares(members: np.ndarray, alpha: float, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`members` cut into one consecutive piece a client, of lengths close to len(members) · Dir(alpha, …, alpha)."""
    if not math.isfinite(alpha):
        raise ConfigError(f"partition.alpha={alpha} is not finite; for an even split, use partition=iid")
    ends = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)
    return np.split(members, np.rint(ends).astype(np.int64))


def _members(groups: np.ndarray) -> dict[str, np.ndarray]:
    """The indices of each group's examples, by its name, the groups in the order of their names."""
    names, group, sizes = np.unique(np.asarray(groups).astype(str), return_inverse=True, return_counts=True)
    members = dict(zip(names.tolist(), np.split(np.argsort(group, kind="stable"), np.cumsum(sizes)[:-1]), strict=True))
    return {name: members[name] for name in ordered(members)}


def _require_room(clients: int, floor: int, available: int) -> None:
    if clients > available:
        raise ConfigError(f"clients={clients} is more than the {available} examples of the training data; lower it")
    if clients * floor > available:
        raise ConfigError(
            f"clients={clients} × partition.min_examples={floor} needs {clients * floor} examples, the training data "
            f"has {available}; lower one of them"
        )


def _repaired(parts: list[np.ndarray], floor: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`parts` with at least `floor` examples each, which must be possible; see the top of this file."""
    pools = [rng.permutation(part).tolist() for part in parts]  # popping from a shuffled list takes a random example
    largest = [(-len(pool), client) for client, pool in enumerate(pools)]
    heapq.heapify(largest)
    for pool in pools:
        while len(pool) < floor:
            # The top is never one that was filled up: while any is short, another has more than the floor.
            size, donor = largest[0]
            pool.append(pools[donor].pop())
            heapq.heapreplace(largest, (size + 1, donor))
    return [np.array(pool, np.int64) for pool in pools]
