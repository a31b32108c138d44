"""What a run leaves behind: the adapter in PEFT's format, or the merged model, each with what it takes to use it elsewhere.

Beside the weights lie the tokenizer or image processor and the names of the classes, in the order of the logits.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.arrays import lowrank, messages
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.check import ConfigError
from fedlora.models.adapted import AdaptedModel, as_numpy, put
from fedlora.models.pretrained import write_labels
from fedlora.models.reading import quiet


def adapter(model: AdaptedModel, folder: Path) -> None:
    """What was written to the model, as `PeftModel.from_pretrained(base, folder)` reads it; the base's place is recorded.

    R is folded into A; with a base correction the adapter holds both, at the sum of their ranks.
    """
    pairs, config = whole(model), model.peft.peft_config["default"]
    state = {name: tensor for name, tensor in model.peft.state_dict().items() if ".lora_R." not in name}
    for layer, pair in pairs.items():
        for factor, array in pair._asdict().items():
            state[f"{layer}.lora_{factor}.default.weight"] = torch.from_numpy(array)
    usual = config.r, config.lora_alpha, config.task_type, config.base_model_name_or_path
    config.r = next(iter(pairs.values())).rank
    config.lora_alpha = model.scale * config.r
    config.task_type, config.base_model_name_or_path = model.base.task, model.base.source
    try:
        model.peft.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    finally:
        config.r, config.lora_alpha, config.task_type, config.base_model_name_or_path = usual
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template, with nothing filled in
    write_labels(folder, model.base.classes)
    model.base.save_inputs(folder)


def refuse_merging(model: AdaptedModel) -> None:
    """Raises ConfigError where `merged` cannot save the model: one of a module of its own, in no library's format."""
    if not hasattr(model.base.model, "save_pretrained"):
        raise ConfigError("save_merged=true is for models of transformers, and this one is a module of its own; leave it out")


def merged(model: AdaptedModel, folder: Path) -> None:
    """The base model with everything that was written merged into it, as `AutoModel….from_pretrained(folder)` reads it."""
    other = copy.deepcopy(model.peft)
    with torch.no_grad():
        for layer, pair in whole(model).items():
            module: Any = other.get_submodule(layer)
            for factor, array in pair._asdict().items():
                put(getattr(module, f"lora_{factor}")["default"].weight, array)
            module.scaling["default"] = model.scale
    with quiet():
        other.merge_and_unload().save_pretrained(str(folder))
    model.base.save_inputs(folder)


def whole(model: AdaptedModel) -> Adapters:
    """R folded in and the correction beside it, all at one rank, in the scale alpha / rank of the settings."""
    adapters, _ = messages.fold(model.adapters(), model.dense())
    both = {
        layer: lowrank.stack([Pair(*map(as_numpy, model.correction[layer])), pair], np.ones(2))
        if layer in model.correction
        else pair
        for layer, pair in adapters.items()
    }
    rank = max(pair.rank for pair in both.values())
    return {layer: lowrank.pad(pair, rank) for layer, pair in both.items()}
