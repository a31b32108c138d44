"""Small data files of odd contents, damaged, misnamed: a dataset comes of them, or one sentence."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from fedlora.check import ConfigError
from fedlora.compute import workbench
from fedlora.config import from_dict
from fedlora.validate import checked
from tests import tiny
from tests.fuzz import damage
from tests.fuzz.commands import LONG as NO_SENTENCE
from tests.fuzz.patience import patience
from tests.fuzz.searched import searched

WORDS = (*tiny.VOCABULARY, "the", "is", "long", "x")
LONG = "9" * 5000  # digits: in JSON as a number
ODD = (
    "", " ", "a", "NA", "null", "nan", "0", "1.0", "01", '"', "'", '""', "a,b", "a\tb", "a\nb", "a\r\nb", "a\rb", "\u2028",
    "\x00", "\ud800", "\ufeff", "é", "🙂", "\x1b[2J", "=1+1", "[PAD]", "[SEP] [CLS]", "[UNK]", "<s>", "word " * 600,
    "x" * 9000, "{", "[1]", LONG,
)  # fmt: skip
ODDER = (None, True, 0, 1, -1, 1.5, float("nan"), float("inf"), 10**30, LONG, [], {}, [1], {"a": 1}, b"x")
NAMES = ("t", "reviews (1)", "a b", "é", "x=y", "a,b", "it's", "[1]", "x" * 200, "a.b", "-", "~", "${x}", "#", "%s")
COLUMNS = ("text", "label", "id", "text ", "Text", "", "é", "a b", "label", "\ud800", "x=y")
FILES = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"<!DOCTYPE html><html></html>",
    b"PK\x03\x04" + bytes(60), b"PAR1PAR1", b"\x00" * 100, b"\xff\xfea\x00", b"[]", b"{}", b"[[1]]", b"null", b'"x"', b"[{}]",
    b'{"a": [1, 2]}', b"text,label", b"text,label\n", b"\n\n", b"\x89PNG\r\n\x1a\n",
)  # fmt: skip
ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".ndjson", ".parquet", ".CSV", ".txt", "", ".csv.gz", ".xlsx")

Rows = list[list[Any]]


def _csv(names: Sequence[str], rows: Rows, **dialect: Any) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows([names, *rows])
    return file.getvalue().encode("utf-8", "surrogatepass")


def _lines(names: Sequence[str], rows: Rows) -> bytes:
    return b"\n".join(_json(dict(zip(names, row, strict=True))) for row in rows)


def _array(names: Sequence[str], rows: Rows) -> bytes:
    return _json([dict(zip(names, row, strict=True)) for row in rows], indent=2)


def _columns(names: Sequence[str], rows: Rows) -> bytes:
    """An object of columns, as pandas writes it."""
    return _json({"data": {name: [row[i] for row in rows] for i, name in enumerate(names)}})


def _json(value: Any, **how: Any) -> bytes:
    return json.dumps(value, default=str, **how).replace(f'"{LONG}"', LONG).encode()


def _parquet(names: Sequence[str], rows: Rows) -> bytes:
    import pyarrow
    from pyarrow import parquet

    columns = []
    for number in range(len(names)):
        values = [row[number] for row in rows]
        try:
            columns.append(pyarrow.array(values))
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, TypeError):  # of several types
            columns.append(pyarrow.array([ascii(value)[:99] for value in values]))
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns, names=[name.encode("utf-8", "replace").decode() for name in names]), file)
    return file.getvalue()


WRITERS: dict[str, Callable[[Sequence[str], Rows], bytes]] = {
    ".csv": _csv,
    ".tsv": lambda names, rows: _csv(names, rows, delimiter="\t"),
    ".jsonl": _lines,
    ".json": _array,
    ".ndjson": _columns,
    ".parquet": _parquet,
}


@st.composite
def files(draw: Any) -> tuple[str, bytes]:
    """The name of a file and its bytes."""
    names = ["text", "label", *draw(st.one_of(st.just([]), st.lists(st.sampled_from(COLUMNS), max_size=2)))]
    plain, odd, odder = (st.sampled_from(values) for values in (("good film", "bad film", "the film is long"), ODD, ODDER))
    classes = st.sampled_from(["yes", "no"])
    value, label = [
        (plain, classes),
        (
            st.one_of(plain, st.text(st.characters(), min_size=1, max_size=9)),
            st.sampled_from(["yes", "no", "1", "1.0", "Yes "]),
        ),
        (st.one_of(plain, odd), classes),
        (st.one_of(plain, odd, odder), st.one_of(odd, odder)),
    ][draw(st.integers(0, 3))]
    rows = draw(st.lists(st.tuples(value, label, *[value] * (len(names) - 2)).map(list), max_size=8))
    rows += [["a film", "yes", *["x"] * (len(names) - 2)], ["a bad film", "no", *["x"] * (len(names) - 2)]] * 5
    ending = draw(st.sampled_from(sorted(WRITERS)))
    content = WRITERS[ending](names, rows)
    how = draw(st.integers(0, 19))
    if how < 5:
        content = damage.damaged(content, draw(st.randoms(use_true_random=False)))
    elif how == 5:
        content = draw(st.sampled_from(FILES))
    elif how < 8:
        content = draw(st.sampled_from(OTHERWISE))(content)
    if draw(st.integers(0, 19)) == 0:
        ending = draw(st.sampled_from(ENDINGS))
    return draw(st.sampled_from(NAMES)) + ending, content


OTHERWISE: tuple[Callable[[bytes], bytes], ...] = (  # as other programs write it
    gzip.compress,
    lambda content: b"\xef\xbb\xbf" + content,
    lambda content: content.replace(b"\n", b"\r\n"),
    lambda content: content.replace(b"\r\n", b"\r"),
    lambda content: content + b"\n\n",
    lambda content: content[:-1],
    lambda content: content.decode("utf-8", "replace").encode("utf-16"),
    lambda content: content.decode("utf-8", "replace").encode("latin-1", "replace"),
)


@st.composite
def pictures(draw: Any) -> bytes:
    """The bytes of an image of any kind, perhaps damaged."""
    mode = draw(st.sampled_from(["L", "RGB", "RGBA", "P", "1", "CMYK", "I;16", "I", "F", "LA", "YCbCr"]))
    kind = draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"]))
    size = draw(st.sampled_from([(8, 8), (1, 1), (3, 7), (40, 40), (1, 400)]))
    file = io.BytesIO()
    try:
        Image.new(mode, size, 1 if mode not in ("RGB",) else (1, 2, 3)).save(file, kind)
    except Exception:  # this kind of file has no such mode
        Image.new("L", size, 9).save(file, "PNG")
    how = draw(st.integers(0, 3))
    return damage.damaged(file.getvalue(), draw(st.randoms(use_true_random=False))) if how == 0 else file.getvalue()


KEPT: dict[str, Any] = {"clients": 2, "device": "cpu", "partition": {"name": "iid", "min_examples": 1}}


def read(dataset: dict[str, Any], model: Path | None = None) -> str:
    """What comes of a run that begins with these files: its examples are read and encoded, or refused in one sentence."""
    chosen = {"model": {"name": "hf", "path": str(model), "max_length": 16}} if model else {}
    try:
        bench = workbench.refreshed(checked(from_dict({"dataset": {"name": "files", **dataset}, **KEPT, **chosen})))
        for examples, encoded in ((bench.dataset.train, bench.train), (bench.dataset.test, bench.test)):
            assert len(examples) == len(examples.labels) == len(encoded)
            assert np.all((examples.labels >= 0) & (examples.labels < len(bench.dataset.classes)))
            if len(encoded):
                encoded.batch(np.arange(len(encoded)), bench.model.device)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < NO_SENTENCE, str(error)
        assert re.search("dataset|model|partition|clients", str(error)), f"names no setting: {error}"
        return "refused"
    return "read"


@contextlib.contextmanager
def part(folder: Path) -> Iterator[Callable[[int], Counter[str]]]:
    """The function from a seed to what came of its files."""
    model = tiny.bert(folder / "model", ["no", "yes"], WORDS)

    def tried(file: tuple[str, bytes] | list[bytes]) -> str:
        place = folder / "data"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if isinstance(file, tuple):
            (place / file[0]).write_bytes(file[1])
            with patience():
                return read({"path": str(place / file[0]), "text": "text", "label": "label"}, model)
        for number, content in enumerate(file):
            (place / f"{number}.png").write_bytes(content)
        lines = [f"{number}.png,{'yes' if number % 2 else 'no'}\n" for number in range(len(file))]
        (place / "t.csv").write_text("image,label\n" + "".join(lines))
        with patience():
            return read({"path": str(place / "t.csv"), "image": "image", "label": "label"})

    yield searched(st.one_of(files(), files(), st.lists(pictures(), min_size=4, max_size=6)), tried)
