"""The settings in groups, each a plain dataclass; the `help` texts are what `python run.py --help` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its default and the sentence that `--help` prints."""
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class ModelConfig:
    """The frozen base model: `model=vit_digits` (embedded) or `model=hf model.path=<folder or hub name>`."""

    name: str = setting("vit_digits", "vit_digits (embedded, 64 × 4 layers) or hf (any Hugging Face classifier)")
    path: str | None = setting(None, "hf: local folder or hub name of the checkpoint")
    max_length: int = setting(128, "text: tokens kept of each example")
    dtype: str = setting("float32", "of the frozen base: float32, or bfloat16 (adapters, gradients and noise stay float32)")
    dropout: bool = setting(False, "hf: the base's own dropout acts in training too; off: its features are fixed")


@dataclass
class DatasetConfig:
    """Where the examples come from: `dataset=digits`, `dataset=files` or `dataset=hub`."""

    name: str = setting("digits", "digits (embedded), files (CSV, TSV, JSONL, Parquet) or hub")
    path: str | None = setting(None, "files: the training file; hub: the name of the dataset")
    subset: str | None = setting(None, "hub: the configuration of the dataset, where it has several")
    train_split: str = setting("train", "hub: split to train on")
    test: str | None = setting(None, "files: the test file; hub: the test split; none: test_fraction of the training data")
    test_fraction: float = setting(0.2, "share of the examples kept for the central test if there is no test set; 0: none")
    columns: list[str] = setting([], "files: column names, for a CSV or TSV without a header line")
    classes: list[str] = setting([], "files: names of the labels; empty: those that occur in the training data")
    text: str | None = setting(None, "column of the text")
    image: str | None = setting(None, "column of the image: a path (files) or an image feature (hub)")
    label: str = setting("label", "column of the label")
    group: str | None = setting(None, "column of the example's group, for partition=natural or domains")
    domains: list[str] = setting([], "images: give each example one of these looks: plain, rotation, inversion, stroke, blur")


@dataclass
class PartitionConfig:
    """How the training examples are dealt out to clients; every example goes to exactly one."""

    name: str = setting("dirichlet", "iid, dirichlet, shards, quantity, natural, domains or own (deploy: what a device has)")
    alpha: float = setting(0.5, "dirichlet, quantity: concentration; small is skewed, large is even")
    shards_per_client: int = setting(2, "shards: label-sorted shards that each client gets")
    min_examples: int = setting(2, "floor on the examples of a client")
    sizes: list[int] = setting([], "own: the number of each client's examples, as the devices tell it")


@dataclass
class AdapterConfig:
    """The low-rank adapters: W = W0 + (alpha / rank) · B A."""

    rank: int = setting(8, "rank r of the server's adapters, and of every client's unless ranks says otherwise")
    ranks: Any = setting(None, "ranks of the clients: a list, shares such as {4: .5, 8: .5}, or memory (adapter.memory)")
    memory: Any = setting(None, "MB that clients have for training adapters, a list or shares; sets each one's rank")
    alpha: float = setting(8.0, "LoRA's alpha; the scale of B A is alpha / rank")
    dropout: float = setting(0.0, "dropout on the adapter's input while training")
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

    steps: int | None = setting(10, "local optimiser steps a round; none with train.epochs")
    epochs: int | None = setting(None, "local passes over the client's data a round, instead of train.steps")
    batch_size: int = setting(16, "examples a step (a smaller client uses all it has)")
    sampling: str = setting("shuffle", "shuffle (passes over the data) or poisson, which privacy=record always uses")
    optimizer: str = setting("sgd", "sgd or adamw")
    lr: float = setting(0.5, "learning rate")
    momentum: float = setting(0.0, "sgd: momentum, fresh in every round")
    weight_decay: float = setting(0.0, "weight decay on what is trained")
    schedule: str = setting("constant", "constant, linear or cosine decay of lr over the whole run")
    warmup: float = setting(0.0, "share of the run over which lr rises from 0")
    proximal: float = setting(0.0, "FedProx's μ: weight of μ/2 ‖x − what was sent‖² in a client's loss")
    max_grad_norm: float | None = setting(None, "clip the norm of each step's whole gradient to this")
    physical_batch_size: int | None = setting(None, "examples a forward pass at most, to bound memory; none: the whole batch")


