"""Example data for devices: scikit-learn's handwritten digits as PNG files, with an index for each of K devices.

python examples/edge/digits.py FOLDER K     → FOLDER/device-0.jsonl …, test.jsonl (the server's), all.jsonl (a simulation's)
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fedlora.config import DatasetConfig
from fedlora.data import digits


def main(folder: Path, devices: int, each: int = 96) -> None:
    """Writes `each` digits for every device, and 200 for the test."""
    data = digits.load(DatasetConfig(), 0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    parts = {f"device-{k}": (data.train, range(k, each * devices, devices)) for k in range(devices)}
    everything = []
    for name, (examples, indices) in (parts | {"test": (data.test, range(200))}).items():
        rows = []
        for i in indices:
            path = f"images/{name}-{i}.png"
            Image.fromarray(np.rint(examples.inputs[i][..., 0] * 255).astype(np.uint8)).save(folder / path)
            rows.append({"image": path, "label": data.classes[examples.labels[i]], "device": name})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        everything += rows if name != "test" else []
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in everything), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
