"""Does the code keep the ε that the accountant claims? An audit of the private step that clients really take, in one run.

    python -m fedlora.tools.audit noise_multiplier=4 steps=4 canaries=1000
    python -m fedlora.tools.audit clients=1000 sample_rate=0.1 steps=8     # one record a client: many empty batches

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (2023). Each of m canaries is put into the data by
a fair coin of its own. Its gradient is one coordinate, far longer than the clip. An adversary who sees all clients' models
after every step, which is what the accountant assumes, guesses some of the coins; whoever guesses better than an
(ε, δ)-DP mechanism allows has refuted (ε, δ). Sampling, clipping, noise and its streams are those of `clients`; the model
is a stand-in with one weight for each canary. Not covered, but by `fedlora.tools.selftest`: the gradients of real models,
and how `clients.train.train` puts the parts together.

One score finds four faults. A canary's gradient turns its sign from step to step and from round to round, and the score is
its coordinate's movement with the signs taken back, minus what the other clients show there:

| fault                             | what the score becomes                                                              |
|-----------------------------------|-------------------------------------------------------------------------------------|
| no clipping; noise divided by B   | signal with next to no noise                                                        |
| same noise in every step or round | the signs cancel the noise (if the number of steps in a round, or of rounds, is even) |
| same noise for every client       | the difference cancels the noise                                                    |
| an empty batch skipped            | −∞ for a coordinate without noise: its client drew nobody (needs empty batches)     |
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from clients.private import Mechanism, flatten, hooked
from clients.task import Task, poisson, simulated_key
from fedlora import check, seeds
from fedlora.check import ConfigError
from fedlora.config import TrainConfig
from fedlora.models.encode import Encoded
from fedlora.privacy.accounting import epsilon

CONFIDENCE = 0.95
MOST = 10_000  # canaries, and steps: a batch holds as many one-hot vectors as canaries
LOUD = 1000.0  # norm of a canary's gradient, in clips
SHARES = (0.05, 0.1, 0.2, 0.45)  # of the canaries guessed to be in; none or as many are guessed to be out


def _setting(default: float, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """What is audited; every field is an argument of the command line."""

    noise_multiplier: float = _setting(4.0, "σ, the noise in a coordinate over the clip")
    steps: int = _setting(4, "steps of every client over all rounds; a multiple of rounds")
    rounds: int = _setting(2, "rounds over which the steps are spread evenly")
    clients: int = _setting(4, "clients among which the canaries are dealt out")
    canaries: int = _setting(1000, "records whose presence is guessed; more make the bound tighter")
    sample_rate: float = _setting(1.0, "q, the probability of a record to be in a step's batch")
    clip: float = _setting(1.0, "C, the bound on the norm of one record's gradient")
    delta: float = _setting(1e-5, "δ of the claim")
    physical: int = _setting(0, "examples of one forward pass at most; 0: all of a batch")
    seed: int = _setting(0, "seed of coins, batches and noise")

    def checked(self) -> Settings:
        """Itself; raises ConfigError, in one sentence, for a mechanism that cannot be."""
        for name in ("steps", "rounds", "clients", "canaries", "clip", "delta"):
            check.positive(**{name: getattr(self, name)})
        for name in ("noise_multiplier", "physical", "seed"):
            check.not_negative(**{name: getattr(self, name)})
        for name in ("noise_multiplier", "clip"):
            check.finite(**{name: getattr(self, name)})
        check.between(1, MOST, canaries=self.canaries)
        check.between(1, MOST, steps=self.steps)
        check.fraction(sample_rate=self.sample_rate)
        check.below_one(delta=self.delta)
        if self.steps % self.rounds:
            raise ConfigError(f"steps={self.steps} cannot be spread over rounds={self.rounds}; make it a multiple")
        if self.clients > self.canaries:
            raise ConfigError(f"clients={self.clients} is above canaries={self.canaries}; every client needs one")
        return self


@dataclass(frozen=True)
class Finding:
    """The claim, the evidence against it, and the guesses that the evidence rests on."""

    claimed: float  # ε by the accountant
    bound: float  # ε is at least this, with 95 % confidence
    guesses: int
    right: int

    @property
    def refuted(self) -> bool:
        """Whether the mechanism that ran is not the one that was accounted for."""
        return self.bound > self.claimed


def audit(settings: Settings) -> Finding:
    """Run the clients once, guess, and count.

    Guarantee: of correct code, at most 5 % of seeds give a bound above the ε that the code has. The numbers of guesses are
    fixed beforehand by `SHARES`, with and without guesses of "out", and each has its share of those 5 % (Bonferroni).
    """
    coins = seeds.stream(settings.seed, "audit").random(settings.canaries) < 0.5
    scores = _scores(settings, coins)
    loudest = np.argsort(-scores, kind="stable")
    plans = [(k, out) for share in SHARES if (k := int(share * settings.canaries)) for out in (0, k)]
    best = (0.0, 0, 0)
    for inside, out in plans:
        right = int(coins[loudest[:inside]].sum() + (~coins[loudest[settings.canaries - out :]]).sum())
        alpha = (1 - CONFIDENCE) / len(plans)
        best = max(best, (lower_bound(settings.canaries, inside + out, right, settings.delta, alpha), inside + out, right))
    claimed = epsilon({(settings.noise_multiplier, settings.sample_rate): settings.steps}, settings.delta)
    return Finding(claimed, *best)


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """A bound on the probability of so many right guesses, or more, for any (ε, δ)-DP mechanism and any adversary.

    Corollary 5.4 and Appendix D of the paper: P[right ≥ v] ≤ P[X ≥ v] + 2mδ · max_i P[v > X ≥ v − i] / i, where
    X ~ Binomial(guesses, e^ε / (1 + e^ε)) counts the right guesses on a randomised response.
    """
    guess = stats.binom(guesses, 1 / (1 + np.exp(-epsilon)))
    below = np.cumsum(guess.pmf(np.arange(right - 1, -1, -1))) / np.arange(1, right + 1)
    return min(1.0, float(guess.sf(right - 1) + 2 * canaries * delta * below.max(initial=0)))


def lower_bound(canaries: int, guesses: int, right: int, delta: float, alpha: float) -> float:
    """The largest ε that so many right guesses refute with confidence 1 − alpha; 0 if they refute nothing."""
    low, high = 0.0, 30.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, right, middle, delta) <= alpha
        low, high = (middle, high) if refuted else (low, middle)
    return low


class _Model:
    """A stand-in for `AdaptedModel` with one weight for each canary, on which the canary pulls loudly one way."""

    def __init__(self, canaries: int, norm: float) -> None:
        self.peft = nn.Linear(canaries, 1, bias=False)
        self.device, self.norm, self.sign = torch.device("cpu"), norm, 1
        nn.init.zeros_(self.peft.weight)

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return SimpleNamespace(loss=self.sign * self.norm * self.peft(batch["canary"]).mean())


class _Canaries(Encoded):
    """Record i is the i-th unit vector."""

    def inputs(self, chosen: Tensor) -> dict[str, Tensor]:
        return {"canary": nn.functional.one_hot(chosen, len(self)).float()}


def _scores(settings: Settings, coins: np.ndarray) -> np.ndarray:
    """How much each canary looks like one that is in."""
    owner = np.arange(settings.canaries) % settings.clients
    seen = np.stack([_descent(settings, client, owner == client, coins) for client in range(settings.clients)])
    own = seen[owner, np.arange(settings.canaries)]
    others = (seen.sum(axis=0) - own) / max(1, settings.clients - 1)
    return np.where(own == 0, -np.inf, own - others)


def _descent(settings: Settings, client: int, owned: np.ndarray, coins: np.ndarray) -> np.ndarray:
    """The descent along every coordinate over all steps of a client, each with its sign taken back.

    The client's size, which sets q and the divisor, counts its canaries in or out: sizes are public.
    """
    size, indices = int(owned.sum()), np.flatnonzero(owned & coins)
    mechanism = Mechanism(settings.noise_multiplier, settings.clip)
    expected, physical = settings.sample_rate * size, settings.physical or size
    examples = _Canaries(torch.zeros(settings.canaries, dtype=torch.int64))
    model: Any = _Model(settings.canaries, LOUD * settings.clip)
    parameters = list(model.peft.parameters())
    flat = flatten(parameters)
    weights, total = flat.detach().numpy(), np.zeros(settings.canaries)  # weights: as they are, not a copy
    for round in range(1, settings.rounds + 1):
        streams = (settings.seed, client, round)
        key = simulated_key(streams, "audit", mechanism)
        task = Task(indices, TrainConfig(lr=1.0), "B", (1, 1), streams, mechanism, key)
        drawing = seeds.Stream(task.derived("batches"))
        draws = poisson(indices, settings.sample_rate, settings.steps // settings.rounds, drawing)
        descent = mechanism.descent(task.optimizer([flat]), expected, task.noise())
        with hooked(model, examples, parameters, descent, physical, task.derived("dropout")) as descend:
            for step, batch in enumerate(draws):
                model.sign, before = (-1) ** (round + step), weights.copy()
                descend(batch, 1.0)
                total += model.sign * (before - weights)
    return total


def parse(arguments: Sequence[str]) -> Settings:
    """Settings from `name=value` arguments; raises ConfigError for any that is not one."""
    defaults, values = dataclasses.asdict(Settings()), dict[str, Any]()
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument} is not a setting; write setting=value, such as canaries=1000")
        if name not in defaults:
            raise ConfigError(f"{name} is not a setting; {check.suggest(name, defaults)}")
        kind = type(defaults[name])
        try:
            values[name] = kind(text)
        except ValueError as error:
            wanted = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{name}={text} is not {wanted}; write {name}={defaults[name]}, for example") from error
    return Settings(**values).checked()


def help_text() -> str:
    """Usage, what the audit does, its settings with defaults and meanings, and the exit statuses."""
    rows = [(f"{item.name} ({item.default:g})", item.metadata["help"]) for item in dataclasses.fields(Settings)]
    return "\n".join(
        [
            "usage: python -m fedlora.tools.audit [setting=value …]",
            "",
            "Measures whether the private steps keep the ε that the accountant claims. It trains on records whose presence is",
            "decided by coins, guesses the coins from the models, and turns the right guesses into a lower bound on ε.",
            "The code is refuted where that bound is above the claim. It takes seconds, and reads no data and no model.",
            "",
            "settings (default): meaning",
            *(f"  {name:24} {meaning}" for name, meaning in rows),
            "",
            "examples:",
            "  python -m fedlora.tools.audit noise_multiplier=4 steps=4 canaries=1000",
            "  python -m fedlora.tools.audit clients=1000 sample_rate=0.1 steps=8    # most batches are empty",
            "",
            "exit status: 0 the claim stands; 1 it is refuted; 2 a setting is wrong.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Audit, and print the claim beside the bound. Returns 0 if the claim stands, 1 if it is refuted, 2 for bad settings."""
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    try:
        settings = parse(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # the tensors are small: a second thread would only wait for the first
    finding = audit(settings)
    print(", ".join(f"{name}={value:g}" for name, value in dataclasses.asdict(settings).items()))
    print(f"claimed      ε = {finding.claimed:.2f} at δ = {settings.delta:g} (PRV)")
    print(f"lower bound  ε ≥ {finding.bound:.2f} with 95 % confidence ({finding.right} of {finding.guesses} guesses right)")
    print("REFUTED: the code that ran is not as private as claimed" if finding.refuted else "the claim stands")
    return int(finding.refuted)


if __name__ == "__main__":
    sys.exit(main())
