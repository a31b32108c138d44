"""Datasets: one table whatever the format, and one sentence for whatever is wrong with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import data
from fedlora.check import ConfigError
from fedlora.config import Config, DatasetConfig
from fedlora.data import Dataset, Examples
from fedlora.data.partition import split_off_test

GOOD = "text,label\nfine,pos\npoor,neg\ngreat,pos\nbad,neg\n"


def files(path: Path, **settings: Any) -> DatasetConfig:
    """Settings for a text file with the columns text and label."""
    return DatasetConfig(name="files", path=str(path), **({"text": "text"} | settings))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """A new file in `folder`."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def error_of(config: DatasetConfig) -> str:
    """The sentence with which loading fails."""
    with pytest.raises(ConfigError) as caught:
        data.load(config, 0)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same(one: Examples, other: Examples) -> bool:
    """Whether two sets of text examples are equal."""
    return one.inputs == other.inputs and np.array_equal(one.labels, other.labels)


# ---------------------------------------------------------------- the package


def test_names_are_the_modules_of_the_folder_and_the_schema_knows_them() -> None:
    assert {"digits", "files", "hub"} <= set(data.names())
    with pytest.raises(ConfigError, match=r"dataset.name=digit is not known; did you mean digits\?"):
        Config(dataset=DatasetConfig(name="digit")).checked()
    with pytest.raises(ConfigError, match=r"dataset.name=_table"):
        data.load(DatasetConfig(name="_table"), 0)


def test_a_new_dataset_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path,
        "coins.py",
        "import numpy as np\n"
        "from fedlora.data import Dataset, Examples\n"
        "def load(config, seed):\n"
        "    coins = Examples(['h', 't', str(seed)], np.array([0, 1, 1]))\n"
        "    return Dataset('text', ['heads', 'tails'], coins, coins)\n",
    )
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "fedlora.data.coins", raising=False)
    config = DatasetConfig(name="coins")
    assert Config(dataset=config).checked().dataset.name == "coins"
    assert data.load(config, 7).train.inputs == ["h", "t", "7"]


def test_importing_the_package_imports_no_heavy_library() -> None:
    program = (
        "import sys, fedlora.config, fedlora.data.partition; fedlora.data.names(); "
        "print([m for m in ('pandas', 'sklearn', 'torch', 'datasets', 'pyarrow', 'PIL') if m in sys.modules])"
    )
    root = Path(data.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "order"),
    [
        (["10", "9", "-1", "9"], ["-1", "9", "10"]),
        (["10", "9", "b"], ["10", "9", "b"]),
        (["b", "a", "B"], ["B", "a", "b"]),
        (["1", "01"], ["01", "1"]),
        (["1.5", "10"], ["1.5", "10"]),
        ([], []),
    ],
)
def test_ordered(words: list[str], order: list[str]) -> None:
    assert data.ordered(words) == order


