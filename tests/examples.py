"""The examples of README.md and docs/*.md: how they are found, checked and run. `tests/test_examples.py` uses it.

    python -m tests.examples                     # runs every `python run.py …` of all pages as printed: an hour or more
    python -m tests.examples docs/privacy.md     # of this page
    python -m tests.examples --tiny README.md    # with rounds=1 train.steps=2 behind each command

The language of a code block says what it is:

* `sh`: commands. A shell reads all blocks of a page, in their order, in an empty folder with the files of `materials`. In
  place of the programs it calls functions that note the arguments, so loops, quotes and variables count and nothing is
  trained. The noted arguments must be accepted by whoever would get them. Programs of others (`FOREIGN`) are not asked.
* `python`, `yaml` below a sentence that names a file of the project (`strategies/mine.py`:): the file. The page's commands
  are then run, in a copy of the project that has these files.
* `python` otherwise: run with the names of `CONTEXT`, which the page's text introduces.
* `text`: what a program prints, a file's lines or a picture.

A comment before a block, `<!-- needs: a second machine -->`, says why its commands are checked and never run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fedlora.check import ConfigError
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "python", "yaml", "text"}
FOREIGN = ("flower-superlink", "flwr", "ray", "sleep", "sha256sum", "grep")  # programs whose arguments nobody checks here
FILE = re.compile(r"\.(py|json|yaml|tsv|safetensors)$")
NO_SETTINGS = ("strategy.job", "train.sketch", "train.project")  # a method, and kinds of Flower's messages
CALL = re.compile(r"[\w.]+\(")  # of Python
TINY = ["rounds=1", "train.steps=2"]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
NAMED_FILE = re.compile(r"`((?:strategies|fedlora|configs)/[\w/]+\.(?:py|yaml))`")
NEEDS = re.compile(r"<!-- needs: (.+?) -->\s*$")
SPAN = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: Path
    line: int
    language: str
    text: str
    file: str | None  # the file of the project that it is
    needs: str | None  # what its commands need that a test does not have

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in their order."""
    text, start, found = page.read_text(encoding="utf-8"), 0, []
    for fence in FENCE.finditer(text):
        before = text[start : fence.start()]
        start, needs = fence.end(), NEEDS.search(before)
        said = before.strip().split("\n\n")[-1]  # the paragraph that leads to the block
        named = NAMED_FILE.findall(said) if fence[1] in ("python", "yaml") and said.endswith(":") else []
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence[1], fence[2], named[-1] if named else None, needs[1] if needs else None))
    return found


def spans(page: Path) -> list[str]:
    """What stands between single backquotes, outside of code blocks."""
    return SPAN.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


# ---- commands


@dataclass(frozen=True)
class Command:
    """A program with its arguments, as a shell understood them, and what it would read; `line` is that of its block."""

    line: int
    program: str
    arguments: list[str]
    given: str = ""

    @property
    def settings(self) -> list[str] | None:
        """The arguments of run.py, where that is what is run."""
        runs = self.program.endswith("python") and self.arguments[:1] == ["run.py"]
        return self.arguments[1:] if runs else None


NOTE = """
command_not_found_handle() { echo "$1" >> unknown; }
note() { printf '%s\\0' "$line" "$#" "$@" >> noted; }
python() { case "$1" in
  -c) REAL "$@";;
  -) note python - "$(cat)";;
  *) note python "$@";;
esac; }
python3() { python "$@"; }
source() { :; }
umask() { :; }
"""


def commands(page: Path, folder: Path) -> list[Command]:
    """What the `sh` blocks of a page call, in their order. A shell reads them in `folder`; nothing of it is run.

    Raises AssertionError for a program that is neither ours nor in `FOREIGN`, and for what the shell cannot read.
    """
    script = NOTE.replace("REAL", sys.executable)
    for program in ("fedlora", "fedlora-client", "make", *FOREIGN):
        script += f'{program}() {{ note {program} "$@"; }}\n'
    for block in blocks(page):
        if block.language == "sh":
            script += f"line={block.line}\n{block.text}\n"
    (folder / "noted").write_text("")
    done = subprocess.run(["bash"], input=script, cwd=folder, capture_output=True, text=True, timeout=60)
    unknown = [line for line in done.stderr.splitlines() if "No such file" not in line or " line " not in line]
    assert not (folder / "unknown").exists(), f"{page}: {(folder / 'unknown').read_text()}"
    assert not [line for line in unknown if "syntax" in line or "unexpected" in line], f"{page}: {done.stderr}"
    words, found = (folder / "noted").read_text(encoding="utf-8").split("\0")[:-1], []
    while words:
        line, count = int(words[0]), int(words[1])
        program, *arguments = words[2 : 2 + count]
        words = words[2 + count :]
        given = arguments.pop() if arguments[:1] == ["-"] else ""
        found.append(Command(line, program, arguments, given))
    return found


