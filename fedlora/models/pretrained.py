"""What a checkpoint holds: a model's own weights, or PEFT's adapter, merged into the base that it names with its saved head."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.check import ConfigError
from fedlora.models import files
from fedlora.models.reading import quiet, reading

LABELS = "labels.json"  # beside an adapter: the class of each logit, which PEFT's own file has no place for


def write_labels(folder: Path, classes: list[str]) -> None:
    """The class of each logit, in order."""
    (folder / LABELS).write_text(json.dumps(classes, ensure_ascii=False) + "\n", encoding="utf-8")


def source(path: str, auto: Any) -> tuple[Any, dict[str, Tensor] | None]:
    """The configuration of the classifier at `path`, and its tensors where they are not in its own files: of an adapter."""
    import transformers

    if os.path.isdir(path):
        files.sound(Path(path))
    base = files.base_of(path)
    if base is not None:
        return merged(path, base, auto)
    with reading(path):
        config = transformers.AutoConfig.from_pretrained(path, **files.at(path))
    if type(config) not in auto._model_mapping:
        kind = auto.__name__.removeprefix("AutoModelFor")
        raise ConfigError(
            f"model.path={path} is of the type {config.model_type}, for which transformers has no {kind}; use another "
            "checkpoint, or data of the other kind (dataset.text or dataset.image)"
        )
    return config, None


def read(path: str, config: Any, state: dict[str, Tensor] | None, auto: Any, stream: int = 0) -> tuple[Any, set[str], set[str]]:
    """The model of this configuration, its tensors from `state`, else from the files at `path`.

    Also the names of the parameters that were not there, and of those that had another shape: both drawn from `stream`.
    """
    with reading(path), quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream)
        how: dict[str, Any] = {"state_dict": state} if state is not None else files.at(path)
        model, info = auto._model_mapping[type(config)].from_pretrained(
            None if state is not None else path,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            **how,
        )
    return model, set(info["missing_keys"]), {name for name, *_ in info["mismatched_keys"]}


def merged(path: str, base: str, auto: Any) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the tensors of the adapter at `path` merged into `base`; what would be drawn at random is left out.

    `base` may be an adapter too. Raises ConfigError where the base is not there, or the adapter is of a kind without merging.
    """
    import peft

    weights = peft.load_peft_weights(path, device="cpu", **files.at(path))
    saved = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    model, lacked = _base(path, base, auto, _labels(path))
    classes = _outputs(model, saved)
    if classes and classes != model.config.num_labels:
        model, lacked = _base(path, base, auto, [f"LABEL_{i}" for i in range(classes)])
    adapted = peft.PeftModel.from_pretrained(model, path, **files.at(path))
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.peft_config["default"].peft_type.value
        raise ConfigError(f"model.path={path} is an adapter of the kind {kind}, which cannot be merged; use model.path={base}")
    whole: Any = adapted.merge_and_unload()
    return whole.config, {name: tensor for name, tensor in whole.state_dict().items() if name not in lacked - set(saved)}


def _base(path: str, base: str, auto: Any, classes: list[str]) -> tuple[Any, set[str]]:
    """The base with a head for the adapter's classes (empty: its own), and the names of what it lacked."""
    try:
        config, state = source(base, auto)
        if classes:
            named(config, classes)
        model, missing, mismatched = read(base, config, state, auto)
        return model, missing | mismatched
    except ConfigError as error:
        raise ConfigError(
            f"model.path={path} is an adapter of {base}, which cannot be loaded; put it there, or name its place as "
            f"base_model_name_or_path in {files.ADAPTER} ({error})"
        ) from error


def named(config: Any, classes: list[str]) -> None:
    """Tells a model's configuration its classes, in the order of the logits."""
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}


def _labels(path: str) -> list[str]:
    """What `write_labels` wrote, if it did."""
    file = Path(path, LABELS)
    return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []


def _outputs(model: Any, saved: dict[str, Tensor]) -> int:
    """The classes of the head that the adapter saved: its narrowest layer's; 0 where it saved none."""
    body = f"{model.base_model_prefix}."
    head = [t for name, t in saved.items() if t.dim() == 2 and ".lora_" not in name and not name.startswith(body)]
    return min((len(tensor) for tensor in head), default=0)
