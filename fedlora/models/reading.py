"""What libraries raise and print while they read a checkpoint, turned into one sentence and into silence."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from fedlora.check import ConfigError, reason
from fedlora.models import files

WEIGHTS = "it needs config.json and model.safetensors"
TOKENIZER = "it needs the tokenizer's files beside the model: tokenizer.json, or vocab.txt and the like"
PROCESSOR = "it needs preprocessor_config.json beside the model"


@contextlib.contextmanager
def reading(path: str, cure: str = WEIGHTS) -> Iterator[None]:
    """Turns whatever is raised meanwhile about the checkpoint at `path` into a ConfigError that ends in `cure`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if not os.path.isdir(path):
            raise files.missing(path, error) from error
        raise ConfigError(f"model.path={path} cannot be loaded ({reason(error)}); {cure}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
