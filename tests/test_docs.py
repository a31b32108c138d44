"""What the documentation says of the code is there."""

import ast
import csv
import re

import numpy as np

from fedlora.app import experiment
from fedlora.app.assembly import make_strategy
from fedlora.compute import workbench
from fedlora.config import Config, from_dict
from tests.conftest import ROOT


def test_every_test_that_docs_name_is_there() -> None:
    named = 0
    for page in (ROOT / "docs").glob("*.md"):
        file = ""
        for found in re.finditer(r"`(?:tests/)?(test_\w+\.py)?(?:::(test_\w+))?[^`\n]*`", page.read_text(encoding="utf-8")):
            file = found[1] or file
            if not (found[1] or found[2]):
                continue
            path = ROOT / "tests" / file
            assert path.exists(), f"{page.name} names {file}"
            functions = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
            assert found[2] is None or found[2] in functions, f"{page.name} names {file}::{found[2]}"
            named += found[2] is not None
    assert named > 30


# ---- figures


def rows_of(page: str, table: str) -> list[list[str]]:
    """The cells of each line of the table of that page whose first line begins with `table`, without its two head lines."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(table)) + 2
    end = next(number for number, line in enumerate(lines[begin:], begin) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin:end]]


def table_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "docs" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_accuracies_of_the_frontier_are_those_of_its_file() -> None:
    said = {name.split(" (")[0].replace("`", ""): cells for name, *cells in rows_of("privacy.md", "| test accuracy, %")}
    assert len(said) == 5
    for row in table_of("frontier.csv"):
        name, _, epsilon = row["run"].partition(",privacy.epsilon=")
        cell = said[name.replace(",strategy.init=orthonormal", ", orthonormal A")][["1.0", "3.0", "6.0", "inf"].index(epsilon)]
        assert cell == f"{100 * float(row['accuracy']):.1f} ± {100 * float(row['accuracy_ci95']):.1f}", row["run"]


def test_the_figures_of_the_study_are_those_of_its_file() -> None:
    for skew in ("dirichlet", "domains"):
        page = (ROOT / "docs" / "noniid.md").read_text(encoding="utf-8").split("## ")
        part = next(part for part in page if f"`partition={skew}`" in part.partition("\n")[0])
        for row in (row for row in table_of("noniid.csv") if row["skew"] == skew):
            line = next(line for line in part.splitlines() if line.startswith(f"| {row['strategy']} |"))
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            for cell, key in zip(cells[2:5], ("accuracy", "client_accuracy", "client_accuracy_worst_decile"), strict=True):
                wanted = f"{100 * float(row[key]):.1f} ± {100 * float(row[f'{key}_ci95']):.1f}" if row[key] else "–"
                assert cell == wanted, f"{skew}, {row['strategy']}, {key}"
            for cell, key in zip(cells[5:7], ("bytes_up", "bytes_down"), strict=True):
                assert cell == f"{float(row[key]) / 1e6:.1f}"


def test_the_bytes_of_the_published_runs_are_those_of_this_version() -> None:
    """Of the strategies that move nothing into the base: there the bytes of a client do not depend on what was learnt."""
    bench = workbench.build(Config())

    def size(arrays: dict[str, np.ndarray]) -> int:
        return sum(array.nbytes + 128 for array in arrays.values())  # and the header of np.save

    def of_a_client(name: str) -> tuple[float, int, int]:
        held = from_dict({"strategy": {"name": name}, "evaluate": {"holdout": 0.2}})
        strategy = make_strategy(held)
        state = experiment.initial_state(bench, strategy)
        up = sum(size(strategy.sent_up(state, round, None)) for round in (1, 2)) / 2  # rolora's two rounds differ
        asked, told = (size(arrays) for arrays in strategy.sent_further(state))
        tested = size(strategy.sent_down(state, None))
        return up + asked, tested + told, tested

    for row in table_of("frontier.csv"):  # 20 rounds of all 5 clients
        up, down, _ = of_a_client(row["run"].partition(",")[0])
        assert (float(row["bytes_up"]), float(row["bytes_down"])) == (100 * up, 100 * down), row["run"]
    for row in table_of("noniid.csv"):  # 20 rounds of 10 clients, and all 50 test once
        name = row["strategy"].partition(",")[0]
        if name not in ("flora", "fedex_lora"):
            up, down, tested = of_a_client(name)
            assert (float(row["bytes_up"]), float(row["bytes_down"])) == (200 * up, 200 * down + 50 * tested), row["strategy"]
