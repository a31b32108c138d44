"""Datasets: one table whatever the format, and one sentence for whatever is wrong with it."""

from __future__ import annotations

import csv
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
from fedlora.data import Dataset, Examples, labels
from fedlora.data.examples import ordered
from fedlora.data.partition import split_off_test
from fedlora.validate import checked

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
        checked(Config(dataset=DatasetConfig(name="digit")))
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
    assert checked(Config(dataset=config)).dataset.name == "coins"
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
    assert ordered(words) == order


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


# ---------------------------------------------------------------- classes


def labelled(*words: str) -> Dataset:
    """A dataset of text with these labels, in the order in which they come."""
    classes = list(dict.fromkeys(words))
    examples = Examples(list(words), np.array([classes.index(word) for word in words], np.int64))
    return Dataset("text", classes, examples, examples)


def test_named_classes_keep_the_order_that_they_have(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", GOOD)
    for classes in (["pos", "neg"], ["neg", "pos"], ["mixed", "pos", "neg"]):
        loaded = data.load(files(path, classes=classes, test=str(path)), 0)
        assert loaded.classes == classes
        assert [classes[label] for label in loaded.train.labels] == ["pos", "neg", "pos", "neg"]
    assert data.load(files(path), 0).classes == ["neg", "pos"]  # not named: sorted


@pytest.mark.parametrize(
    ("classes", "said"), [(["pos", "neg", "pos"], "names 'pos' twice"), (["pos"], "names only 'pos'; a classifier needs two")]
)
def test_classes_are_named_once_and_are_two_at_least(tmp_path: Path, classes: list[str], said: str) -> None:
    assert f"dataset.classes {said}" in error_of(files(write(tmp_path, "a.csv", GOOD), classes=classes))


def test_the_label_is_no_text_to_learn_it_from(tmp_path: Path) -> None:
    assert "dataset.text=text is the column of the label too" in error_of(files(write(tmp_path, "a.csv", GOOD), label="text"))


def test_a_label_of_thousands_of_letters_does_not_flood_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\n" + f"a,{'x' * 9000}\n" * 3)
    assert len(error_of(files(path))) < 200 and len(error_of(files(path, classes=["a", "b"]))) < 300


def test_classes_are_counted_in_the_order_of_the_outputs() -> None:
    dataset = labelled("b", "a", "b", "c, d")
    assert list(labels.counts(dataset).items()) == [("b", 2), ("a", 1), ("c, d", 1)]
    (row,) = labels.derived(dataset)
    assert row[:2] == ("classes", "b × 2, a × 1, 'c, d' × 1") and row[2].startswith("3 in the order of the model's outputs")
    server = Dataset("text", dataset.classes, dataset.train.take(np.zeros(0, np.int64)), dataset.test)
    assert labels.counts(server) == {"b": 0, "a": 0, "c, d": 0} and labels.derived(server)[0][1] == "b, a, 'c, d'"


def test_many_classes_do_not_flood_the_terminal() -> None:
    (row,) = labels.derived(labelled(*(f"class {i} {'x' * 99}" for i in range(1000))))
    assert row[1].endswith("… and 990 more") and len(row[1]) < 600
    pairs = labelled(*(f"{word}{i}" for i in range(50) for word in "aA"))
    assert labels.derived(pairs)[1][1].endswith("… and 40 more") and len(labels.notes(pairs)[0]) < 500


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["pos", "neg", "pos ", "Pos"], [["pos", "pos ", "Pos"]]),
        (["1", "1.0", "01", "+1", "2", "1e0"], [["1", "1.0", "01", "+1", "1e0"]]),
        (["n\u00e9", "ne\u0301"], [["n\u00e9", "ne\u0301"]]),
        (["a  b", "a b", "a\u200bb", "ab"], [["a  b", "a b"], ["a\u200bb", "ab"]]),
        (["-1", "1", "a", "b", "C", "C++", "nan", "inf", "A-", "1" * 40, "1" * 39 + "2", "9" * 5000, "1e999999999"], []),
    ],
)
def test_names_that_look_alike_are_pointed_out(names: list[str], groups: list[list[str]]) -> None:
    assert labels.alike(names) == groups
    dataset = labelled(*names)
    assert [row[0] for row in labels.derived(dataset)] == ["classes"] + ["warning"] * bool(groups)
    assert len(labels.notes(dataset)) == bool(groups)
    for name in (name for group in groups for name in group):
        assert repr(name) in labels.notes(dataset)[0] or ascii(name) in labels.notes(dataset)[0]


