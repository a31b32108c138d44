"""The smallest noise that keeps a budget: σ for a target ε, for one client or for all of them.

Every σ that leaves this file was put back into `accounting.epsilon` by this process, one from the cache too. The search
follows secants in (log σ, log ε) from the central limit of Gaussian DP, which understates ε and so serves as a first guess
only. Among many clients a smooth curve through those that are solved foretells the next, so that most of them take one
evaluation.

Answers are kept in memory and in `calibration.json` in the cache folder ($FEDLORA_CACHE, else ~/.cache/fedlora). A cache
that cannot be read or written, or that holds another σ than it should, costs time, never a run or its privacy.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Mapping

import numpy as np

from fedlora import cache, check
from fedlora.check import ConfigError
from fedlora.privacy import accounting

Job = tuple[float, int]  # (sampling rate q, steps)

TOLERANCE = 0.02  # a σ is small enough if its ε lies in [target − tolerance, target]
MOST_NOISE = 1e6  # no search goes beyond this σ
VERSION = 2  # of the search: part of every cache key, together with Opacus' version

_memory: dict[str, float] = {}


def noise_multiplier(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "prv",
    adjacency: str = "add_remove",
) -> float:
    """The smallest σ with which `steps` steps at `sample_rate` spend at most `epsilon` at `delta`.

    Guarantee: accounting.epsilon({(σ, sample_rate): steps}, delta, accountant, adjacency) lies in [ε − tolerance(ε), ε].

    | case                                              | answer                                   |
    |---------------------------------------------------|------------------------------------------|
    | ε = inf                                           | 0: no noise                              |
    | ε below what any noise certifies (PRV: 0.01)      | ConfigError that names the least ε       |
    | ε ≤ 0, δ outside (0, 1), q outside (0, 1],        |                                          |
    | steps < 1, NaN anywhere                           | ConfigError                              |
    | ε where PRV gives way to a looser bound (several  | a σ whose ε is at most the target, maybe |
    | hundred)                                          | below the band                           |
    """
    check.positive(steps=operator.index(steps))
    return calibrate(epsilon, delta, {0: (sample_rate, steps)}, accountant, adjacency)[0]


def calibrate(
    epsilon: float,
    delta: float,
    jobs: Mapping[int, Job],
    accountant: str = "prv",
    adjacency: str = "add_remove",
) -> dict[int, float]:
    """client → σ, for client → (its sampling rate, its steps); equal jobs are computed once.

    Guarantee: that of `noise_multiplier`, for every client at its own rate and steps. A client with no steps is left out:
    no σ would be safe to train with.
    """
    check.positive(**{"privacy.epsilon": epsilon})
    check.one_of(accounting.ACCOUNTANTS, **{"privacy.accountant": accountant})
    for rate, steps in jobs.values():
        accounting.checked({(0.0, rate): steps}, delta)
    active = {client: (float(rate), operator.index(steps)) for client, (rate, steps) in jobs.items() if steps}
    if math.isinf(epsilon):
        return dict.fromkeys(active, 0.0)
    aim = f"{float(epsilon)!r} {float(delta)!r} {accountant} {adjacency} {_version()}"
    keys = {job: f"{job} {aim}" for job in set(active.values())}
    curve = functools.partial(_quiet_epsilon, float(delta), accountant, adjacency)
    if missing := [job for job, key in keys.items() if key not in _memory]:
        kept = cache.read("calibration")
        found = {job: kept[keys[job]] for job in missing if keys[job] in kept}
        right = {job: sigma for job, sigma in found.items() if within(curve(job, sigma), epsilon)}
        wrong = [job for job in missing if job not in right]
        solved = _solve(float(epsilon), float(delta), wrong, curve) if wrong else {}
        _memory.update({keys[job]: sigma for job, sigma in (right | solved).items()})
        if solved:
            cache.add("calibration", {keys[job]: sigma for job, sigma in solved.items()})
    return {client: _memory[keys[job]] for client, job in active.items()}


def tolerance(epsilon: float) -> float:
    """How far below its target an ε may lie: 0.02, or 4 % of the target where that is less."""
    return min(TOLERANCE, 0.04 * epsilon)


def within(value: float, epsilon: float) -> bool:
    """Whether an ε meets its target."""
    return epsilon - tolerance(epsilon) <= value <= epsilon


def search(curve: Callable[[float], float], epsilon: float, guess: float, slope: float = -1.3) -> float:
    """The σ with curve(σ) in [ε − tolerance, ε], for a falling `curve`, by secants in (log σ, log ε).

    Guarantee: curve(σ) ≤ ε always. Where the curve jumps over the band, σ is the smallest with curve(σ) ≤ ε, to 1e-9.
    Raises ConfigError if even σ = 10⁶ gives more than ε. `slope` is a first idea of d log ε / d log σ.
    """
    aim = math.log(epsilon - tolerance(epsilon) / 2)
    low, high = 0.0, math.inf  # curve(low) > ε ≥ curve(high)
    sigma, before = guess, (0.0, math.inf)
    for evaluation in itertools.count():
        value = curve(sigma)
        low, high = (sigma, high) if value > epsilon else (low, sigma)
        if within(value, epsilon) or high < low * (1 + 1e-9):
            break
        if low >= MOST_NOISE:
            least = f"even privacy.noise_multiplier={low:g} certifies no less than {value:.2g}"
            raise ConfigError(f"privacy.epsilon={epsilon:g} is out of reach: {least}; raise it")
        x, y = math.log(sigma), math.log(max(value, 1e-12))
        if math.isfinite(before[1]) and math.isfinite(y):
            slope = min((y - before[1]) / (x - before[0]), -0.1)
        before = x, y
        sigma = min(sigma * math.exp(max(-1.5, min((aim - y) / slope, 1.5))), MOST_NOISE)
        if low and high < math.inf and (evaluation > 8 or not low < sigma < high):
            sigma = math.sqrt(low * high)
    return high


def _solve(epsilon: float, delta: float, jobs: list[Job], curve: Callable[[Job, float], float]) -> dict[Job, float]:
    """(q, steps) → σ, from the central limit, in which ε depends on μ² = q² steps (e^(1/σ²) − 1) alone.

    `curve` gives ε for a job and σ. The limit is that of adding and removing records; replacing them doubles every μ.

    The μ that really belongs to ε varies smoothly with (q, steps). The jobs are solved in the order 0, ½, ¼, ¾, ⅛, … of
    q √steps, and a Gaussian process through the log μ of those before foretells the next one.
    """
    aim, tail = epsilon - tolerance(epsilon) / 2, math.sqrt(-2 * math.log(delta))
    limit = math.sqrt(tail**2 + 2 * aim) - tail  # the μ with μ²/2 + μ·tail = ε
    growth = (limit + tail) / (limit / 2 + tail)  # d log ε / d log μ there
    ranked = sorted(jobs, key=lambda job: job[0] * math.sqrt(job[1]))
    jobs = [ranked[i] for i in sorted(range(len(jobs)), key=lambda i: -(i & -i) if i else -len(jobs))]
    rates, steps = np.log(np.array(jobs)).T
    places = np.stack([rates + steps / 2, rates - steps / 2], axis=1)  # (jobs, 2)
    kernel = np.exp(-((places[:, None] - places) ** 2).sum(-1) / 8) + 1e-8 * np.eye(len(jobs))
    widths = np.full(len(jobs), math.log(limit))  # log μ
    solved = {}
    for n, (job, unit) in enumerate(zip(jobs, 2 * rates + steps, strict=True)):
        width = widths[0] + kernel[n, :n] @ np.linalg.solve(kernel[:n, :n], widths[:n] - widths[0])
        inverse = float(np.logaddexp(0, 2 * width - unit))  # 1 / σ²
        slope = growth * inverse / math.expm1(-inverse)
        solved[job] = search(functools.partial(curve, job), epsilon, inverse**-0.5, slope)
        inverse = solved[job] ** -2
        excess = math.log(max(curve(job, solved[job]), 1e-12) / aim)
        widths[n] = (unit + inverse + math.log(-math.expm1(-inverse))) / 2 - excess / growth
    return solved


def _quiet_epsilon(delta: float, accountant: str, adjacency: str, job: Job, sigma: float) -> float:
    """`accounting.epsilon`, without a word about points that the search merely passes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", accounting.LooserBound)
        return accounting.epsilon({(sigma, job[0]): job[1]}, delta, accountant, adjacency)


@functools.cache
def _version() -> str:
    return f"{VERSION}/{importlib.metadata.version('opacus')}"