def written(text: str) -> Command | None:
    """The command that a span of text is, if it is one in full."""
    if "…" in text or "<" in text or re.search(r"\b[A-Z]\b|FILE", text):
        return None  # with a place for something of the reader's
    words = text.replace('"', "").split() or [""]
    modules = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    if words[0] in modules and len(words) > 1 and words[1].startswith("--"):
        words = ["python", "-m", f"benchmarks.{words[0]}", *words[1:]]
    return Command(0, words[0], words[1:]) if words[0] == "python" and len(words) > 1 else None


def accept(command: Command, folder: Path) -> None:
    """Raises where the program would not take these arguments. Nothing is trained."""
    arguments = command.arguments
    if command.program == "make":
        assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text(), arguments
    elif command.program == "fedlora-client":
        _parses("fedlora.deploy.client", arguments)
    elif command.settings is not None:
        _composes(command.settings)
    elif (
        command.program == "python"
        and arguments[0] == "-m"
        and arguments[1].split(".")[0] in ("benchmarks", "tests", "fedlora")
    ):
        _parses(arguments[1], arguments[2:])
    elif command.program == "python" and arguments[0] == "-":
        with contextlib.chdir(folder):
            exec(compile(command.given, "<stdin>", "exec"), {"__name__": "__main__"})
    elif command.program == "python" and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).exists(), arguments
    elif command.program == "python" and arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / name).exists() for name in arguments[2:] if name.startswith("tests/")), arguments


class _Accepted(Exception):
    """A parser has taken the arguments."""


def _parses(module: str, arguments: list[str]) -> None:
    """The command's own parser takes the arguments; those that are settings of run.py are composed as well."""
    from fedlora.tools import audit

    if module == "fedlora.tools.audit":
        audit.parse(arguments)
        return
    real, taken = argparse.ArgumentParser.parse_args, None

    def parse_args(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        nonlocal taken
        taken = real(self, arguments)
        raise _Accepted

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign,assignment]
    argv, sys.argv = sys.argv, [module, *arguments]
    try:
        with contextlib.suppress(_Accepted), patch("fedlora.app.command.run", lambda main, stopped=None: main()):
            runpy.run_module(module, run_name="__main__", alter_sys=False)  # a signal is still pytest's affair
    finally:
        argparse.ArgumentParser.parse_args, sys.argv = real, argv  # type: ignore[method-assign]
    assert taken is not None, f"{module} has no parser"
    for settings in (getattr(taken, name, None) for name in ("overrides", "settings")):
        if settings:
            _composes(settings)


def _composes(settings: list[str]) -> None:
    """run.py takes the arguments, up to where its work would begin. Raises ConfigError with its sentence where it does not.

    Of a sweep only those cells are composed that together have each of its values.
    """
    from fedlora.tools import cli

    def few(overrides: list[str], multirun: bool) -> list[list[str]]:
        seen: set[str] = set()
        return [cell for cell in expand(overrides, multirun) if not (cell and seen.issuperset(cell)) and not seen.update(cell)]

    said, expand = io.StringIO(), cli.expand
    work = {name: lambda *_: 0 for name in ("_run", "_plan", "_deploy", "_list")}
    with unittest.mock.patch.multiple(cli, expand=few, **work), contextlib.redirect_stderr(said):
        status = cli.main(ROOT / "configs", settings)
    if status:
        raise ConfigError(said.getvalue().strip())


# ---- settings that the text names


def misnamed(span: str, names: set[str], options: dict[str, set[str]]) -> bool:
    """Whether the span is written as a setting, or as an option of a group, and there is none of that name.

    `names`: all settings; `options`: those of each group, by the group's name.
    """
    if CALL.match(span):
        return False
    for word in span.split():
        key, equals, value = word.partition("=")
        group, dot, rest = key.partition(".")
        if not re.fullmatch(r"[a-z\d_.]+", key) or group not in options or (dot and not rest):
            continue
        if key in NO_SETTINGS or FILE.search(key):
            continue
        if dot and key not in names:
            return True
        if not dot and equals and not set(re.findall(r"[a-z_\d]+", value)) <= options[group]:
            return True
    return False


# ---- files that examples name