@pytest.mark.parametrize("as_array", [True, False])
def test_take_keeps_inputs_labels_and_groups_together(as_array: bool) -> None:
    images = [np.full((2, 2, 1), i, np.float32) for i in range(4)]
    examples = Examples(np.stack(images) if as_array else images, np.arange(4), np.array(["a", "b", "c", "d"]))
    taken = examples.take(np.array([3, 1]))
    assert len(examples) == 4 and len(taken) == 2
    assert [np.max(image) for image in taken.inputs] == [3, 1]
    assert isinstance(taken.inputs, np.ndarray) is as_array
    assert taken.labels.tolist() == [3, 1]
    assert taken.groups is not None and taken.groups.tolist() == ["d", "b"]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([], [0], "dataset=stub has no training examples"),
        ([0, 1], [], "dataset=stub has no test examples"),
        ([1, 1], [1], "dataset.label=label has only the class 'dog'"),
        ([0, 1], [1, 2], "the class 'eel' of the test set has no training example"),
    ],
)
def test_every_dataset_can_train_and_test(
    train: list[int], test: list[int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def examples(labels: list[int]) -> Examples:
        return Examples(["x"] * len(labels), np.array(labels, np.int64))

    made = Dataset("text", ["cat", "dog", "eel"], examples(train), examples(test))
    monkeypatch.setitem(sys.modules, "fedlora.data.stub", types.SimpleNamespace(load=lambda config, seed: made))
    monkeypatch.setattr(data, "names", lambda: ["stub"])
    assert message in error_of(DatasetConfig(name="stub"))


# ---------------------------------------------------------------- the test split


def test_digits_are_images_in_0_1_split_by_class() -> None:
    from sklearn.datasets import load_digits

    digits, theirs = data.load(DatasetConfig(), 0), load_digits()
    rows = np.concatenate([digits.train.inputs, digits.test.inputs]).reshape(1797, 64) * 16
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    both = [np.unique(np.column_stack([a, b]), axis=0) for a, b in ((rows, labels), (theirs.data, theirs.target))]
    assert np.array_equal(both[0], both[1])
    assert digits.kind == "image" and digits.classes == list("0123456789")
    assert len(digits.train) + len(digits.test) == 1797
    assert isinstance(digits.train.inputs, np.ndarray)
    assert digits.train.inputs.shape == (len(digits.train), 8, 8, 1)
    assert digits.train.inputs.dtype == np.float32 and digits.train.labels.dtype == np.int64
    assert digits.train.inputs.min() == 0 and digits.train.inputs.max() == 1
    share = np.bincount(digits.test.labels) / np.bincount(np.r_[digits.test.labels, digits.train.labels])
    assert np.all(np.abs(share - 0.2) < 0.005)


def test_the_test_set_is_the_same_for_every_run_seed(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\n" + "".join(f"t{i},{i % 3}\n" for i in range(60)))
    runs = [data.load(files(path), seed) for seed in (0, 1)]
    assert same(runs[0].test, runs[1].test) and same(runs[0].train, runs[1].train)
    assert sorted([*runs[0].train.inputs, *runs[0].test.inputs]) == sorted(f"t{i}" for i in range(60))
    assert np.bincount(runs[0].test.labels).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("sizes", "share", "tested"),
    [
        ([10, 20], 0.2, [2, 4]),
        ([2, 3], 0.01, [1, 1]),  # at least one of each class is tested,
        ([2, 3], 0.99, [1, 2]),  # and at least one trained on,
        ([1, 5], 0.2, [0, 1]),  # the latter first
    ],
)
def test_split_off_test_by_class(sizes: list[int], share: float, tested: list[int]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    train, test = split_off_test(labels, share)
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert np.bincount(labels[test], minlength=len(sizes)).tolist() == tested


def test_without_a_second_example_of_any_class_there_is_no_test_set(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\na,x\nb,y\n")
    assert "no test examples; add examples or name a test set by dataset.test" in error_of(files(path))


# ---------------------------------------------------------------- files: what is read


FIELD = st.text(st.characters(exclude_characters="\t\n\r\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(FIELD, st.sampled_from(["NA", "null", '"', "x,y", " a", "\u2028"])), min_size=3, max_size=8))
def test_every_format_gives_the_same_dataset(rows: list[tuple[str, str]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows += [("first", "A"), ("second", "B")] * 2  # two classes that can be split
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quoted = "".join(",".join('"' + field.replace('"', '""') + '"' for field in row) + "\n" for row in rows)
        records = [{"text": text, "label": label} for text, label in rows]
        paths = [
            write(folder, "a.csv", "text,label\n" + quoted),
            write(folder, "a.tsv", "text\tlabel\n" + "".join("\t".join(row) + "\n" for row in rows)),
            write(folder, "a.jsonl", "".join(json.dumps(record) + "\n" for record in records)),
            write(folder, "b.NDJSON", "\n".join(json.dumps(record, ensure_ascii=False) for record in records)),
            folder / "a.Parquet",
        ]
        parquet.write_table(pyarrow.table({"text": [r[0] for r in rows], "label": [r[1] for r in rows]}), paths[-1])
        loaded = [data.load(files(path), 0) for path in paths]
    for other in loaded:
        assert other.classes == loaded[0].classes == sorted({label for _, label in rows})
        assert same(other.train, loaded[0].train) and same(other.test, loaded[0].test)
    held = [(text, loaded[0].classes[i]) for text, i in zip(loaded[0].test.inputs, loaded[0].test.labels, strict=True)]
    kept = [(text, loaded[0].classes[i]) for text, i in zip(loaded[0].train.inputs, loaded[0].train.labels, strict=True)]
    assert sorted(held + kept) == sorted(rows)


def test_integer_labels_and_groups_are_the_same_with_and_without_types(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"text": ["a", "b", "c", "7"], "label": [10, 9, 10, 9], "user": [3, 20, 3, 20]}
    rows = list(zip(*columns.values(), strict=True))
    paths = [
        write(tmp_path, "a.csv", "text,label,user\n" + "".join(f"{t},{y},{u}\n" for t, y, u in rows)),
        write(tmp_path, "a.json", "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)),
        tmp_path / "a.parquet",
    ]
    parquet.write_table(pyarrow.table(columns), paths[2])
    for path in paths:
        loaded = data.load(files(path, test=str(path), group="user"), 0)
        assert loaded.kind == "text" and loaded.classes == ["9", "10"]
        assert loaded.train.inputs == ["a", "b", "c", "7"]
        assert loaded.train.labels.tolist() == loaded.test.labels.tolist() == [1, 0, 1, 0]
        assert loaded.train.groups is not None and loaded.train.groups.tolist() == ["3", "20", "3", "20"]


def test_columns_name_the_fields_of_a_headerless_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'a "fine film\t1\npoor\t0\n\ngood\t1\nbad\t0\n')
    test = write(tmp_path, "b.tsv", "good\t0\n")
    loaded = data.load(files(path, columns=["sentence", "label"], text="sentence", test=str(test)), 0)
    assert loaded.train.inputs == ['a "fine film', "poor", "good", "bad"]
    assert loaded.test.inputs == ["good"] and loaded.test.labels.tolist() == [0]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path: Path) -> None:
    for name, content in [("a.csv", GOOD), ("a.tsv", GOOD.replace(",", "\t"))]:
        path = write(tmp_path, name, b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
        loaded = data.load(files(path, test=str(path)), 0)
        assert loaded.train.inputs == ["fine", "poor", "great", "bad"] and loaded.classes == ["neg", "pos"]


# ---------------------------------------------------------------- files: what is refused


@pytest.mark.parametrize(
    ("name", "content", "settings", "parts"),
    [
        ("a.csv", "", {}, ["dataset.path=", "is empty"]),
        ("a.parquet", b"", {}, ["is empty"]),
        ("a.csv", " \n\n", {}, ["is empty"]),
        ("a.csv", "text,label\n", {}, ["holds no examples"]),
        ("a.txt", GOOD, {}, ["ends in '.txt', which is not known", ".csv", ".parquet"]),
        ("data", GOOD, {}, ["ends in ''"]),
        ("a.csv", "text,label\nok,1\ncaf\xe9,0\n".encode("latin-1"), {}, ["is not UTF-8 in line 3"]),
        ("a.jsonl", b'{"text": "\xff"}', {}, ["is not UTF-8 in line 1"]),
        ("a.csv", "text,label\na,1\nb,0,x\n", {}, ["3 fields in line 3", "2 columns ('text', 'label')"]),
        ("a.csv", "text,label\na,1,x\nb,0,x\n", {}, ["3 fields in line 2", "2 columns"]),
        ("a.csv", "text,label\na,1\n\nb\n", {}, ["1 fields in line 4"]),
        ("a.csv", 'text,label\na,1\n"b,0\n', {}, ["malformed in line 3", "mend that line"]),
        ("a.csv", f"text,label\n{'a' * 200_000},1\n", {}, ["malformed in line 2", "limit", "JSON Lines or Parquet"]),
        ("a.tsv", "text\tlabel\na\tb\t1\n", {}, ["3 fields in line 2"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', {}, ["is not JSON in line 2", "mend that line"]),
        ("a.json", '[\n{"text": "a"}]', {}, ["is not JSON in line 1"]),
        ("a.jsonl", "[" * 20_000, {}, ["is not JSON in line 1", "recursion"]),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", {}, ["is not JSON in line 1", "digits"]),
        ("a.json", '[{"text": "a", "label": 1}]', {}, ["holds no object in line 1", "without a list"]),
        ("a.parquet", GOOD, {}, ["is not a Parquet file"]),
        ("a.csv", GOOD, {"text": "txet"}, ["dataset.text=txet", "which has label, text; did you mean text?"]),
        ("a.csv", GOOD, {"text": "body"}, ["dataset.text=body is not a column", "choose one of: label, text"]),
        ("a.csv", GOOD, {"label": "labels"}, ["dataset.label=labels", "did you mean label?"]),
        ("a.csv", GOOD, {"group": "user"}, ["dataset.group=user is not a column", "choose one of: label, text"]),
        ("a.jsonl", '{"text": "a", "label": 1}', {"text": "body"}, ["dataset.text=body", "choose one of: label, text"]),
        ("a.csv", "text,text,label\na,b,1\n", {}, ["dataset.text=text names several columns"]),
        ("a.csv", "fine,1\npoor,0\n", {}, ["first line is 'fine', '1'", "dataset.columns=[text,label]"]),
        ("a.tsv", f"{'long ' * 20}\t1\n", {}, ["'long long long", "…', '1'", "dataset.columns=[text,label]"]),
        ("a.csv", GOOD, {"columns": ["text", "label"]}, ["dataset.columns repeats; remove dataset.columns"]),
        ("a.csv", "fine,1\n", {"columns": ["text", "label", "user"]}, ["2 fields in line 1", "3 columns"]),
        ("a.jsonl", '{"text": "a"}', {"columns": ["text"]}, ["dataset.columns=['text'] is for CSV and TSV"]),
        ("a.csv", "text,label\na,1\n,0\n", {}, ["dataset.text=text has no value in row 2", "first example is row 1"]),
        ("a.csv", "text,label\na,1\nb,\n", {}, ["dataset.label=label has no value in row 2"]),
        ("a.csv", "text,label,u\na,1,x\nb,0,\n", {"group": "u"}, ["dataset.group=u has no value in row 2"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', {}, ["dataset.label=label has no value in row 2"]),
        ("a.jsonl", '{"text": null, "label": 1}', {}, ["dataset.text=text has no value in row 1"]),
        ("a.jsonl", '{"text": "a", "label": NaN}', {}, ["dataset.label=label has no value in row 1"]),
        ("a.jsonl", '{"text": "a", "label": 0.5}', {}, ["dataset.label=label is 0.5 in row 1", "text nor an integer"]),
        ("a.jsonl", '{"text": "a", "label": true}', {}, ["dataset.label=label is True in row 1"]),
        ("a.jsonl", '{"text": ["a"], "label": 1}', {}, ["dataset.text=text is ['a'] in row 1"]),
        ("a.csv", "text,label\na,1\nb,1\n", {}, ["dataset.label=label has only the class '1'"]),
    ],
)
def test_what_is_wrong_with_a_file(
    tmp_path: Path, name: str, content: str | bytes, settings: dict[str, Any], parts: list[str]
) -> None:
    message = error_of(files(write(tmp_path, name, content), **settings))
    assert name in message or "has only the class" in message
    for part in parts:
        assert part in message


def test_a_path_that_is_no_readable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist (looked for /" in error_of(files(Path("nowhere/a.csv")))
    assert "is a folder; name one file in it" in error_of(files(tmp_path))

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a.csv", GOOD)
    monkeypatch.setattr(Path, "read_bytes", refuse)  # the tests may run as root, whom no permission stops
    assert f"dataset.path={path} cannot be read (Permission denied)" in error_of(files(path))


def test_an_error_in_the_test_file_names_the_test_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", GOOD)
    missing = error_of(files(path, test=str(tmp_path / "b.csv")))
    assert missing.startswith("dataset.test=") and "does not exist" in missing
    test = write(tmp_path, "c.csv", "text,label\nx,pos\ny,mixed\n")
    unseen = error_of(files(path, test=str(test)))
    assert f"dataset.label=label is 'mixed' in row 2 of dataset.test={test}, a class without training" in unseen
    empty = write(tmp_path, "d.csv", "text,label\n")
    assert "dataset=files has no test examples" in error_of(files(path, test=str(empty)))


@pytest.mark.parametrize("setting", ["path", "test"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.csv", "does not exist (looked for /"),
        ("a.txt", "ends in '.txt', which is not known; use one of: .csv"),
        ("a.csv.gz", "ends in '.gz', which is not unpacked here; unpack it"),
        ("folder", "is a folder; name one file in it"),
        ("pipe.csv", "is no regular file but a pipe or a device"),
        ("loop.csv", "cannot be read ("),
        ("a.csv/b.csv", "cannot be read (Not a directory)"),
        ("n" * 300 + ".csv", "cannot be read (File name too long)"),
        ("a\0.csv", "is not a path (embedded null byte)"),
        ("\ud800.csv", "is not a path ("),
        (" ", "names no file"),
        ("~nobody-of-that-name/a.csv", "is not a path ("),
    ],
)
def test_files_are_checked_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for there in ("a.csv", "a.txt", "a.csv.gz"):
        write(tmp_path, there, GOOD)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    config = replace(files(Path("a.csv"), test="a.csv"), **{setting: name})
    with pytest.raises(ConfigError) as early:
        data.check_files(config)
    assert str(early.value).startswith(f"dataset.{setting}=") and said in str(early.value)
    assert error_of(config) == str(early.value)


def test_to_check_files_reads_none_and_loads_no_library(tmp_path: Path) -> None:
    path = write(tmp_path, "a b (1) [x=y] 'ü'.parquet", b"no Parquet")
    program = (
        "import sys; from fedlora import data; from fedlora.config import DatasetConfig; "
        "data.check_files(DatasetConfig()); data.check_files(DatasetConfig('files', path=sys.argv[1])); "
        "data.check_files(DatasetConfig('hub', path='owner/name')); "
        "print([m for m in ('pandas', 'sklearn', 'torch', 'datasets', 'pyarrow', 'PIL', 'ray') if m in sys.modules])"
    )
    root = Path(data.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_local_folder_for_the_hub_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset.path=/nowhere/x is not a folder; correct the path, or give"):
        data.check_files(DatasetConfig("hub", path="/nowhere/x", text="text"))
    data.check_files(DatasetConfig("hub", path=str(tmp_path), text="text"))


# ---------------------------------------------------------------- images


def image_files(folder: Path, *images: Any) -> Path:
    """A CSV beside PNG files of `images`, with alternating labels."""
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    rows = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(len(images)))
    return write(folder, "index.csv", "file,label\n" + rows)


def images_of(path: Path) -> Any:
    """The pixels of the files that a CSV lists."""
    loaded = data.load(files(path, text=None, image="file", test=str(path)), 0)
    assert loaded.kind == "image"
    return loaded.train.inputs


def test_images_of_one_shape_are_one_array(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    red = image.new("RGB", (3, 2), (255, 0, 51))  # Pillow counts width first
    pixels = images_of(image_files(tmp_path, red, image.new("RGBA", (3, 2), (0, 255, 0, 0))))
    assert isinstance(pixels, np.ndarray) and pixels.shape == (2, 2, 3, 3) and pixels.dtype == np.float32
    assert np.allclose(pixels[0], [1, 0, 0.2]) and np.allclose(pixels[1], [0, 1, 0])


def test_images_of_several_shapes_are_a_list(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    deep = image.fromarray(np.full((2, 2), 13107, np.uint16))  # 16 bits: 65535 is white
    pixels = images_of(image_files(tmp_path, image.new("L", (4, 5), 51), deep, image.new("1", (1, 1), 1)))
    assert isinstance(pixels, list) and [one.shape for one in pixels] == [(5, 4, 1), (2, 2, 1), (1, 1, 1)]
    assert [round(float(one.max()), 6) for one in pixels] == [0.2, 0.2, 1.0]
    assert all(one.dtype == np.float32 for one in pixels)


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    lying = image.fromarray(np.array([[0, 255]], np.uint8))
    exif = lying.getexif()
    exif[0x0112] = 6  # orientation: to be turned by 90° clockwise
    lying.save(tmp_path / "a.png", exif=exif)
    path = write(tmp_path, "a.csv", "file,label\na.png,x\na.png,y\n")
    assert images_of(path)[0].tolist() == [[[0.0]], [[1.0]]]


def test_pixels_without_a_fixed_range_are_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("F", (2, 2), 0.5).save(tmp_path / "a.tiff")
    path = write(tmp_path, "a.csv", "file,label\na.tiff,x\na.tiff,y\n")
    assert "'a.tiff' in row 1" in error_of(files(path, text=None, image="file"))


@pytest.mark.parametrize("content", [None, b"no image", "half"])
def test_an_image_that_cannot_be_read(tmp_path: Path, content: str | bytes | None) -> None:
    image = pytest.importorskip("PIL.Image")
    noise = image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8))
    path = image_files(tmp_path, noise, noise)
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").unlink()
    if content is not None:
        write(tmp_path, "1.png", whole[: len(whole) // 2] if content == "half" else content)
    message = error_of(files(path, text=None, image="file"))
    assert f"dataset.image=file: '1.png' in row 2 of dataset.path={path} cannot be read as an image" in message


# ---------------------------------------------------------------- hub, without a network


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package `datasets`, silent and with its cache in `tmp_path`."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    package.disable_progress_bars()
    return package


def hub_config(path: Path, **settings: Any) -> DatasetConfig:
    """Settings for a dataset with the columns text and label."""
    return DatasetConfig(name="hub", path=str(path), **({"text": "text"} | settings))


def saved(hub: Any, folder: Path, features: Any = None, **splits: dict[str, Any]) -> Path:
    """A folder that `save_to_disk` has written."""
    path = folder / "saved"
    made = {name: hub.Dataset.from_dict(columns, features=features) for name, columns in splits.items()}
    hub.DatasetDict(made).save_to_disk(str(path))
    return path


def test_hub_class_names_come_from_the_feature(hub: Any, tmp_path: Path) -> None:
    features = hub.Features(text=hub.Value("string"), label=hub.ClassLabel(names=["pos", "neg", "unused"]))
    train: dict[str, Any] = {"text": ["a", "b", "c"], "label": [0, 1, 0]}
    path = saved(hub, tmp_path, features, train=train, dev={"text": ["d"], "label": [1]})
    loaded = data.load(hub_config(path, test="dev"), 0)
    assert loaded.classes == ["neg", "pos", "unused"]
    assert loaded.train.inputs == ["a", "b", "c"] and loaded.train.labels.tolist() == [1, 0, 1]
    assert loaded.test.inputs == ["d"] and loaded.test.labels.tolist() == [0]


def test_hub_and_files_give_the_same_dataset(hub: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write(folder, "train.csv", GOOD)
    from_file, from_folder = data.load(files(path), 0), data.load(hub_config(folder), 0)
    assert from_folder.classes == from_file.classes == ["neg", "pos"]
    assert same(from_folder.train, from_file.train) and same(from_folder.test, from_file.test)


def test_hub_groups_and_a_dataset_saved_without_splits(hub: Any, tmp_path: Path) -> None:
    rows: dict[str, Any] = {"text": ["a", "b", "c", "d"], "label": [10, 9, 10, 9], "user": ["u", "v", "u", "v"]}
    hub.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "one"))
    loaded = data.load(hub_config(tmp_path / "one", group="user", test="train"), 0)
    assert loaded.classes == ["9", "10"] and loaded.train.labels.tolist() == [1, 0, 1, 0]
    assert loaded.train.groups is not None and loaded.train.groups.tolist() == ["u", "v", "u", "v"]


def test_hub_images(hub: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    features = hub.Features(image=hub.Image(), label=hub.Value("string"))
    grey = [image.new("L", (3, 2), value) for value in (0, 51, 255)]
    path = saved(hub, tmp_path, features, train={"image": grey, "label": ["a", "b", "a"]})
    loaded = data.load(hub_config(path, text=None, image="image", test="train"), 0)
    assert loaded.kind == "image" and isinstance(loaded.train.inputs, np.ndarray)
    assert loaded.train.inputs.shape == (3, 2, 3, 1)
    assert np.allclose(loaded.train.inputs.mean((1, 2, 3)), [0, 0.2, 1])
    message = error_of(hub_config(path, text=None, image="label"))
    assert "dataset.image=label is not an image feature of dataset.train_split=train" in message


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"train_split": "trian"}, ["dataset.train_split=trian is not known; did you mean train?"]),
        ({"test": "validation"}, ["dataset.test=validation is not known; choose one of: secret, train"]),
        ({"test": "secret"}, ["dataset.test=secret of dataset.path=", "has unlabelled rows"]),
        ({"text": "sentence"}, ["dataset.text=sentence is not a column of dataset.train_split=train", "label, text"]),
    ],
)
def test_what_is_wrong_with_a_hub_dataset(hub: Any, tmp_path: Path, settings: dict[str, Any], parts: list[str]) -> None:
    features = hub.Features(text=hub.Value("string"), label=hub.ClassLabel(names=["neg", "pos"]))
    train: dict[str, Any] = {"text": ["a", "b"], "label": [0, 1]}
    secret: dict[str, Any] = {"text": ["c"], "label": [-1]}
    path = saved(hub, tmp_path, features, train=train, secret=secret)
    message = error_of(hub_config(path, **settings))
    for part in parts:
        assert part in message


def test_a_missing_value_on_the_hub(hub: Any, tmp_path: Path) -> None:
    path = saved(hub, tmp_path, train={"text": ["a", None], "label": ["x", "y"]})
    assert "dataset.text=text has no value in row 2 of dataset.train_split=train" in error_of(hub_config(path))


def test_no_network_is_one_sentence(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str, subset: str | None) -> None:
        raise ConnectionError(f"Couldn't reach\n{path} / {subset}")

    monkeypatch.setattr(hub, "load_dataset", unreachable)
    message = error_of(hub_config(Path("some/name"), subset="small"))
    assert "dataset.path=some/name dataset.subset=small cannot be loaded (Couldn't reach some/name / small)" in message
    assert "name a local folder" in message


def test_a_folder_that_is_no_dataset(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    assert f"dataset.path={tmp_path / 'void'} cannot be loaded" in error_of(hub_config(tmp_path / "void"))


def test_without_the_package_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'fedlora[hub]'" in error_of(hub_config(Path("some/name")))
