"""Streams: named, pinned for ever, and unrelated to each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedlora import seeds


def test_keys_are_pinned() -> None:
    """A change here changes every published number: these two literals must never be edited."""
    assert seeds.key(0, "partition") == 0x111285BA83155B55178EAC423B709451
    assert seeds.key(7, "batches", client=3, round=12) == 0xBF1741EDC85EAE7275FC1B2214D9350F


def test_every_argument_makes_another_stream() -> None:
    drawn = {
        tuple(seeds.stream(*arguments).integers(2**62, size=2))
        for arguments in itertools.product((0, 1), ("batches", "dropout"), (0, 1, 11), (0, 1, 11))
    }
    assert len(drawn) == 2 * 2 * 3 * 3  # client 1, round 11 is not client 11, round 1


def test_a_stream_starts_afresh_at_every_call() -> None:
    first, second = seeds.stream(5, "batches", 2, 3), seeds.stream(5, "batches", 2, 3)
    first.random(1000)  # drawing from one does not move the other
    assert np.array_equal(second.random(4), seeds.stream(5, "batches", 2, 3).random(4))


@pytest.mark.parametrize("neighbour", ["client", "round", "seed"])
def test_neighbouring_streams_are_uncorrelated(neighbour: str) -> None:
    """20 streams of 2000 normals: the largest of 190 correlations stays near 3 / sqrt(2000) = .067."""
    size = 2000
    keys = [{"client": (0, i, 0), "round": (0, 0, i), "seed": (i, 0, 0)}[neighbour] for i in range(20)]
    rows = np.stack([seeds.stream(seed, "batches", client, round).standard_normal(size) for seed, client, round in keys])
    correlation = np.corrcoef(rows) - np.eye(20)
    assert np.abs(correlation).max() < 0.1
    assert abs(correlation.sum() / 380) < 0.01  # and they lean neither way


def test_torch_seeds_fit_in_63_bits_and_differ() -> None:
    numbers = [seeds.torch_seed(0, "dropout", client, round) for client in range(30) for round in range(30)]
    assert len(set(numbers)) == 900
    assert min(numbers) >= 0 and max(numbers) < 2**63
    assert max(numbers) > 2**62  # all 63 bits are used
    assert seeds.torch_seed(0, "dropout", 1, 2) == seeds.key(0, "dropout", 1, 2) >> 65