@pytest.mark.parametrize(
    ("rows", "distinct", "refused"), [(51, 26, True), (51, 25, False), (50, 50, False), (100, 50, False), (1000, 999, True)]
)
def test_labels_that_are_no_classes(tmp_path: Path, rows: int, distinct: int, refused: bool) -> None:
    """More than 50 rows, and more than half of them with a value of their own: answers, or measurements."""
    answers = [f"answer {i % distinct}" for i in range(rows)]
    lines = [json.dumps({"instruction": f"question {i}", "output": answer}) for i, answer in enumerate(answers)]
    path = write(tmp_path, "a.jsonl", "\n".join(lines))
    config = files(path, text="instruction", label="output", test=str(path))
    if refused:
        message = error_of(config)
        assert f"dataset.label=output has {distinct} different values in the {rows} rows of dataset.path={path}" in message
        assert "language models are not possible yet" in message and "dataset.classes" in message
        config = replace(config, classes=sorted(set(answers)))  # as it says: if they are classes, name them
    assert len(data.load(config, 0).classes) == distinct


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


ROWS = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(6)]
NESTED = [{"review": {"text": row["text"]}, "meta": {"by": {"label": row["label"]}}} for row in ROWS]


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        ("\n".join(map(json.dumps, ROWS)), {}),
        ("\r\n\r\n".join(map(json.dumps, ROWS)), {}),
        ("\ufeff" + json.dumps(ROWS), {}),
        (json.dumps(ROWS, indent=2), {}),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), {}),  # objects over several lines, in no list
        (json.dumps([ROWS[:2], [], [ROWS[2:]]], indent=1), {}),  # lists in a list
        (json.dumps(NESTED, indent=1), {"text": "review.text", "label": "meta.by.label"}),
        ("\n".join(map(json.dumps, NESTED)), {"text": "review.text", "label": "meta.by.label"}),
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_json_however_it_is_laid_out(tmp_path: Path, content: str, settings: dict[str, Any], ending: str) -> None:
    path = write(tmp_path, f"a.{ending}", content)
    loaded = data.load(files(path, test=str(path), **settings), 0)
    assert loaded.train.inputs == [row["text"] for row in ROWS]
    assert [loaded.classes[label] for label in loaded.train.labels] == [row["label"] for row in ROWS]


def test_parquet_structs_have_columns_with_a_dot_as_json_has(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(NESTED), tmp_path / "a.parquet")
    loaded = data.load(files(tmp_path / "a.parquet", text="review.text", label="meta.by.label", test_fraction=0.0), 0)
    assert loaded.train.inputs == [row["text"] for row in ROWS] and loaded.classes == ["a", "b"]