def materials(folder: Path) -> None:
    """The data that commands of the documentation name, small: reviews, pictures, and what a device has."""
    import numpy as np
    import pandas as pd
    from PIL import Image

    rng = np.random.default_rng(0)
    words = {0: ["dull", "flat", "tired", "endless"], 1: ["warm", "funny", "bright", "moving"]}
    rows = [(f"a {rng.choice(words[label])} and {rng.choice(words[label])} film", label) for label in [0, 1] * 60]
    table = pd.DataFrame(rows, columns=["sentence", "label"])
    table.to_csv(folder / "train.tsv", sep="\t", header=False, index=False)
    table[:20].to_csv(folder / "dev.tsv", sep="\t", header=False, index=False)
    table.to_csv(folder / "reviews.csv", index=False)
    table.to_json(folder / "reviews.jsonl", orient="records", lines=True)
    table.to_parquet(folder / "reviews.parquet")
    table.rename(columns={"sentence": "text"}).to_json(folder / "notes.jsonl", orient="records", lines=True)
    (folder / "pictures").mkdir()
    lines = ["file,digit,writer"]
    for number in range(80):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / "pictures" / f"{number}.png")
        lines.append(f"{number}.png,{number % 10},w{number % 8}")
    (folder / "pictures" / "index.csv").write_text("\n".join(lines) + "\n")
    runpy.run_path(str(ROOT / "examples" / "edge" / "digits.py"))["main"](folder / "edge" / "data", 3, 96)


# ---- Python


def app_of_somebody_else() -> dict[str, Any]:
    """`grid` and `model`: clients that answer with PEFT's names in a Flower app that is not this project's."""
    import peft
    from torch import nn

    from tests.test_rounds import StubGrid, honest

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value = nn.Linear(5, 6), nn.Linear(5, 7)

    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["query", "value"]))  # type: ignore[arg-type]
    return {"grid": StubGrid(honest()), "model": model}


def run_that_goes_on() -> dict[str, Any]:
    """`strategy`, and what the 17 rounds of it left that are done."""
    import strategies
    from fedlora.arrays import messages
    from fedlora.arrays.lowrank import Pair
    from fedlora.arrays.messages import ServerState
    from tests.test_rounds import StubGrid, honest, initial

    arrays = initial("fedsvd")
    factors, dense, _ = messages.unpack(arrays)
    adapters = {layer: Pair(**both) for layer, both in factors.items()}
    strategy = strategies.make("fedsvd")
    return {
        "grid": StubGrid(honest()),
        "strategy": strategy,
        "arrays": arrays,
        "state": ServerState(adapters, dense),
        "initial": adapters,
    }


CONTEXT = {"README.md": app_of_somebody_else, "checkpoints.md": run_that_goes_on}


# ---- a copy of the project with the files that a page has


def write_files(page: Path, project: Path) -> None:
    """Each block that is a file, into a copy of the project; behind what is there, if the file exists."""
    for block in blocks(page):
        if block.file:
            file = project / block.file
            before = file.read_text(encoding="utf-8") + "\n\n" if file.exists() else ""
            file.write_text(before + block.text, encoding="utf-8")


PLAY = """
import json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    print("$ python run.py", *arguments, flush=True)
    sys.argv = ["run.py", *arguments]
    try:
        runpy.run_path("run.py", run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, f"exit status {ended.code}"
"""


def play(project: Path, settings: list[list[str]], timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs these commands of run.py, one after another, in one process of the project."""
    command = [sys.executable, "-c", PLAY, json.dumps(settings)]
    return subprocess.run(
        command, cwd=project, env=os.environ | {"PYTHONPATH": str(project), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def main() -> int:
    """Run every command of run.py that the pages print; returns how many failed, 1 at most."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, help="README.md, docs/….md; none: all")
    parser.add_argument("--tiny", action="store_true", help=f"with {' '.join(TINY)} behind each command")
    arguments, failed = parser.parse_args(), 0
    for page in (ROOT / page for page in arguments.pages):
        with tempfile.TemporaryDirectory() as name:
            failed += sum(_report(command, done) for command, done in _played(page, Path(name), arguments.tiny))
    print(f"{failed} failed")
    return min(failed, 1)


def _played(page: Path, folder: Path, tiny: bool) -> Iterator[tuple[str, int]]:
    """Every command of the page with its exit status, as it ends."""
    materials(folder)
    needs = {block.line: block.needs for block in blocks(page)}
    for command in commands(page, folder):
        settings = command.settings
        if settings is None:
            continue
        shown = f"{page.name}:{command.line} python run.py {' '.join(settings)}"
        if needs[command.line]:
            print(f"not run, needs {needs[command.line]}: {shown}", flush=True)
            continue
        run = [sys.executable, str(ROOT / "run.py"), *settings, *(TINY if tiny else [])]
        yield shown, subprocess.run(run, cwd=folder).returncode


def _report(command: str, status: int) -> bool:
    print(f"{'failed, exit status ' + str(status) if status else 'ok'}: {command}", flush=True)
    return status != 0


def run_python(block: Block) -> None:
    """Run a block that is no file, with the names that its page introduces."""
    ast.parse(block.text)
    names = CONTEXT[block.page.name]() if block.page.name in CONTEXT else {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block.text, str(block), "exec"), names)


if __name__ == "__main__":
    sys.exit(main())
