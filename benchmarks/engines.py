"""The main job on `engine=ray` against Flower's own simulation, `engine=flower`, as ratios taken in one run.

    python -m benchmarks.engines [--repeats 3] [-- setting=value …]

Each repetition runs `python run.py` once per engine, one after the other, in processes of their own and on the same number
of workers. Three spans are taken from the run's own records: start to the end of round 1 (engines differ in when a worker
builds its model, and by then all have), training in the later rounds (sum of `seconds_train`), and the whole run. The two
must end with the same accuracy and loss to the last bit, or the comparison is void and this exits with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENGINES = ("ray", "flower")


def measure(engine: str, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Seconds of the three spans of one run, and its accuracy and loss."""
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        f"engine={engine}",
        f"results={folder}",
        f"name={engine}",
        "overwrite=true",
    ]
    subprocess.run([*command, *overrides], check=True, capture_output=True, cwd=ROOT)
    summary = json.loads((folder / engine / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / engine / "rounds.jsonl").read_text().splitlines()]
    return {
        "start to end of round 1": rows[1]["seconds"],
        "training, later rounds": sum(row["seconds_train"] for row in rows[2:]),
        "whole run": summary["seconds"],
        "accuracy": summary["accuracy"],
        "loss": summary["loss"],
    }


def main() -> int:
    """Print seconds and ratios, median and range over the repetitions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            for engine in ENGINES:
                runs[engine].append(measure(engine, Path(folder), arguments.overrides))
    ends = {(run["accuracy"], run["loss"]) for engine in ENGINES for run in runs[engine]}
    job = " ".join(arguments.overrides) or "main job"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.repeats} repetitions, {job}")
    print(f"{'':25}{'ray':>10}{'flower':>10}   ratio (range)")
    for span in ("start to end of round 1", "training, later rounds", "whole run"):
        ray, flower = ([run[span] for run in runs[engine]] for engine in ENGINES)
        ratios = [f / r for f, r in zip(flower, ray, strict=True)]
        print(
            f"{span:25}{statistics.median(ray):8.1f} s{statistics.median(flower):8.1f} s   "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(f"the same accuracy and loss in all runs: {'yes' if len(ends) == 1 else 'NO'}")
    return 0 if len(ends) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
