"""The smallest noise that keeps a budget: σ for a target ε, for one client or for all of them.

Every σ that leaves this file was put back into `accounting.epsilon`. The search starts from the central-limit formula of
Gaussian DP, which understates ε and so is good for a first guess only, and then follows a secant in (log σ, log ε). Among
many clients the next one starts where the last one ended, so that one or two evaluations each are enough.

Answers are kept in memory and in `calibration.json` in the cache folder ($FEDLORA_CACHE, else ~/.cache/fedlora). A cache
that cannot be read or written costs time, never a run.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import math
import operator
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fedlora import check
from fedlora.check import ConfigError
from fedlora.privacy import accounting

TOLERANCE = 0.02  # a σ is small enough if its ε lies in [target − tolerance, target]
MOST_NOISE = 1e6  # no search goes beyond this σ
VERSION = 1  # of the search, part of every cache key together with Opacus' version

_memory: dict[str, float] = {}


def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "prv") -> float:
    """The smallest σ with which `steps` steps at `sample_rate` spend at most `epsilon` at `delta`.

    Guarantee: accounting.epsilon({(σ, sample_rate): steps}, delta, accountant) lies in [ε − tolerance(ε), ε].

    | case                                              | answer                                     |
    |---------------------------------------------------|--------------------------------------------|
    | ε = inf                                           | 0: no noise                                |
    | ε below what any noise can certify (PRV: 0.01)    | ConfigError that names the least ε         |
    | ε ≤ 0, δ outside (0, 1), q outside (0, 1],        |                                            |
    | steps < 1, NaN                                    | ConfigError                                |
    | ε in the gap where PRV gives way to looser bounds | a valid σ whose ε may be below that band   |
    """
    check.positive(steps=operator.index(steps))
    return calibrate(epsilon, delta, {0: (sample_rate, steps)}, accountant)[0]


def calibrate(epsilon: float, delta: float, jobs: Mapping[int, tuple[float, int]], accountant: str = "prv") -> dict[int, float]:
    """client → σ, for client → (its sampling rate, its steps); equal jobs are computed once.

    Guarantee: that of `noise_multiplier`, for every client at its own rate and steps. A client with no steps is left out:
    no σ would be safe to train with.
    """
    check.positive(**{"privacy.epsilon": epsilon})
    for rate, steps in jobs.values():  # the settings are checked before anything is computed
        accounting.epsilon({(math.inf, rate): steps}, delta, accountant)
    active = {client: (float(rate), operator.index(steps)) for client, (rate, steps) in jobs.items() if steps}
    if math.isinf(epsilon):
        return dict.fromkeys(active, 0.0)
    keys = {job: _key(epsilon, delta, job, accountant) for job in set(active.values())}
    if not _memory.keys() >= set(keys.values()):
        _memory.update(_read())
    missing = [job for job in keys if keys[job] not in _memory]
    if missing:
        solved = _solve(float(epsilon), float(delta), missing, accountant)
        _memory.update({keys[job]: sigma for job, sigma in solved.items()})
        _write()
    return {client: _memory[keys[job]] for client, job in active.items()}


def tolerance(epsilon: float) -> float:
    """How far below its target an ε may lie: 0.02, and 4 % of the target where that is less."""
    return min(TOLERANCE, 0.04 * epsilon)


def search(curve: Callable[[float], float], epsilon: float, guess: float, slope: float = -1.3) -> tuple[float, float]:
    """(σ, curve(σ)) with curve(σ) in [ε − tolerance, ε], for a falling `curve`, by secants in (log σ, log ε).

    Guarantee: curve(σ) ≤ ε always. Where the curve jumps over the band, σ is the smallest with curve(σ) ≤ ε, to 1e-9.
    Raises ConfigError if even σ = 10⁶ gives more than ε. `slope` is a first idea of d log ε / d log σ.
    """
    aim = math.log(epsilon - tolerance(epsilon) / 2)
    low, high, reached = 0.0, math.inf, math.nan  # curve(low) > ε ≥ curve(high) = reached
    sigma, before = guess, (0.0, math.inf)
    for evaluation in itertools.count():
        value = curve(sigma)
        if value > epsilon:
            low = sigma
        else:
            high, reached = sigma, value
        if epsilon - tolerance(epsilon) <= value <= epsilon or high < low * (1 + 1e-9):
            break
        if low >= MOST_NOISE:
            raise ConfigError(
                f"privacy.epsilon={epsilon:g} is out of reach: no noise certifies less than {value:.2g}; raise it"
            )
        x, y = math.log(sigma), math.log(max(value, 1e-12))
        if math.isfinite(before[1]) and math.isfinite(y):
            slope = min((y - before[1]) / (x - before[0]), -0.1)
        before = x, y
        sigma = min(sigma * math.exp(max(-1.5, min((aim - y) / slope, 1.5))), MOST_NOISE)
        if low and high < math.inf and (evaluation > 8 or not low < sigma < high):
            sigma = math.sqrt(low * high)
    return high, reached


def _solve(epsilon: float, delta: float, jobs: list[tuple[float, int]], accountant: str) -> dict[tuple[float, int], float]:
    """(q, steps) → σ. The first guess is the central limit: ε depends on μ = q √(steps (e^(1/σ²) − 1)) alone.

    What log μ really is for this ε varies smoothly with (q, steps): a Gaussian process through the jobs that are solved
    foretells it for the next one, which then takes one evaluation. The jobs come in the order 0, ½, ¼, ¾, ⅛, …
    """
    aim, tail = epsilon - tolerance(epsilon) / 2, math.sqrt(-2 * math.log(delta))
    limit = math.sqrt(tail**2 + 2 * aim) - tail  # the μ with μ²/2 + μ·tail = ε
    growth = (limit + tail) / (limit / 2 + tail)  # d log ε / d log μ there
    jobs = sorted(jobs, key=lambda job: job[0] * math.sqrt(job[1]))
    jobs = [jobs[i] for i in sorted(range(len(jobs)), key=lambda i: -(i & -i) if i else -len(jobs))]
    places = np.array([[math.log(rate), math.log(steps) / 2] for rate, steps in jobs]) @ [[1, 1], [1, -1]]
    kernel = np.exp(-((places[:, None] - places) ** 2).sum(-1) / 8) + 1e-8 * np.eye(len(jobs))
    widths: list[float] = []  # log (μ / limit) of the jobs solved
    solved = {}
    for n, (rate, steps) in enumerate(jobs):
        unit = 2 * math.log(rate) + math.log(steps)
        mean = widths[0] if n else 0.0
        width = mean + float(kernel[n, :n] @ np.linalg.solve(kernel[:n, :n], np.array(widths) - mean)) if n else 0.0
        y = np.logaddexp(0, 2 * (width + math.log(limit)) - unit)  # 1 / σ²
        sigma, value = search(
            lambda sigma: accounting.epsilon({(sigma, rate): steps}, delta, accountant),
            epsilon,
            float(y**-0.5),
            float(growth * y / math.expm1(-y)),
        )
        y = sigma**-2
        widths.append((unit + y + math.log(-math.expm1(-y))) / 2 - math.log(limit) - math.log(value / aim) / growth)
        solved[rate, steps] = sigma
    return solved


def _key(epsilon: float, delta: float, job: tuple[float, int], accountant: str) -> str:
    return f"{float(epsilon)!r} {float(delta)!r} {job[0]!r} {job[1]} {accountant} {_version()}"


@functools.cache
def _version() -> str:
    return f"{VERSION}/{importlib.metadata.version('opacus')}"


def _path() -> Path:
    return Path(os.environ.get("FEDLORA_CACHE") or Path.home() / ".cache" / "fedlora") / "calibration.json"


def _read() -> dict[str, float]:
    """The answers on disk; none where the file is missing, damaged or not ours to read."""
    try:
        content = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: sigma for key, sigma in content.items() if isinstance(sigma, float) and 0 < sigma < math.inf}


def _write() -> None:
    """Put all answers on disk in one move, with those that another process has added meanwhile."""
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as file:
            json.dump(_read() | _memory, file, indent=0, sort_keys=True)
        os.replace(file.name, path)
    except (OSError, RuntimeError):
        return