def test_a_doubled_column_of_a_parquet_file_matters_only_where_it_is_asked_for(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = [pyarrow.array(["a", "b"] * 2) for _ in range(4)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(columns, names=["text", "label", "more", "more"]), path)
    assert data.load(files(path, test=str(path)), 0).train.inputs == ["a", "b"] * 2
    assert f"dataset.text=more names several columns of dataset.path={path}; rename" in error_of(files(path, text="more"))


def test_fields_of_any_length_and_the_limit_of_other_readers_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    rows = [("x" * 200_000, "a"), ("y", "b")] * 2
    paths = [
        write(tmp_path, "a.csv", "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows)),
        write(tmp_path, "a.tsv", "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)),
    ]
    for path in paths:
        assert data.load(files(path, test=str(path)), 0).train.inputs == [text for text, _ in rows]
        assert csv.field_size_limit() == before


def test_integers_of_thousands_of_digits_are_their_digits(tmp_path: Path) -> None:
    long = {"a": "1" * 5000, "b": "2" * 5000}
    paths = [
        write(tmp_path, "a.jsonl", "".join(f'{{"text": "{t}", "label": {y}, "id": {y}}}\n' for t, y in long.items())),
        write(tmp_path, "a.csv", "text,label\n" + "".join(f"{t},{y}\n" for t, y in long.items())),
    ]
    for path in paths:
        loaded = data.load(files(path, test=str(path)), 0)
        assert loaded.classes == list(long.values()) and loaded.train.labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["reviews (1).csv", "a [b]=c, 'd' \"e\".csv", "größe 漢.csv", os.fsdecode(b"latin\xe9.csv")])
def test_names_of_files_columns_and_labels_are_any_text(tmp_path: Path, name: str) -> None:
    text, label = "the text [x=y]", 'läbel "q" ()'
    with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([(text, label), ("a", "x [b]"), ("b", "ü='1'"), ("c", "x [b]"), ("d", "ü='1'")])
    loaded = data.load(files(tmp_path / name, text=text, label=label), 0)
    assert loaded.classes == ["x [b]", "ü='1'"] and len(loaded.train) == len(loaded.test) == 2
    assert "ü" in error_of(files(tmp_path / name, text=text, label="läbel")) or "läbel" in error_of(files(tmp_path / name))
    error_of(files(tmp_path / name)).encode()  # may be printed: no half characters


# ---------------------------------------------------------------- files: what is refused


@pytest.mark.parametrize(
    ("name", "content", "settings", "parts"),
    [
        ("a.csv", 'text,label\na,1\n"b,0\n' + "c,1\n" * 9, {}, ["malformed in line 3", "is never closed"]),
        ("a.csv", 'text,label\n"b,0\nc,1\n"d",0\n', {}, ["malformed in line 2", "by one in line 4 that does not end"]),
        ("a.csv", 'text,label\n"x\nx",1\n"y\n""y","b\nc,0\n', {}, ["malformed in line 5", "is never closed"]),
        ("a.csv", '"text,label\na,1\n', {}, ["malformed in line 1", "is never closed"]),
        ("a.csv", 'text,label\n"b\nb","x",0\nc,0\n', {}, ["3 fields in lines 2 to 3", "a quoted field", "mend that line"]),
        ("a.csv", GOOD.replace(",", ";"), {}, ["has its fields between semicolons", "says commas"]),
        ("a.tsv", GOOD, {}, ["has its fields between commas", "says tabs"]),
        ("a.csv", GOOD.replace(",", ", "), {}, ["dataset.label=label is not", "' label', text; did you mean ' label'?"]),
        ("a.csv", b"\xef\xbb\xbf\n", {}, ["is empty"]),
        ("a.csv", b"\xef\xbb\xbf" * 2 + GOOD.encode(), {}, ["choose one of: label, '\\ufefftext'"]),
        ("a.csv", GOOD.encode("utf-16"), {}, ["is UTF-16 text", "save it as UTF-8"]),
        ("a.jsonl", GOOD.encode("utf-32"), {}, ["is UTF-32 text", "save it as UTF-8"]),
        ("a.csv", GOOD.encode("utf-16-le"), {}, ["has a NUL byte in line 1"]),
        ("a.csv", GOOD.replace("poor", "po\0or"), {}, ["has a NUL byte in line 3"]),
        ("a.csv", b"PAR1 and so on", {}, ["is Parquet", "the ending .parquet"]),
        ("a.csv", b"\x1f\x8b\x08", {}, ["is gzip", "unpack it"]),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\n", {}, ["is a pointer of Git LFS", "git lfs pull"]),
        (
            "a.csv",
            ",".join(f"c{i}" for i in range(999)) + ",label\n" + "x," * 999 + "x\n",
            {},
            ["choose one of: c0, c1,", "… and 980 more"],
        ),
        ("a.jsonl", '{"text": "a\\ud800b", "label": 1}', {}, ["dataset.text=text has half a", "row 1", "'a\\ud800b'"]),
        ("a.jsonl", '{"text": "a", "label": "\\udc00"}', {}, ["dataset.label=label has half a character"]),
        ("a.jsonl", '{"text\\ud800": "a", "label": 1}\n' * 2, {}, ["choose one of: label, 'text\\ud800'"]),
        ("a.jsonl", '{"text": "a", "label": 1, "text": "b"}', {}, ["has the name 'text' twice in row 1; remove one"]),
        ("a.json", '[{"a": {"b": 1, "b": 2}}]', {}, ["has the name 'a.b' twice in row 1"]),
        ("a.json", '[{"a.b": 1, "a": {"b": 2}}]', {}, ["has the name 'a.b' twice in row 1"]),
        ("a.json", json.dumps({"data": ROWS}), {}, ["holds one object (data) without text or label", "in a list"]),
        ("a.json", json.dumps({"text": {"0": "a"}, "label": {"0": "x"}}), {}, ["holds one object (label.0, text.0)"]),
        ("a.jsonl", json.dumps(NESTED[0]) * 2, {"text": "review", "label": "meta.by.label"}, ["name one of: review.text"]),
        ("a.json", "[]", {}, ["holds no examples"]),
        ("a.json", "[{}, {}]", {}, ["holds no examples"]),
        (
            "a.json",
            '{"text": "a", "label": 1},\n{"text": "b", "label": 2}',
            {},
            ["not JSON in line 1", "a comma between objects"],
        ),
        ("a.json", '[\n{"text": "a"\n"label": 1}]', {}, ["not JSON in lines 2 to 3", "Expecting ',' delimiter"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', {}, ["is not JSON in line 2"]),
        ("a.json", "[" * 900 + "7" + "]" * 900, {}, ["holds no object in line 1 but '7'"]),
        ("a.json", '{"a":' * 900 + "7" + "}" * 900, {}, ["holds one object ('a.a.a"]),
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
        ("a.tsv", "text\tlabel\na\tb\t1\n", {}, ["3 fields in line 2"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', {}, ["is not JSON in line 2", "mend that line"]),
        ("a.json", '[\n{"text": "a"}', {}, ["is not JSON in line 2"]),
        ("a.jsonl", "[" * 20_000, {}, ["is not JSON in line 1", "recursion"]),
        ("a.json", '[{"text": "a", "label": 1}, 7]', {}, ["holds no object in line 1 but '7'", "as an object"]),
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


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("pipe.png", "'pipe.png' in row 2 of dataset.path={} cannot be read as an image (a folder, a pipe or a device"),
        ("folder.png", "(a folder, a pipe or a device"),
        ("/dev/zero", "(a folder, a pipe or a device"),
        ("no.png", "'no.png' in row 2 of dataset.path={} cannot be read as an image (No such file or directory)"),
        ("x" * 5000, "(File name too long)"),
        ("a\0.png", "'a\\x00.png' in row 2"),
        ("\ud800.png", "'\\ud800.png' in row 2"),
        (5, "the image in row 2 of dataset.path={} cannot be read as an image (int, neither a path"),
        (["0.png"], "(list, neither a path nor the bytes of an image)"),
    ],
)
def test_what_is_no_image(tmp_path: Path, value: Any, said: str) -> None:
    image_files(tmp_path, pytest.importorskip("PIL.Image").new("L", (2, 2)))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    rows = [{"file": "0.png", "label": "a"}, {"file": value, "label": "b"}]
    path = write(tmp_path, "a.json", json.dumps(rows))
    message = error_of(files(path, text=None, image="file"))
    assert said.format(path) in message and len(message) < 600
    message.encode()


def test_images_in_a_parquet_file_itself(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image_files(tmp_path, pytest.importorskip("PIL.Image").new("L", (2, 3), 51))
    content = (tmp_path / "0.png").read_bytes()
    rows = [{"image": {"bytes": content, "path": None}, "label": label} for label in "ab"]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    loaded = data.load(files(path, text=None, image="image.bytes", test=str(path)), 0)
    assert np.allclose(loaded.train.inputs, 0.2) and np.shape(loaded.train.inputs) == (2, 3, 2, 1)


# ---------------------------------------------------------------- files: anything at all

PIECES = [
    '"',
    ",",
    "\n",
    "\t",
    "{",
    "}",
    "[",
    "]",
    ":",
    "\\",
    "\\ud800",
    "\0",
    "\ufeff",
    "9" * 50,
    "null",
    "true",
    "é",
    " ",
    "text",
    "1e99",
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from(PIECES)), max_size=6),
    st.booleans(),
)
def test_a_damaged_file_is_read_or_named_in_one_sentence(ending: str, damage: list[tuple[int, int, str]], image: bool) -> None:
    content = {
        ".csv": GOOD,
        ".tsv": GOOD.replace(",", "\t"),
        ".jsonl": "\n".join(map(json.dumps, ROWS)),
        ".json": json.dumps(ROWS, indent=1),
    }.get(ending, "").encode() or _parquet_of(ROWS)
    for place, length, piece in damage:
        content = content[:place] + piece.encode() + content[place + length :]
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name), f"a{ending}", content)
        config = files(path, image="text", text=None) if image else files(path)
        try:
            loaded = data.load(config, 0)
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 700
            assert str(error).encode()  # may be printed
        else:
            assert len(loaded.train) and len(loaded.classes) >= 2
            assert all(text.encode() for text in [*loaded.train.inputs, *loaded.classes])


def _parquet_of(rows: list[dict[str, Any]]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


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
    assert loaded.classes == ["pos", "neg", "unused"]  # its order, which a checkpoint's outputs have too
    assert loaded.train.inputs == ["a", "b", "c"] and loaded.train.labels.tolist() == [0, 1, 0]
    assert loaded.test.inputs == ["d"] and loaded.test.labels.tolist() == [1]


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


def test_hub_structs_have_columns_with_a_dot_as_files_have(hub: Any, tmp_path: Path) -> None:
    hub.Dataset.from_list(NESTED).save_to_disk(str(tmp_path / "one"))
    loaded = data.load(hub_config(tmp_path / "one", text="review.text", label="meta.by.label", test="train"), 0)
    assert loaded.train.inputs == [row["text"] for row in ROWS] and loaded.classes == ["a", "b"]


def test_the_hub_reads_no_file_and_no_dataset_without_splits(hub: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", GOOD)
    assert f"dataset.path={path} is a file, and dataset=hub reads none; use dataset=files" in error_of(hub_config(path))
    path = saved(hub, tmp_path)
    assert f"dataset.path={path} holds no split" in error_of(hub_config(path))


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
