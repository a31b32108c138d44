"""`model=hf`: any Hugging Face classifier, from a local folder or the hub, for text or images."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fedlora import seeds
from fedlora.check import ConfigError, reason
from fedlora.config import ModelConfig
from fedlora.data import Dataset, Examples
from fedlora.models import files, heads, pretrained, tokens
from fedlora.models.base import Base
from fedlora.models.encode import Encoded, Images
from fedlora.models.reading import PROCESSOR, quiet, reading


class Classifier(NamedTuple):
    """A checkpoint with a head for the dataset's classes."""

    model: nn.Module
    new: list[str]  # names of the parameters that it lacked, drawn at random
    classes: list[str]  # the dataset's class of each logit
    head: str  # where the head comes from, for the plan


def load(config: ModelConfig, dataset: Dataset, seed: int) -> Base:
    """The checkpoint at `config.path` with its own tokenizer or image processor. Raises ConfigError, naming model.path."""
    path = str(config.path)
    model, new, classes, head = load_classifier(path, dataset, seed, config.head)
    encode: Callable[[Examples], Encoded]
    inputs = _inputs(path)
    if dataset.kind == "text":
        known = tokens.read(inputs, files.at(inputs), config.max_length, model)
        known.refuse_unknown(tokens.texts_of(dataset.train if len(dataset.train) else dataset.test), config.max_unknown)
        encode, saved = known.encode, known.tokenizer
    else:
        saved = _image_processor(inputs)
        encode = partial(encode_images, path, saved, model.config)
    source = os.path.abspath(path) if os.path.isdir(path) else path

    def save_inputs(folder: Path) -> None:
        saved.save_pretrained(str(folder))

    task = "SEQ_CLS" if dataset.kind == "text" else None
    return Base(model, encode, new, config.dropout, config.dtype, classes, head, source, task, save_inputs)


def load_classifier(path: str, dataset: Dataset, seed: int, head: Any = "auto") -> Classifier:
    """The checkpoint with a head for the dataset's classes; `head` is `model.head`.

    A head that it lacks, or has for other classes, is drawn from the stream (seed, head), so that every process has the same
    one. Raises ConfigError, naming model.path or model.head, where there is no usable checkpoint.
    """
    import transformers

    heads.checked(head)
    auto = {
        "text": transformers.AutoModelForSequenceClassification,
        "image": transformers.AutoModelForImageClassification,
    }[dataset.kind]
    stream = seeds.torch_seed(seed, "head")
    with reading(path), quiet():
        config, state = pretrained.source(path, auto)
        placed = heads.place(path, [str(config.id2label[i]) for i in range(config.num_labels)], dataset.classes, head)
        problem, config.problem_type = config.problem_type, "single_label_classification"
        pretrained.named(config, placed.classes)
        model, missing, mismatched = pretrained.read(path, config, state, auto, stream)
        body = f"{model.base_model_prefix}."
        if any(not name.startswith(body) for name in missing):  # a body alone: nothing of it has learned any class
            heads.refuse_none(path, head)
            placed = heads.Placed([*dataset.classes], False, heads.NONE)
            pretrained.named(model.config, placed.classes)
        else:
            heads.refuse(path, placed, problem, head)
            if head == "new":
                state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(body)}
                model, missing, mismatched = pretrained.read(path, config, state, auto, stream)
    return Classifier(model, sorted(missing | mismatched), placed.classes, placed.why)


def _inputs(path: str) -> str:
    """Where the tokenizer or image processor of a checkpoint is: an adapter may have it, else its base has."""
    base = files.base_of(path)
    if base is None or files.has(path, {"tokenizer_config.json", "preprocessor_config.json"}, files.at(path)):
        return path
    return _inputs(base)


def _image_processor(path: str) -> Any:
    import transformers

    with reading(path, PROCESSOR):
        # The PIL backend is asked for by name: the default one needs torchvision, which this project does not depend on.
        return transformers.AutoImageProcessor.from_pretrained(path, backend="pil", **files.at(path))


def encode_images(path: str, processor: Any, model_config: Any, examples: Examples) -> Encoded:
    """Pixels resized and normalised by the checkpoint's own processor; grey images are repeated over the channels.

    Raises ConfigError, naming model.path, where the processor cannot do that.
    """
    channels = getattr(model_config, "num_channels", 3)
    images = [_to_channels(np.asarray(image), channels) for image in examples.inputs]
    try:
        found = processor(images, do_rescale=False, input_data_format="channels_last", return_tensors="np")
        pixels = np.asarray(found["pixel_values"], dtype=np.float32)
    except Exception as error:  # the library does not check what is in the file
        raise ConfigError(
            f"model.path={path}: its preprocessor_config.json prepares no image ({reason(error)}); fetch or save it again"
        ) from error
    return Images(torch.from_numpy(examples.labels), torch.from_numpy(pixels))


def _to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, C) as (H, W, channels): grey repeated, colour averaged where one channel is asked for, alpha dropped."""
    colour = image[..., :3] if image.shape[2] == 4 else image
    if colour.shape[2] == channels:
        return colour
    return np.repeat(colour.mean(axis=2, keepdims=True), channels, axis=2)
