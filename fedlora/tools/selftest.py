"""Whether DP-SGD does what it says on your model and your data.

The settings are those of run.py, and the privacy settings among them may be left out. A model that Opacus cannot train
privately is refused, in one sentence with the reason and the cure. Then each check prints one line with its numbers. The
checks go through the private training path itself (`clients.train`, `clients.private`), with dropout off; the clip bound
is tried with the adapters' dropout, if there is any.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clients import bounded
from clients.bounded import TOLERANCE, Gradients, by_hooks, by_sharing, difference, per_example, start, still, supported
from clients.private import Mechanism
from clients.train import train
from fedlora.app.compose import config_folder
from fedlora.check import ConfigError
from fedlora.compute import workbench
from fedlora.compute.workbench import Workbench
from fedlora.privacy.refusals import trained
from fedlora.tools import cli

CONFIGS = config_folder()
EXAMPLES = """examples:
  python -m fedlora.tools.selftest                             # the embedded model and digits
  python -m fedlora.tools.selftest model=hf model.path=FOLDER dataset=files dataset.path=notes.csv dataset.text=text

exit status: 0 every check is ok; 1 a check FAILED; 2 the model is refused, or a setting or a file is wrong.
"""
RECORDS = 8  # of different lengths, that the checks look at
NOBODY = 1e-9  # an expected batch size with which a step draws no record
ONE_STEP = {"steps": 1, "epochs": None, "warmup": 0.0, "schedule": "constant"}
PLAIN_SGD = ONE_STEP | {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {'ok' if self.ok else 'FAILED'} ({self.detail})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the self-test that the command line asks for. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m fedlora.tools.selftest", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="setting=value", help="settings of run.py (python run.py --help); none: the defaults"
    )
    try:
        (overrides,) = cli.expand(parser.parse_args(argv).overrides, multirun=False)
        return report(workbench.build(cli.compose(CONFIGS, overrides)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def report(bench: Workbench) -> int:
    """Print every check of this workbench. Returns 0 if all are ok, else 1; raises ConfigError for what is refused."""
    print(support(bench), flush=True)
    failed = 0
    for check in (per_example_gradients, shared_passes, independence, sensitivity, noise, movement):
        found = check(bench)
        failed += not found.ok
        print(found, flush=True)
    return min(failed, 1)


# ---- what is refused


def support(bench: Workbench) -> Check:
    """Raises ConfigError, with reason and cure, for the first thing about this model that no run could train privately."""
    if len(bench.train) < RECORDS:
        raise ConfigError(f"dataset.path has {len(bench.train)} training examples; the self-test needs {RECORDS}")
    supported(bench, "AB", records(bench))
    per_example(bench, "AB", [records(bench)])
    parameters = bench.model.trainable("AB")
    layers = ", ".join(sorted({type(module).__name__ for module in bench.model.peft.modules() if trained(module)}))
    return Check("support", True, f"{sum(p.numel() for p in parameters):,} trained parameters in {layers}")


# ---- the checks


def per_example_gradients(bench: Workbench) -> Check:
    """The gradients of the records of a batch, by Opacus' hooks, are those of single-example backward passes."""
    return _alone("per-example gradients", bench, by_hooks)


def shared_passes(bench: Workbench) -> Check:
    """The gradients of a pass that clients share, each with factors of its own, are those of single-example passes."""
    if bench.rows.refusal:
        return Check("shared passes", True, f"there are none, clients train one by one: {bench.rows.refusal}")
    return _alone("shared passes", bench, by_sharing)


def independence(bench: Workbench) -> Check:
    """A record's gradient is the same whatever else is in its batch, and however far it is padded for that."""
    chosen = records(bench)
    whole, *parts = per_example(bench, "AB", [chosen, chosen[:1], chosen[1:3], chosen[3:]])
    error, _ = difference({name: torch.cat([part[name] for part in parts]) for name in whole}, whole)
    cure = "; the loss must be a plain mean over records: no mean over tokens, no class weights" if error > TOLERANCE else ""
    return Check("independence", not cure, f"other batch mates and padding change a gradient by {error:.1e}{cure}")


