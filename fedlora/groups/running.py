"""What stands around local training: messages, server, privacy, evaluation, checkpoints and engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fedlora import check
from fedlora.setting import FINITE, setting

LARGEST_NOISE = 1e6  # noise multiplier: more only overflows the accountant


@dataclass
class CompressionConfig:
    """What messages are made smaller by; bytes are counted as sent."""

    up: str = setting(
        "none",
        "what clients send: none, float16, int8, int4 or top_k, with error feedback",
        takes=partial(check.one_of, ("none", "float16", "int8", "int4", "top_k")),
    )
    down: str = setting(
        "none",
        "what the server sends: none, float16, int8 or int4",
        takes=partial(check.one_of, ("none", "float16", "int8", "int4")),
    )
    top_k: float = setting(
        0.1, "share of the entries of each array that is sent", takes=check.fraction, only="compression.up=top_k"
    )


@dataclass
class ServerConfig:
    """What the server does besides the strategy's own step."""

    mean: str = setting(
        "weighted",
        "how updates are averaged: weighted, median, trimmed (both coordinate by coordinate), or norm_filter",
        takes=partial(check.one_of, ("weighted", "median", "trimmed", "norm_filter")),
    )
    trim: float = setting(0.1, "share of the clients cut off at each end", takes=check.below_half, only="server.mean=trimmed")
    norm_factor: float = setting(
        3.0,
        "updates longer than this many times the median are left out",
        takes=check.positive,
        only="server.mean=norm_filter",
    )
    max_weight: float = setting(
        1.0,
        "largest share of a cohort's weight that one client may have; 1: no bound",
        takes=check.fraction,
        only=("server.mean=weighted", "privacy!=user"),
    )
    max_update: float = setting(
        100.0,
        "an update longer than this many times the cohort's median is dropped; inf: no bound",
        takes=check.positive,
        only=("privacy!=user", "aggregation=plain"),
    )
    optimizer: str = setting(
        "none",
        "server optimiser, on the merged factors: none, momentum (FedAvgM) or adam (FedAdam)",
        takes=partial(check.one_of, ("none", "momentum", "adam")),
    )
    lr: float = setting(
        1.0, "learning rate of the server", takes=check.positive, most=FINITE, only="server.optimizer=momentum|adam"
    )
    momentum: float = setting(
        0.9, "share kept of the momentum (β1 of adam)", takes=check.below_one, only="server.optimizer=momentum|adam"
    )
    beta2: float = setting(0.99, "β2", takes=check.below_one, only="server.optimizer=adam")
    secure_bound: float = setting(
        8.0,
        "bound on the change of a coordinate; a client beyond it drops out",
        takes=check.positive,
        most=FINITE,
        only="aggregation=secure",
    )
    tau: float = setting(
        1e-3,
        "constant added to the root of the second moment",
        takes=check.positive,
        most=FINITE,
        only="server.optimizer=adam",
    )


@dataclass
class PrivacyConfig:
    """What protects whom: nothing, DP-SGD at every client (its records), or DP-FedAvg at the server (whole clients)."""

    name: str = setting(
        "none",
        "none, record (DP-SGD at every client) or user (DP-FedAvg at the server)",
        takes=partial(check.one_of, ("none", "record", "user")),
    )
    epsilon: float | None = setting(
        None,
        "every client's budget ε; inf: no limit. With privacy=record and noise_multiplier, a client stops before it is spent",
        takes=partial(check.between_or_inf, 0, 1e6),
        only="privacy=record|user",
    )
    delta: float = setting(1e-5, "δ of the guarantee", takes=check.inside_one, only="privacy=record|user")
    clip: float = setting(  # below it float32 cannot scale a gradient to the clip, and one record adds more than noise is for
        1.0,
        "bound on the norm of one record's gradient (record), of a client's whole update (user)",
        takes=partial(check.between_or_inf, 1e-12, 1e30),
        only="privacy=record|user",
    )
    noise_multiplier: float | None = setting(
        None,
        "σ (record) or z (user); none: derived from epsilon",
        takes=partial(check.between, 0, LARGEST_NOISE),
        only="privacy=record|user",
    )
    participation: str = setting(
        "schedule",
        "rounds that σ counts: schedule, worst, or expected",
        takes=partial(check.one_of, ("schedule", "worst", "expected")),
        only=("privacy=record", "privacy.noise_multiplier=null"),
    )
    adjacency: str = setting(
        "add_remove",
        "neighbours: with and without one (add_remove), or with another in its place (replace)",
        takes=partial(check.one_of, ("add_remove", "replace")),
        only="privacy=record|user",
    )
    accountant: str = setting(
        "prv",
        "prv, or rdp (quicker, 8 to 29 % looser; add_remove only)",
        takes=partial(check.one_of, ("prv", "rdp")),
        only="privacy=record",
    )
    sampling: str = setting(
        "poisson",
        "how a cohort is drawn and accounted: poisson, fixed, none (with deploy: none)",
        takes=partial(check.one_of, ("poisson", "fixed", "none")),
        only="privacy=user",
    )


@dataclass
class EvaluateConfig:
    """When and on what the merged model is measured."""

    every: int = setting(
        1,
        "rounds from one evaluation to the next; there is one after the last too, the central one also before the first",
        takes=check.positive,
        most=1e9,
    )
    batch_size: int = setting(256, "examples a forward pass", takes=check.positive, most=1e9)
    holdout: float = setting(
        0.0, "share of its examples that each client keeps back to test the merged model on; 0: none", takes=check.below_one
    )


@dataclass
class CheckpointConfig:
    """What a run that is broken off goes on from. Changes no number."""

    every: int = setting(
        1,
        "rounds from one checkpoint to the next; 0: none",
        takes=check.not_negative,
        most=1e9,
    )
    keep: int = setting(
        2,
        "checkpoints that are kept",
        takes=check.positive,
        most=1000,
        only="checkpoint.every",
    )


@dataclass
class EngineConfig:
    """Where clients run. Changes speed only, never a number."""

    name: str = setting(
        "ray", "ray (own grid over Ray actors), inline (this process) or flower (Flower's simulation)", only="deploy=null"
    )
    address: str | None = setting(
        None, "an existing cluster, head:port or auto; none: a Ray of this process's own", only="engine=ray"
    )
    workers: int | None = setting(
        None, "worker processes; none: one a core, or one a GPU", takes=check.positive, most=1024, only="engine=ray|flower"
    )
    gpus_per_worker: float | None = setting(
        None,
        "share of a GPU a worker holds; none: 1 on cuda, else 0",
        takes=check.not_negative,
        most=1024,
        only="engine=ray|flower",
    )
    cohort: str = setting(
        "auto", "clients that share a pass: auto (measured once a machine) or a number", only="engine=ray|inline"
    )
    share: int = setting(
        1,
        "cells of a sweep that a worker plays in step, so that their clients may share a pass",
        takes=check.positive,
        most=1000,
        only=("engine=ray", "-m"),
    )
    prefix_cache: float = setting(
        1.0,
        "GB a process may keep of the outputs of the blocks below all adapters; 0: none",
        takes=check.not_negative,
        most=1e6,
        only="deploy=null",
    )
    retries: int = setting(
        2, "times a client is run again after its worker died", takes=check.not_negative, most=1000, only="engine=ray"
    )
