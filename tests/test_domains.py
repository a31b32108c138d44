"""Domains: each does to an image what its name says, and every run sees the same examples in the same domains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from fedlora import data
from fedlora.check import ConfigError
from fedlora.config import Config, DatasetConfig, declared
from fedlora.data import Dataset, Examples, domains
from fedlora.tools import cli
from fedlora.validate import checked
from tests.conftest import ROOT, run_py

ALL = ["plain", "rotation", "inversion", "stroke", "blur"]


def drawing(rows: list[str]) -> np.ndarray:
    """A grey image (H, W, 1): 1 where there is a `#`."""
    return np.array([[letter == "#" for letter in row] for row in rows], np.float32)[..., np.newaxis]


def noise(*shape: int) -> np.ndarray:
    """Pixels drawn evenly from [0, 1], with both ends among them."""
    image = np.random.default_rng(0).random(shape, np.float32)
    image[0, 0], image[-1, -1] = 0, 1
    return image


# ---------------------------------------------------------------- the transforms


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 12, 3), (1, 1, 1), (40, 40, 3)])
def test_shape_type_and_range_stay_and_the_original_is_untouched(name: str, shape: tuple[int, ...]) -> None:
    image = noise(*shape)
    before = image.copy()
    after = domains.DOMAINS[name](image)
    assert after.shape == shape and after.dtype == np.float32
    assert after.min() >= 0 and after.max() <= 1
    assert np.array_equal(image, before)
    assert (name == "plain") == np.array_equal(after, image) or shape == (1, 1, 1)


@pytest.mark.parametrize("name", ALL)
def test_channels_do_not_mix(name: str) -> None:
    image = noise(16, 16, 3)
    after = domains.DOMAINS[name](image)
    for channel in range(3):
        assert np.array_equal(after[..., [channel]], domains.DOMAINS[name](image[..., [channel]]))


def test_inversion_twice_is_the_identity_on_grey_levels() -> None:
    image = (np.arange(256, dtype=np.float32).reshape(16, 16, 1)) / 256
    assert domains.inversion(image)[0, 0, 0] == 1 and domains.inversion(image)[8, 0, 0] == 0.5
    assert np.array_equal(domains.inversion(domains.inversion(image)), image)


def test_rotation_is_60_degrees_anticlockwise() -> None:
    image = np.zeros((9, 9, 1), np.float32)
    image[4, 8], image[4, 4] = 1, 0.5  # 4 to the right of the centre, and the centre itself
    turned = domains.rotation(image)[..., 0]
    assert turned[4, 4] == pytest.approx(0.5)
    # Row 1, column 6 is 2 to the right and 3 up. That was, 60° clockwise, 2 cos 60° + 3 sin 60° = 3.598 to the right and
    # 3 cos 60° - 2 sin 60° = -0.232 up: between the pixels of columns 7 and 8 and of rows 4 and 5.
    assert turned[1, 6] == pytest.approx(0.598 * (1 - 0.232), abs=1e-3)
    # Row 0, column 6 was 2 cos 60° + 4 sin 60° = 4.46 to the right, outside.
    assert turned[0, 6] == 0
    assert not turned[6:].any() and not turned[:, :3].any()


def test_rotation_leaves_black_where_there_was_nothing() -> None:
    turned = domains.rotation(np.ones((9, 9, 1), np.float32))
    assert turned[0, 0] == turned[8, 8] == 0 and turned[4, 4] == 1


def test_stroke_widens_by_a_pixel_each_way() -> None:
    thin = drawing(["......", "......", "..#...", "......", "......"])
    wide = drawing(["......", "..#...", ".###..", "..#...", "......"])
    assert np.array_equal(domains.stroke(thin), wide)
    line = drawing(["....#...."] * 9)
    assert np.array_equal(domains.stroke(line), drawing(["...###..."] * 9))
    assert np.array_equal(domains.stroke(line * 0.25), domains.stroke(line) * 0.25)  # grey levels, not black and white


def test_blur_keeps_the_mean_and_flattens_like_a_gaussian() -> None:
    image = noise(8, 8, 1)
    assert domains.blur(image).mean() == pytest.approx(image.mean(), rel=1e-5)
    assert domains.blur(image).std() < 0.6 * image.std()
    dot = np.zeros((15, 15, 1), np.float32)
    dot[7, 7] = 1
    spot = domains.blur(dot)[..., 0]
    assert spot[7, 7] == pytest.approx(1 / (2 * np.pi), rel=0.01)  # σ = 1: the density at 0 in two dimensions
    assert spot[7, 8] / spot[7, 7] == pytest.approx(np.exp(-0.5), rel=1e-4)


@pytest.mark.parametrize(("side", "pen"), [(1, 1), (8, 1), (28, 2), (224, 14)])
def test_a_pen_grows_with_the_image(side: int, pen: int) -> None:
    line = np.zeros((side + 200, side, 1), np.float32)
    line[100] = 1
    assert domains.stroke(line).any(axis=(1, 2)).sum() == 2 * pen + 1


# ---------------------------------------------------------------- who is in which


def loaded(*names: str, seed: int = 0) -> Dataset:
    """The digits in these domains."""
    return data.load(DatasetConfig(domains=list(names)), seed)


def test_every_class_is_spread_evenly() -> None:
    digits = loaded(*ALL)
    for examples in (digits.train, digits.test):
        assert examples.groups is not None and set(examples.groups) == set(ALL)
        counts = np.array([np.bincount(examples.labels[examples.groups == name], minlength=10) for name in ALL])
        assert np.ptp(counts, axis=0).max() <= 1
        assert np.ptp(counts.sum(axis=1)) <= 1


def test_each_example_keeps_its_place_and_label_and_is_in_its_domain() -> None:
    before, after = loaded(), loaded(*ALL)
    for old, new in ((before.train, after.train), (before.test, after.test)):
        assert new.groups is not None
        assert np.array_equal(old.labels, new.labels)
        for image, changed, name in zip(old.inputs, new.inputs, new.groups, strict=True):
            assert np.array_equal(changed, domains.DOMAINS[name](image))
    assert isinstance(after.train.inputs, np.ndarray) and after.train.inputs.shape == (1438, 8, 8, 1)
    assert before.train.groups is None


def test_domains_are_the_same_for_any_run_seed_and_drawn_for_train_and_test_apart() -> None:
    one, other = loaded("plain", "blur", seed=0), loaded("plain", "blur", seed=7)
    for part in ("train", "test"):
        first, second = getattr(one, part), getattr(other, part)
        assert np.array_equal(first.groups, second.groups) and np.array_equal(first.inputs, second.inputs)
    alike = Examples(one.test.inputs, one.test.labels)
    spread = domains.spread(Dataset("image", one.classes, alike, alike), ["plain", "blur"])
    assert not np.array_equal(spread.train.groups, spread.test.groups)
    assert 0.3 < np.mean(np.asarray(one.train.groups)[:-1] == np.asarray(one.train.groups)[1:]) < 0.7  # dealt at random


def test_images_of_several_sizes_stay_a_list(tmp_path: Path) -> None:
    from PIL import Image

    lines = ["file,label"]
    for i in range(12):
        Image.fromarray(np.full((8 + i % 2, 9, 3), 51, np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{'ab'[i // 6]}")
    (tmp_path / "index.csv").write_text("\n".join(lines))
    config = DatasetConfig("files", path=str(tmp_path / "index.csv"), image="file", domains=["plain", "inversion"])
    train = data.load(config, 0).train
    assert isinstance(train.inputs, list) and train.groups is not None
    for image, name in zip(train.inputs, train.groups, strict=True):
        assert image == pytest.approx({"plain": 0.2, "inversion": 0.8}[name], abs=1e-6) and image.shape[1:] == (9, 3)


# ---------------------------------------------------------------- settings


def test_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "fine,pos\npoor,neg\n" * 4)
    with pytest.raises(ConfigError, match=r"^dataset.domains=blur changes images, and .* are text; set it to \[\]$"):
        data.load(DatasetConfig("files", path=str(path), text="text", domains=["blur"]), 0)


@pytest.mark.parametrize(
    ("names", "group", "message"),
    [
        (["plan"], None, r"dataset.domains=plan is not known; did you mean plain\?"),
        (["blur", "plain", "blur"], None, "dataset.domains=blur,plain,blur names a domain twice; name each once"),
        (["blur"], "writer", "dataset.domains=blur makes groups of its own .* dataset.group=writer; set the first"),
    ],
)
def test_what_is_refused_before_any_data(names: list[str], group: str | None, message: str) -> None:
    config = Config()
    with pytest.raises(ConfigError, match=message):
        checked(dataclasses.replace(config, dataset=DatasetConfig(domains=names, group=group)))


def test_every_domain_is_in_the_help() -> None:
    assert domains.names() == sorted(ALL)
    meaning = declared()["dataset.domains"].help
    assert all(name in meaning for name in ALL)


FILES = ["dataset=files", "dataset.path=x.csv", "dataset.image=file"]


@pytest.mark.parametrize(
    ("overrides", "expected", "group"),
    [
        (["partition=domains"], ALL, None),
        (["partition=domains", "dataset.domains=[plain,blur]"], ["plain", "blur"], None),
        (["partition=domains", "dataset.domains=[]"], [], None),
        (["dataset.domains=[blur]"], ["blur"], None),
        ([], [], None),
        (["partition=domains", *FILES, "dataset.group=writer"], [], "writer"),
        (["partition=domains", *FILES, "dataset.domains=[blur]"], ["blur"], None),
        (["partition=domains", "experiment=sst2", "dataset.path=x.tsv", "model.path=y", "dataset.group=g"], [], "g"),
    ],
)
def test_the_partition_brings_its_domains_to_the_digits_only(
    overrides: list[str], expected: list[str], group: str | None
) -> None:
    config = cli.compose(ROOT / "configs", overrides)
    assert (config.dataset.domains, config.dataset.group) == (expected, group)
    assert (config.partition.name == "domains") == ("partition=domains" in overrides)


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    fast = ["engine=inline", "device=cpu", "rounds=1", "clients=5", "fraction=null", "train.steps=1", f"results={tmp_path}"]
    done = run_py("partition=domains", "name=skewed", *fast)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "skewed" / "config.json").read_text())
    assert config["dataset"]["domains"] == ALL and config["partition"]["name"] == "domains"
    assert "288" in done.stdout or "287" in done.stdout  # 1,438 examples in 5 domains
    few = run_py("partition=domains", "clients=4", *fast[:3], f"results={tmp_path}")
    assert few.returncode == 2 and "clients=4 is less than the 5 groups of partition=domains" in few.stderr
