"""`model=hf`: any Hugging Face classifier, from a local folder or the hub, for text or images."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora import seeds
from fedlora.check import ConfigError
from fedlora.config import ModelConfig
from fedlora.data import Dataset, Examples
from fedlora.models.base import Base
from fedlora.models.encode import Encoded, Images, Texts


def load(config: ModelConfig, dataset: Dataset, seed: int) -> Base:
    """The checkpoint at `config.path` with its own tokenizer or image processor. Raises ConfigError, naming model.path."""
    path = str(config.path)
    model, new = load_classifier(path, dataset, seed)
    with _reading(path):
        encode = _text_encoder(config, model) if dataset.kind == "text" else _image_encoder(path, model)
    return Base(model, encode, new, config.dropout, config.dtype)


def load_classifier(path: str, dataset: Dataset, seed: int) -> tuple[nn.Module, list[str]]:
    """The checkpoint with a head for the dataset's classes, and the names of the parameters that it lacked.

    A head that it lacks, or has for another number of classes, is drawn from the stream (seed, head), so that every
    process has the same one. Raises ConfigError, naming model.path, where there is no usable checkpoint.
    """
    import transformers

    auto = {
        "text": transformers.AutoModelForSequenceClassification,
        "image": transformers.AutoModelForImageClassification,
    }[dataset.kind]
    with _reading(path), _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.torch_seed(seed, "head"))
        model, info = auto.from_pretrained(
            path,
            num_labels=len(dataset.classes),
            id2label=dict(enumerate(dataset.classes)),
            label2id={name: i for i, name in enumerate(dataset.classes)},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    return model, sorted(set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]})


def _text_encoder(config: ModelConfig, model: nn.Module) -> Any:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(config.path)
    if tokenizer.pad_token_id is None:  # decoders such as GPT-2 have none; the mask hides what stands there
        tokenizer.pad_token = tokenizer.eos_token
    model_config: Any = model.config
    model_config.pad_token_id = tokenizer.pad_token_id
    longest = min(getattr(model_config, "max_position_embeddings", config.max_length), tokenizer.model_max_length)
    return partial(encode_text, tokenizer, min(config.max_length, longest))


def encode_text(tokenizer: Any, max_length: int, examples: Examples) -> Encoded:
    """Token ids of every text, cut at `max_length`."""
    ids = tokenizer(list(examples.inputs), truncation=True, max_length=max_length, padding=False)["input_ids"]
    tokens = [np.asarray(row, dtype=np.int64) for row in ids]
    return Texts(torch.from_numpy(examples.labels), tokens, int(tokenizer.pad_token_id))


def _image_encoder(path: str, model: nn.Module) -> Any:
    import transformers

    # The PIL backend is asked for by name: the default one needs torchvision, which this project does not depend on.
    processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
    return partial(encode_images, processor, model.config)


def encode_images(processor: Any, model_config: Any, examples: Examples) -> Encoded:
    """Pixels resized and normalised by the checkpoint's own processor; grey images are repeated over the channels."""
    channels = getattr(model_config, "num_channels", 3)
    images = [_to_channels(np.asarray(image), channels) for image in examples.inputs]
    pixels = processor(images, do_rescale=False, input_data_format="channels_last", return_tensors="np")["pixel_values"]
    return Images(torch.from_numpy(examples.labels), torch.from_numpy(np.asarray(pixels, dtype=np.float32)))


def _to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, C) as (H, W, channels): grey repeated, colour averaged where one channel is asked for, alpha dropped."""
    colour = image[..., :3] if image.shape[2] == 4 else image
    if colour.shape[2] == channels:
        return colour
    return np.repeat(colour.mean(axis=2, keepdims=True), channels, axis=2)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turns what transformers says about a checkpoint it cannot read into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if os.path.isdir(path):
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"model.path={path} cannot be loaded ({reason}); it needs config.json, model.safetensors and, for text, "
                "the tokenizer's files"
            ) from error
        raise ConfigError(
            f"model.path={path} is neither a local folder nor a model that the hub gives "
            f"({type(error).__name__}); check the spelling, or the network"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' load report and progress bars off the terminal: `Base.new` says what it would say."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