@dataclass
class CompressionConfig:
    """What messages are made smaller by; bytes are counted as sent."""

    up: str = setting("none", "what clients send: none, float16, int8, int4 or top_k, with error feedback")
    down: str = setting("none", "what the server sends: none, float16, int8 or int4")
    top_k: float = setting(0.1, "top_k: share of the entries of each array that is sent")


@dataclass
class ServerConfig:
    """What the server does besides the strategy's own step."""

    mean: str = setting("weighted", "of updates: weighted, median, trimmed (both coordinate by coordinate), or norm_filter")
    trim: float = setting(0.1, "trimmed: share of the clients cut off at each end")
    norm_factor: float = setting(3.0, "norm_filter: updates longer than this many times the median are left out")
    max_weight: float = setting(1.0, "largest share of a cohort's weight that one client may have; 1: as its examples say")
    max_update: float = setting(100.0, "an update longer than this many times the cohort's median is dropped; inf: none is")
    optimizer: str = setting("none", "of the server, on the merged factors: none, momentum (FedAvgM) or adam (FedAdam)")
    lr: float = setting(1.0, "of the server's optimiser")
    momentum: float = setting(0.9, "momentum: its share kept; adam: β1")
    beta2: float = setting(0.99, "adam: β2")
    secure_bound: float = setting(8.0, "aggregation=secure: bound on the change of a coordinate; a client beyond it drops out")
    tau: float = setting(1e-3, "adam: what is added to the root of the second moment")


@dataclass
class PrivacyConfig:
    """What protects whom: nothing, DP-SGD at every client (its records), or DP-FedAvg at the server (whole clients)."""

    name: str = setting("none", "none, record (DP-SGD at every client) or user (DP-FedAvg at the server)")
    epsilon: float | None = setting(None, "every client's budget ε; record, with noise_multiplier: where it stops")
    delta: float = setting(1e-5, "δ of the guarantee")
    clip: float = setting(1.0, "bound on the norm of one record's gradient (record), of a client's whole update (user)")
    noise_multiplier: float | None = setting(None, "σ (record) or z (user); none: derived from epsilon")
    participation: str = setting("schedule", "record: the rounds that σ is derived for: schedule, worst, or expected")
    adjacency: str = setting("add_remove", "neighbours differ in one that adds nothing (add_remove) or is another (replace)")
    accountant: str = setting("prv", "record: prv, or rdp (quicker, 8 to 29 % looser; add_remove only)")
    sampling: str = setting("poisson", "user: how a cohort is drawn and accounted: poisson, fixed, none (with deploy: none)")


@dataclass
class EvaluateConfig:
    """When and on what the merged model is measured."""

    every: int = setting(1, "evaluation every so many rounds and after the last; the central one also before the first")
    batch_size: int = setting(256, "examples a forward pass")
    holdout: float = setting(0.0, "share of its examples that each client keeps back to test the merged model on; 0: none")


@dataclass
class CheckpointConfig:
    """What a run that is broken off goes on from. Changes no number."""

    every: int = setting(1, "a checkpoint every so many rounds, which the same command goes on from; 0: none")
    keep: int = setting(2, "checkpoints kept, so that one that is damaged has one before it")


@dataclass
class EngineConfig:
    """Where clients run. Changes speed only, never a number."""

    name: str = setting("ray", "ray (own grid over Ray actors), inline (this process) or flower (Flower's simulation)")
    address: str | None = setting(None, "ray: an existing cluster, head:port or auto; none: a Ray of this process's own")
    workers: int | None = setting(None, "ray, flower: worker processes; none: one a core, or one a GPU")
    gpus_per_worker: float | None = setting(None, "ray, flower: share of a GPU a worker holds; none: 1 on cuda, else 0")
    cohort: str = setting("auto", "ray, inline: clients that share a pass: auto (measured once a machine) or a number")
    share: int = setting(1, "ray: cells of a sweep that a worker plays in step, so that their clients may share a pass")
    prefix_cache: float = setting(1.0, "GB a process may keep of what the blocks below all adapters make of examples; 0: none")
    retries: int = setting(2, "ray: times a client is run again after its worker died")
