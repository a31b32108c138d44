"""Small model folders, damaged: a run begins with them, or one sentence says why not."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import tiny
from tests.fuzz import damage
from tests.fuzz.commands import standing_in, tried, warm


def adapter(folder: Path) -> Path:
    """What PEFT saves: no base model."""
    settings = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "nowhere", "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    shutil.copy(folder.parent / "bert" / "model.safetensors", folder / "adapter_model.safetensors")
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "bert": lambda folder: tiny.bert(folder, ["no", "yes"]),
    "gpt2": tiny.gpt2,
    "vit": lambda folder: tiny.vit(folder, 10),
    "adapter": adapter,
}
TEXTS = ["dataset=files", "dataset.path=t.csv", "dataset.text=text"]
BASE = ["plan=true", "model=hf", "model.path=model", "clients=2", "engine=inline", "device=cpu", "partition=iid"]


@contextlib.contextmanager
def part(folder: Path) -> Iterator[Callable[[int], Counter[str]]]:
    """The function from a seed to what came of its damage."""
    whole = folder / "whole"
    for name, make in MAKERS.items():
        (whole / name).mkdir(parents=True)
        make(whole / name)
    with standing_in(folder / "work") as here:
        warm()
        (here / "t.csv").write_text("text,label\n" + "a good film,yes\na bad film,no\n" * 8)

        def case(seed: int) -> Counter[str]:
            rng = random.Random(seed)
            name = rng.choice(["bert", "bert", *MAKERS])
            shutil.rmtree(here / "model", ignore_errors=True)
            shutil.copytree(whole / name, here / "model")
            for _ in range(rng.choice((1, 1, 2))):
                damage.file(rng.choice(damage.files(here / "model")), rng)
            return Counter({f"{tried([*BASE, *([] if name == 'vit' else TEXTS)], folder / 'work')} ({name})": 1})

        yield case
