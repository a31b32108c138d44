"""Where every trained array stands in the flat vector."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Pair
from fedlora.compute.layout import Layout, Slot

LAYERS = {"b": (2, 3), "a": (3, 2)}  # name → (m, n), not in their order


def draw(rank: int):
    rng = np.random.default_rng(rank)
    pairs = {name: Pair(rng.standard_normal((rank, n)), rng.standard_normal((m, rank))) for name, (m, n) in LAYERS.items()}
    return {k: Pair(*(x.astype(np.float32) for x in v)) for k, v in pairs.items()}, {"w": np.ones((2, 2), np.float32)}


@pytest.mark.parametrize(("trains", "order"), [("AB", "aA bA aB bB w"), ("A", "aA bA w"), ("B", "aB bB w")])
def test_join_and_split_are_inverse_and_in_order(trains, order) -> None:
    adapters, dense = draw(2)
    layout = Layout.of(adapters, dense, trains)
    assert " ".join(slot.name + slot.factor for slot in layout.slots) == order
    vector = layout.join(adapters, dense)
    assert vector.shape == (layout.size,) and vector.dtype == np.float32
    assert vector[: 2 * 2].tolist() == getattr(adapters["a"], trains[0]).ravel()[:4].tolist()
    factors, head = layout.split(vector)
    for name, pair in adapters.items():
        assert factors[name].keys() == set(trains)
        assert all(np.array_equal(factors[name][f], getattr(pair, f)) for f in trains)
    assert head.keys() == {"w"} and np.array_equal(head["w"], dense["w"])


def test_places_by_hand() -> None:
    """One layer of m = 2, n = 3 at rank 1 inside rank 2, and a bias.

    wide:  A = [[0, 1, 2], [3, 4, 5]]   B = [[6, 7], [8, 9]]   bias = [10]
    """
    pair, dense = Pair(np.zeros((1, 3)), np.zeros((2, 1))), {"bias": np.zeros(1)}
    wide = Layout.of({"q": lowrank.pad(pair, 2)}, dense, "AB")
    assert wide.slots == (Slot("q", "A", (2, 3)), Slot("q", "B", (2, 2)), Slot("bias", "", (1,)))
    assert Layout.of({"q": pair}, dense, "AB").places_in(wide).tolist() == [0, 1, 2, 6, 8, 10]
    assert Layout.of({"q": pair}, dense, "A").places_in(wide).tolist() == [0, 1, 2, 10]
    assert Layout.of({"q": pair}, dense, "B").places_in(wide).tolist() == [6, 8, 10]
    assert wide.places_in(wide) is None


@pytest.mark.parametrize("trains", ["AB", "A", "B"])
def test_places_find_a_lower_rank_in_its_padded_form(trains) -> None:
    adapters, dense = draw(2)
    padded = {name: lowrank.pad(pair, 5) for name, pair in adapters.items()}
    narrow, wide = Layout.of(adapters, dense, trains), Layout.of(padded, dense, "AB")
    assert np.array_equal(wide.join(padded, dense)[narrow.places_in(wide)], narrow.join(adapters, dense))
