"""What is learned, from what, and how: model, dataset, partition, adapter and local training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from fedlora import check
from fedlora.setting import FINITE, setting


@dataclass
class ModelConfig:
    """The frozen base model: `model=vit_digits` (embedded) or `model=hf model.path=<folder or hub name>`."""

    name: str = setting("vit_digits", "vit_digits (embedded, 64 × 4 layers) or hf (any Hugging Face classifier)")
    path: str | None = setting(None, "local folder or hub name of the checkpoint", only="model=hf")
    max_length: int = setting(
        128,
        "the longest text, in tokens; what is beyond is cut off",
        takes=check.positive,
        most=1e6,
        only=("dataset!=digits", "dataset.image=null"),
    )
    dtype: str = setting(
        "float32",
        "precision of the frozen base: float32 or bfloat16 (adapters, gradients and noise stay float32)",
        takes=partial(check.one_of, ("float32", "bfloat16")),
    )
    dropout: bool = setting(False, "the checkpoint's own dropout acts in training", only="model=hf")
    head: Any = setting(
        "auto", "the checkpoint's own head: auto (by class names), position, new, or a map {its class: ours}", only="model=hf"
    )
    max_unknown: float = setting(
        0.05,
        "share of tokens that the tokenizer may not know; above it a run is refused",
        takes=partial(check.between, 0, 1),
        only=("model=hf", "dataset!=digits", "dataset.image=null"),
    )

    def __post_init__(self) -> None:
        """Names of classes are text, as they are in JSON."""
        if isinstance(self.head, dict):
            self.head = {str(name): str(value) for name, value in self.head.items()}


@dataclass
class DatasetConfig:
    """Where the examples come from: `dataset=digits`, `dataset=files` or `dataset=hub`."""

    name: str = setting("digits", "digits (embedded), files (CSV, TSV, JSON, Parquet) or hub")
    path: str | None = setting(None, "the training file, or the name of the dataset on the hub", only="dataset=files|hub")
    subset: str | None = setting(None, "the configuration of the dataset, where it has several", only="dataset=hub")
    train_split: str = setting("train", "split to train on", only="dataset=hub")
    test: str | None = setting(
        None, "the test file, or the test split on the hub; none: test_fraction of the training data", only="dataset=files|hub"
    )
    test_fraction: float = setting(
        0.2,
        "share of the examples kept for the central test; 0: none",
        takes=check.below_one,
        only=("dataset.test=null", "deploy=null"),
    )
    columns: list[str] = setting([], "column names, for a CSV or TSV without a header line", only="dataset=files")
    classes: list[str] = setting(
        [], "names of the labels in the order of the outputs; empty: those in the training data", only="dataset=files|hub"
    )
    text: str | None = setting(None, "column of the text", only="dataset=files|hub")
    image: str | None = setting(None, "column of the image: a path (files) or an image feature (hub)", only="dataset=files|hub")
    label: str = setting("label", "column of the label", only="dataset=files|hub")
    group: str | None = setting(None, "column of the example's group", only=("dataset=files|hub", "partition=natural|domains"))
    domains: list[str] = setting([], "images: give each example one of these looks: plain, rotation, inversion, stroke, blur")


@dataclass
class PartitionConfig:
    """How the training examples are dealt out to clients; every example goes to exactly one."""

    name: str = setting("dirichlet", "iid, dirichlet, shards, quantity, natural, domains or own (deploy: what a device has)")
    alpha: float = setting(
        0.5, "concentration; small is skewed, large is even", takes=check.positive, only="partition=dirichlet|quantity"
    )
    shards_per_client: int = setting(
        2, "label-sorted shards that each client gets", takes=check.positive, most=1e6, only="partition=shards"
    )
    min_examples: int = setting(2, "fewest examples of a client", takes=check.positive, most=1e9, only="partition!=own")
    sizes: list[int] = setting([], "the number of each client's examples, as the devices tell it", only="partition=own")


@dataclass
class AdapterConfig:
    """The low-rank adapters: W = W0 + (alpha / rank) · B A."""

    rank: int = setting(
        8, "rank r of the server's adapters, and of every client's unless ranks says otherwise", takes=check.positive, most=1024
    )
    ranks: Any = setting(None, "ranks of the clients: a list, shares such as {4: .5, 8: .5}, or memory (adapter.memory)")
    memory: Any = setting(None, "MB that clients have for training adapters, a list or shares; sets each one's rank")
    alpha: float = setting(
        8.0, "LoRA's alpha; the scale of B A is alpha / rank", takes=check.positive_finite, most=FINITE, also="lora_alpha"
    )
    dropout: float = setting(0.0, "dropout on the adapter's input while training", takes=check.below_one)
    target_modules: list[str] = setting([], "names (endings) of the linear layers to adapt; empty: query and value")
    layers: list[int] = setting([], "blocks to adapt, such as [-2,-1] for the last two; empty: all")
    train_head: bool | None = setting(None, "train the classification head too; none: only if the checkpoint has none")

    @property
    def unequal(self) -> bool:
        """Whether clients may have ranks of their own."""
        return self.ranks is not None or self.memory is not None

    def __post_init__(self) -> None:
        """Keys of shares are text, as they are in JSON."""
        self.ranks, self.memory = (
            {str(key): share for key, share in value.items()} if isinstance(value, dict) else value
            for value in (self.ranks, self.memory)
        )


@dataclass
class TrainConfig:
    """What a client does in one round."""

    steps: int | None = setting(
        10,
        "local optimiser steps a round",
        takes=check.positive,
        most=1e6,
        only="train.epochs=null",
        also="local_steps max_steps",
    )
    epochs: int | None = setting(
        None,
        "local passes over the client's data a round, instead of train.steps",
        takes=check.positive,
        most=1e6,
        also="local_epochs num_train_epochs",
    )
    batch_size: int = setting(16, "examples a step (a smaller client uses all it has)", takes=check.positive, most=1e9)
    sampling: str = setting(
        "shuffle",
        "shuffle (passes over the data) or poisson, which privacy=record always uses",
        takes=partial(check.one_of, ("shuffle", "poisson")),
        only="privacy!=record",
    )
    optimizer: str = setting("sgd", "sgd or adamw", takes=partial(check.one_of, ("sgd", "adamw")))
    lr: float = setting(0.5, "learning rate", takes=check.positive_finite, most=FINITE, also="learning_rate client_lr eta")
    momentum: float = setting(0.0, "momentum, fresh in every round", takes=check.below_one, only="train.optimizer=sgd")
    weight_decay: float = setting(0.0, "weight decay on what is trained", takes=check.not_negative, most=FINITE)
    schedule: str = setting(
        "constant",
        "constant, linear or cosine decay of lr over the whole run",
        takes=partial(check.one_of, ("constant", "linear", "cosine")),
    )
    warmup: float = setting(0.0, "share of the run over which lr rises from 0", takes=check.below_one)
    proximal: float = setting(
        0.0, "FedProx's μ: weight of μ/2 ‖x − what was sent‖² in a client's loss", takes=check.not_negative, most=FINITE
    )
    max_grad_norm: float | None = setting(None, "clip the norm of each step's whole gradient to this", takes=check.positive)
    physical_batch_size: int | None = setting(
        None, "examples a forward pass at most, to bound memory; none: the whole batch", takes=check.positive, most=1e9
    )
