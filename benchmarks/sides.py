"""Two or more sides of a comparison: measured in turn, in processes of their own where they need one, and shown as ratios."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
PFL = (
    "pfl is not installed, so its row is left out; it asks for another dp-accounting than fedlora, so: "
    "pip install --no-deps --target pfl pfl==0.6.0 multiprocess dill prv-accountant, and PYTHONPATH=pfl"
)


def heading(job: str, repeats: int, *packages: str) -> None:
    """Print what was measured on what: the job, the machine, its cores, the versions."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", *packages) if has(name))
    print(f"{job}\n{platform.machine()}, {os.cpu_count()} cores, {versions}, {repeats} repetitions\n")


def in_turn(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What every side returns, one after the other in each repetition, so that a busy moment hits all of them."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            measured[name].append(side())
    return measured


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    """A side that takes the time of `work`."""

    def measure() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return measure


def table(measured: Mapping[str, list[float]], unit: str, scale: float = 1.0, places: int = 2) -> None:
    """Print every side, median (range), times `scale`, and its ratio to the first side by repetition."""
    ours = next(iter(measured.values()))
    for name, values in measured.items():
        ratios = [value / own for value, own in zip(values, ours, strict=True)]
        shown = "" if values is ours else f"   {spread(ratios, 2)} × the first"
        print(f"{name:32}{spread([scale * value for value in values], places):>28} {unit}{shown}")


def spread(values: list[float], places: int) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.{places}f} ({min(values):.{places}f} to {max(values):.{places}f})"


def has(package: str) -> bool:
    """Whether a package is installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def in_process(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m module arguments` gives to `answer`, in a new process that sees this repository and no network."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    answered: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answered


@contextmanager
def answer() -> Iterator[dict[str, Any]]:
    """A dictionary that goes to the process that asked, as the last line of the output; all other output is discarded."""
    given: dict[str, Any] = {}
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield given
    print(json.dumps(given), flush=True)


@contextmanager
def cache() -> Iterator[None]:
    """A cache folder ($FEDLORA_CACHE) of the command's own: cohort sizes are measured here and now."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLORA_CACHE"] = folder
        yield


def born() -> float:
    """The `time.perf_counter()` at which this process began."""
    return time.perf_counter() - (time.time() - psutil.Process().create_time())
