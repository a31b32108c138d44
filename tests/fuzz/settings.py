"""Command lines of any settings: their names and others, usual and senseless values, sweeps, quotes, odd grammar.

A command that is refused says one sentence and leaves nothing behind; no command ends in a traceback or says nothing for
ten seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hypothesis import strategies as st

import strategies
from fedlora.config import GROUPS, Config
from tests.fuzz.commands import ROOT, clear, standing_in, tried, warm
from tests.fuzz.searched import searched

TEXTS = (
    "", "x", "null", "none", "None", "true", "false", "nan", "a b", " a", "a,b", "a=b", "=", "a:b", "ä", "日本", "e\u0301",
    "\udcff", "🙂", "'q'", '"q"', "'", '"', "it's", "'a,b'", "\\", "\\,", "a\\", "#", "#x", "$", "${", "${seed}", "${nope}",
    "${oc.env:NOPE}", "${name}", "${oc.env:HOME}", "???", "???x", "~", "~/x", "..", "../../x", "/", "/proc/x", "a/b", "a//b",
    ".", "-", "--", "\t", "\n", "a\nb", "\x1b[2J", "\u202e", "{", "}", "[", "]", "(", ")", "()", "[]", "{}", "[[]]", "[,]",
    "{a:1}", "{a}", "{1:2}", "{null:1}", "%", "%s", "@", "&", "|", "*", "?", "!", "1e5", "0x10", "1_000", "01", "+1", "1.",
    ".5", "x" * 300, "x" * 5000, "reviews (1).csv", "good.csv", "none.csv", "folder", "film[1].csv", "a_file/below",
)  # fmt: skip
NUMBERS = (
    "0", "1", "-1", "2", "3", "0.5", "1.0", "1.5", "-0.0", "1e-3", "1e-300", "1e-320", "1e30", "1e308", "1e309", "-1e400",
    "inf", "-inf", ".inf", "nan", "1e5", "1e8", "100000", "1000000", "99999999999999999999", "9" * 400, "9" * 5000,
    "1" + "0" * 30, "true", "null", "0x7f", "0b1", "1_0", "1e", "e1", "--1", "1/2", "½", "²", "٣", "1,5", "1 000", "[1]",
    "{a:1}", "'1'", "",
)  # fmt: skip
SWEEPS = (
    "choice(1,2)", "range(1,3)", "range(3)", "range(1,0)", "range(1,2,0)", "range(0,1,0.1)", "interval(0,1)", "glob(*)",
    "glob(*,exclude=x)", "glob([f*,r*])", "shuffle(1,2)", "shuffle(range(1,3))", "sort(3,1)", "sort(1,a)",
    "tag(a,choice(1,2))", "int(1.5)", "int(x)", "float(x)", "str(1)", "bool(x)", "json_str({a:1})", "extend_list(1)",
    "choice()", "choice(", "nope(1)", "int(1,2)", "int(inf)", "cast(1)", "range(0,1e9)", "range(1,100000)", "1,2,", ",1", ",",
    "1,,2", "[1,2],[3]", "{a:1},{b:2}", "1,1", "null,1", "'a','b'",
)  # fmt: skip
PREFIXES = ("+", "++", "~", "-", "+ ", " ", "hydra.", "strategy.", "./", "@", "?")
SUFFIXES = (".", "@x", "@_global_", "/x", ":x", ".a", ".a.b", " ", "[0]", "[", "é", "+")
BRACKETS = ("'", '"', "[", "{", "(", " ", "]", "}", ")", ",", "\\")
WHOLE = (
    "--list", "--help", "-m", "-h", "--", "--version", "-x", "--cfg", "--config-name=x", "=", "a", "", " ", "~", "~seed",
    "~train", "~train=sgd", "+x=1", "hydra.run.dir=x", "hydra/launcher=x", "+hydra.x=1", "train@x=adamw", "+train=adamw",
    "train={}", "train=null", "train=[sgd,adamw]", "train={lr:1}", "train.=1", ".lr=1", "train..lr=1",
    "dataset/domains=digits", "dataset.domains=digits", "model@dataset=hf", "experiment=null", "+experiment=sst2",
    "experiment=[sst2,noniid]", "strategy={name:fedavg}", "strategy=null", "strategy.name=fedavg", "strategy.name=nope",
    "strategy.=1", "strategy.init.x=1", "adapter.rank.x=1", "seed.x=1", "_target_=x", "defaults=x", "schema=x", "_self_=x",
    "+schema=x", "config=x", "plan=true", "plan=maybe", "name=1e5", "name=1", "name=true", "name=../../x", "name=/proc/x",
    "name=a/b", "name=.", "name=..", "name=", "results=", "results=a_file/below", "results=a_file", "results=folder",
    "results=/proc/x", "model.path=folder", "dataset.path=good.csv", "dataset.path=reviews (1).csv", "deploy=nope",
    "deploy=local", "partition=natural",
)  # fmt: skip

Kind = tuple[tuple[Any, ...], str]


def kinds() -> dict[str, Kind]:
    """Every setting by its dotted name, those of every strategy among them: the types that it takes, and its help."""
    known: dict[str, Kind] = {}
    for group, of in ({"": Config} | GROUPS).items():
        hints = get_type_hints(of)
        for field in dataclasses.fields(of):
            if group or field.name not in {*GROUPS, "strategy"}:
                hint = hints[field.name]
                known[f"{group}.{field.name}".lstrip(".")] = (get_args(hint) or (hint,), field.metadata["help"])
    for name in strategies.names():
        known |= {f"strategy.{key}": ((own.type,), own.help) for key, own in strategies.settings(name).items()}
    return known


KINDS = kinds()
OPTIONS = {
    group.name: sorted(file.stem for file in group.glob("*.yaml")) for group in (ROOT / "configs").iterdir() if group.is_dir()
}


def sensible(name: str, most: int) -> st.SearchStrategy[str]:
    """Values of the setting's type, numbers up to `most`; words of its help where it takes text."""
    types, help = KINDS[name]
    ways: list[st.SearchStrategy[str]] = []
    if bool in types:
        ways.append(st.sampled_from(["true", "false"]))
    if int in types:
        ways.append(st.sampled_from([str(number) for number in (0, 1, 2, 3, 4, 5, 8, 20, 100) if number <= most]))
    if float in types:
        ways.append(st.sampled_from(["0", "0.0", "0.1", "0.5", "0.9", "1", "1.0", "2", "10", "1e-5", "inf"]))
    if str in types or Any in types:
        ways.append(st.sampled_from(sorted(set(re.findall(r"[a-z][a-z_0-9]+", help)))))
    if Any in types:
        ways.append(st.sampled_from(["[2,4,8]", "[2,2,2]", "{4: .5, 8: .5}", "{2: 1}", "memory", "{2: 0.5, 9: 0.5}", "4"]))
    if any("list" in str(kind) for kind in types):
        words = st.sampled_from(["1", "-1", "0", "2", "a", "text", "label", "plain", "blur", "q_proj", "99", "null"])
        ways.append(st.lists(words, max_size=3).map(lambda parts: f"[{','.join(parts)}]"))
    if type(None) in types:
        ways.append(st.just("null"))
    return st.one_of(ways)