def sensitivity(bench: Workbench) -> Check:
    """With σ = 0, one record more or less moves q·n times the step by at most C; C is set low, so that it binds.

    The adapters' dropout acts, if there is any.
    """
    chosen, most = records(bench), 0.0
    for trains in ("AB", "B"):
        (gradients,) = per_example(bench, trains, [chosen])
        norms = torch.stack([rows.flatten(1).norm(dim=1) for rows in gradients.values()]).norm(dim=0)
        clip = float(norms.median()) / 2 or 1.0
        batches = [chosen] + [np.delete(chosen, k) for k in (0, RECORDS // 2, RECORDS - 1)]  # q = 1, so n is the batch
        way: dict[str, Any] = {"drops": True, "lr": 1 / clip}
        whole, *rest = (len(b) * move(bench, Mechanism(0.0, clip), trains, b, batch_size=len(b), **way) for b in batches)
        most = max(most, *(float(np.linalg.norm(whole - less)) for less in rest))
    return Check("clip bound", most <= 1.001, f"one record moves the clipped sum by at most {most:.4f} C, C being {clip:.2g}")


def noise(bench: Workbench) -> Check:
    """The noise has standard deviation σC, on an empty batch too; that of other clients and rounds is unrelated to it."""
    chosen, sigma, clip = records(bench), 2.0, 0.5
    size = sum(parameter.numel() for parameter in bench.model.trainable("AB"))
    keys = [(k % 2, 1 + k // 2) for k in range(max(4, -(-20_000 // size)))]  # (client, round)
    ratios, correlation = [], 0.0
    for expected in (len(chosen), NOBODY):
        lr = 0.1 * expected / (sigma * clip)  # so that rounding of the weights stays far below the noise
        step: dict[str, Any] = {"lr": lr, "batch_size": expected}
        quiet = move(bench, Mechanism(0.0, clip), "AB", chosen, **step)
        draws = 10 * np.stack([move(bench, Mechanism(sigma, clip), "AB", chosen, key, **step) - quiet for key in keys])
        ratios.append(float(draws.std()))
        with np.errstate(invalid="ignore"):  # no noise at all has no correlation, and fails below
            correlation = max(correlation, float(np.abs(np.corrcoef(draws) - np.eye(len(keys))).max()))
    limit = 5 / np.sqrt(size)
    return Check(
        "noise",
        all(abs(ratio - 1) <= 0.03 for ratio in ratios) and correlation <= limit,
        f"std {ratios[0]:.3f} σC, on empty batches {ratios[1]:.3f} σC, over {len(keys) * size:,} coordinates; "
        f"between clients and rounds |r| ≤ {correlation:.3f}, limit {limit:.3f}",
    )


def movement(bench: Workbench) -> Check:
    """One step with your own optimiser and clip changes every array that is trained, and nothing of a frozen factor."""
    least, wrong = np.inf, ""
    for trains in ("AB", "B"):
        start(bench, trains)
        before = {name: parameter.detach().clone() for name, parameter in bench.model.peft.named_parameters()}
        clipped = Mechanism(0.0, bench.config.privacy.clip)
        move(bench, clipped, trains, records(bench), settings=ONE_STEP, batch_size=RECORDS)
        for name, parameter in bench.model.peft.named_parameters():
            change = float((parameter.detach() - before[name]).abs().max())
            least = min(least, change) if parameter.requires_grad else least
            if parameter.requires_grad != (change > 0):
                wrong = f"; {name} {'did not move' if parameter.requires_grad else 'is frozen and moved'}, training {trains}"
    return Check("movement", not wrong, f"the least change of a trained array is {least:.1e}{wrong}")


# ---- what they share


def records(bench: Workbench) -> np.ndarray:
    """Indices of a few training records, from the shortest to the longest."""
    return bounded.records(bench, RECORDS)


def _alone(name: str, bench: Workbench, way: Callable[[Workbench, str, np.ndarray], tuple[Gradients, Gradients]]) -> Check:
    """Whether gradients in a batch are those of each record alone, whatever factors are trained."""
    worst = {trains: difference(*way(bench, trains, records(bench)))[0] for trains in ("AB", "B")}
    numbers = ", ".join(f"{error:.1e} for factors {trains}" for trains, error in worst.items())
    return Check(name, max(worst.values()) <= TOLERANCE, f"off single-example passes by {numbers}")


def move(
    bench: Workbench,
    mechanism: Mechanism,
    trains: str,
    indices: np.ndarray,
    key: tuple[int, int] = (0, 1),  # client and round
    settings: dict[str, Any] = PLAIN_SGD,
    drops: bool = False,  # whether the adapters' dropout acts
    **changes: float,  # batch_size among them: the expected one
) -> np.ndarray:
    """The change of all that is trained by one step of the private training path, as one vector of float64."""
    parameters = start(bench, trains)
    before = [parameter.detach().clone() for parameter in parameters]
    chosen = dataclasses.replace(bench.config.train, **(settings | changes))
    with nullcontext() if drops else still(bench.model):
        train(bench.model, bench.train, indices, chosen, trains, (1, 1), (bench.config.seed, *key), mechanism)
    moved = [(parameter.detach() - old).flatten() for parameter, old in zip(parameters, before, strict=True)]
    return torch.cat(moved).double().cpu().numpy()


if __name__ == "__main__":
    sys.exit(main())
