"""A command line, run in this process, and what must not come of one, whatever it says."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import category
from unittest.mock import patch

import huggingface_hub.constants

from fedlora.config import Config
from fedlora.identity import flat
from fedlora.tools import cli
from tests.fuzz.patience import anew, patience

ROOT = Path(__file__).parent.parent.parent
LONG = 1500  # characters: no sentence
STATUS = {0: "done", 1: "failed", 2: "refused"}


class Outcome(NamedTuple):
    """What a command came to: its exit status and what it printed."""

    status: int
    out: str
    err: str


class Watched(io.StringIO):
    """What is printed; each line gives the command its time anew."""

    def write(self, text: str) -> int:
        text.encode()  # as a terminal would have it
        anew()
        return super().write(text)


def warm() -> None:
    """Let this process load and measure what it does once, which takes long where the machine is busy."""
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(ROOT / "configs", ["plan=true"])


def run(arguments: Sequence[str]) -> Outcome:
    """What comes of the command. Raises whatever it raises, and an AssertionError where it says nothing for too long."""
    out, err = Watched(), Watched()
    with patience(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(ROOT / "configs", list(arguments))
        except SystemExit as error:  # argparse
            status = int(error.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


def tried(arguments: Sequence[str], place: Path) -> str:
    """What the command comes to. Raises AssertionError for what must not be.

    A refused command says one sentence, which names a setting or what was typed, and leaves nothing in `place`; nor does a
    command that only tells something. A run that fails says why.
    """
    before = listing(place)
    status, out, err = run(arguments)
    left = listing(place) - before
    what = f"{shown(arguments)} said {err!r:.2000}"
    assert status in STATUS, f"exit status {status}: {what}"
    lines = err.splitlines()
    assert all(line.startswith("error: ") for line in lines), f"no sentence: {what}"
    assert all(len(line) < LONG for line in lines), f"no sentence, of {len(err)} characters: {what}"
    assert not any(category(letter) == "Cc" for line in lines for letter in line), f"control characters: {what}"
    if status == 0:
        assert out.strip() and not err, f"exit status 0: {what}"
    if status == 1:
        assert lines, f"exit status 1: {what}"
    if status == 2:
        assert len(lines) == 1 and err.endswith("\n"), f"{len(lines)} lines: {what}"
        assert names_what_is_wrong(err, arguments), f"names no setting: {what}"
    if status == 2 or not {"plan=true", "--list", "--help", "-h"}.isdisjoint(arguments):
        assert not left, f"left {sorted(left)[:3]} behind: {what}"
    return STATUS[status]


def names_what_is_wrong(sentence: str, arguments: Sequence[str]) -> bool:
    """Whether the sentence has the name of a setting in it, or what was typed for one."""
    names = flat(Config()).keys() | {text.partition("=")[0].strip("+~ ") for text in arguments}
    quoted = {ascii(text)[1:-1] for text in arguments}  # what no terminal shows as it is
    return any(word in sentence for word in names | quoted | {*arguments} if word)


def listing(place: Path) -> set[str]:
    """Every file and folder below, files with their sizes."""
    return {f"{path.relative_to(place)} {path.lstat().st_size if path.is_file() else ''}" for path in place.rglob("*")}


@contextlib.contextmanager
def standing_in(place: Path) -> Iterator[Path]:
    """Within, a folder three levels below `place` is the working directory, and no network is asked."""
    folder = place / "a" / "b" / "c"
    folder.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with (
            patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
            patch.dict(os.environ, {"FLWR_HOME": str(place / "flwr")}),
        ):
            yield folder
    finally:
        os.chdir(before)


def clear(folder: Path, keep: set[str]) -> None:
    """Remove everything in the folder but these names."""
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def shown(arguments: Sequence[str]) -> str:
    """The command as one types it, long values cut."""
    texts = (text if len(text) < 200 else f"{text[:99]}…({len(text)} characters)" for text in arguments)
    return "python run.py " + " ".join(map(shlex.quote, texts))