STRANGE = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from(SWEEPS),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)


@st.composite
def usual(draw: Any, most: int = 100, but: tuple[str, ...] = ()) -> str:
    """A setting with a value of its type, or a group with one of its options; none whose name begins with one of `but`."""
    if draw(st.integers(0, 3)) == 0:
        group = draw(st.sampled_from(sorted(group for group in OPTIONS if not group.startswith(but or ("?",)))))
        return f"{group}={draw(st.sampled_from(OPTIONS[group]))}"
    key = draw(st.sampled_from(sorted(key for key in KINDS if not key.startswith(but or ("?",)))))
    return f"{key}={draw(sensible(key, most))}"


@st.composite
def strange(draw: Any) -> str:
    """A setting with a value that it should not have, perhaps under a name that is none."""
    key = draw(st.sampled_from(sorted(KINDS)))
    own = sensible(key, 100)
    value = draw(st.one_of(STRANGE, STRANGE, own, st.lists(own, min_size=2, max_size=3).map(",".join)))
    ways = {
        0: lambda: draw(st.sampled_from(WHOLE)),
        1: lambda: f"{draw(st.sampled_from(PREFIXES))}{key}={value}",
        2: lambda: f"{key}{draw(st.sampled_from(SUFFIXES))}={value}",
        3: lambda: f"{key[: draw(st.integers(0, len(key)))]}={value}",
        4: lambda: f"{key}={draw(st.sampled_from(BRACKETS))}{value}",
        5: lambda: f"{key}={value}{draw(st.sampled_from(BRACKETS))}",
    }
    return ways.get(draw(st.integers(0, 19)), lambda: f"{key}={value}")()


def _joined(parts: tuple[list[str], ...]) -> list[str]:
    return [text for part in parts for text in part]


SWEEP = st.sampled_from([[], [], ["-m"]])
PLANS = st.tuples(SWEEP, st.just(["plan=true"]), st.lists(usual(), max_size=5), st.lists(strange(), max_size=1)).map(_joined)
TOLD = st.tuples(st.sampled_from([["--list"], ["--help"]]), st.lists(st.one_of(usual(), strange()), max_size=2)).map(_joined)
SMALL = ["engine=inline", "engine.cohort=1", "clients=3", "rounds=1", "train.steps=1", "device=cpu", "fraction=null"]
RUNS = st.tuples(SWEEP, st.just(SMALL), st.lists(usual(3, ("engine", "deploy", "plan", "threads")), max_size=4)).map(_joined)
COMMANDS = st.one_of(*[PLANS] * 8, TOLD, RUNS)


@contextlib.contextmanager
def place(folder: Path) -> Iterator[Callable[[list[str]], str]]:
    """The function from a command to what comes of it, where there are a few files and folders for it to name."""
    with standing_in(folder) as here:
        for name in ("good.csv", "reviews (1).csv", "film[1].csv"):
            (here / name).write_text("text,label\n" + "a good film,yes\na bad film,no\n" * 12)
        warm()
        (here / "a_file").touch()
        (here / "folder").mkdir()
        keep = {path.name for path in here.iterdir()}

        def command(arguments: list[str]) -> str:
            try:
                return tried(arguments, folder)
            finally:
                for level in (here, here.parent, here.parent.parent, folder):
                    clear(level, keep if level == here else {"a", "b", "c"})

        yield command


@contextlib.contextmanager
def part(folder: Path) -> Iterator[Callable[[int], Counter[str]]]:
    """The function from a seed to what came of its commands."""
    with place(folder) as command:
        yield searched(COMMANDS, command)
