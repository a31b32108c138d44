"""Streams: named, pinned for ever, and unrelated to each other."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from fedlora import seeds
from tests.conftest import ROOT


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


# ---- what privacy rests on


def test_a_stream_is_the_published_keystream() -> None:
    """Draft-strombergson-chacha-test-vectors: ChaCha20, key and nonce zero; so a device and a simulation agree anywhere."""
    published = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"  # fmt: skip  # noqa: E501
    assert seeds.Stream(bytes(32)).words(8).tobytes().hex() == published
    whole, parts = seeds.Stream(bytes(32)).words(20), seeds.Stream(bytes(32))
    assert np.array_equal(whole, np.concatenate([parts.words(n) for n in (1, 0, 12, 7)]))
    with pytest.raises(ValueError, match="key"):
        seeds.Stream(bytes(31))


def test_keys_and_first_numbers_are_pinned() -> None:
    """A change here changes every private number."""
    key = seeds.private_key("training", 0, 3, 12, "identity", 1.5, 1.0)
    assert key.hex()[:16] == "3399e92f7fbfc9e1" and seeds.derive(key, "noise").hex()[:16] == "dea0fb7a5c013ca9"
    assert seeds.Stream(bytes(32)).random(2) == pytest.approx([0.5634451882632473, 0.15914191768880792], abs=1e-15)
    assert seeds.Stream(bytes(32)).standard_normal(3) == pytest.approx(
        [0.8456044377785633, 0.3302185385960731, 0.6575131752304002], abs=1e-12
    )


def test_keys_of_different_parts_differ() -> None:
    parts = [
        ("a", "b"),
        ("ab",),
        ("a,b",),
        ("a", "b", ""),
        ("'a', 'b'",),
        (1,),
        (1.0,),
        ("1",),
        (b"1",),
        (0.1,),
        (0.3 - 0.2,),
        (),
    ]
    assert len({seeds.private_key(*each) for each in parts}) == 12
    assert len({seeds.derive(bytes(32), *each) for each in parts}) == 12
    assert seeds.derive(bytes(32), "a") != seeds.derive(b"1" * 32, "a") != seeds.private_key("a")
    for other in (np.int64(1), None, True, [1]):
        with pytest.raises(TypeError, match="a key is derived from int, float, str and bytes"):
            seeds.private_key(other)


@pytest.mark.parametrize("key", [bytes(32), b"1" * 32, seeds.private_key("law")])
def test_normals_are_normal_and_uniforms_uniform(key: bytes) -> None:
    size = 400_000
    drawn = seeds.Stream(key).standard_normal(size)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = np.sqrt(stats.norm.moment(2 * power) / size)
        assert abs(np.mean(drawn**power) - moment) < 4.5 * spread
    for tail in (2, 3, 4):
        expected = size * 2 * stats.norm.sf(tail)
        assert abs(np.sum(np.abs(drawn) > tail) - expected) < 4.5 * np.sqrt(expected)
    halves = drawn.reshape(2, -1)  # of each pair of Box and Muller, cosine and sine
    assert abs(np.corrcoef(*halves)[0, 1]) < 4.5 / np.sqrt(size / 2)
    assert abs(np.corrcoef(*halves**2)[0, 1]) < 4.5 / np.sqrt(size / 2)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 4.5 / np.sqrt(size)
    uniform = seeds.Stream(key).random(size)
    assert uniform.min() >= 0 and uniform.max() < 1 and stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_the_largest_radius_is_finite_and_shapes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = seeds.Stream(bytes(32))
    assert stream.standard_normal((3, 5)).shape == (3, 5) == stream.random((3, 5)).shape
    assert stream.standard_normal(0).shape == (0,) == stream.random(0).shape and stream.standard_normal(()).shape == ()
    for words, largest in ((0, 9.35), (2**64 - 1, 0.0)):
        monkeypatch.setattr(stream, "words", lambda count, words=words: np.full(count, words, np.uint64))
        assert np.abs(stream.standard_normal(6)).max() == pytest.approx(largest, abs=0.01)
        assert stream.random(1)[0] == (words > 0) * (1 - 2.0**-53)


def test_a_small_question_needs_no_torch() -> None:
    code = "import sys; from fedlora import seeds; seeds.Stream(bytes(32)).random(3); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
