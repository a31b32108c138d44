"""The server of an experiment: its strategy, and what the settings put around it."""

from __future__ import annotations

import strategies
from fedlora import check
from fedlora.check import ConfigError
from fedlora.config import Config
from fedlora.secure import LEAST
from fedlora.server import optimizers, robust, secure
from strategies import LoRAStrategy


def make_strategy(config: Config) -> LoRAStrategy:
    """The strategy of an experiment: its own settings, and what the runtime knows.

    Raises ConfigError for settings that do not go with it.
    """
    strategy = strategies.make(
        **config.strategy,
        scale=config.adapter.alpha / config.adapter.rank,
        seed=config.seed,
        min_success=config.min_success,
        fraction_train=config.cohort_size / config.clients,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        clients=config.clients,
        min_available_nodes=config.min_online or config.clients,
        patience=config.patience,
        fraction_evaluate=1.0 if config.evaluate.holdout else 0.0,
        evaluate_every=config.evaluate.every,
        rounds=config.rounds,
        poisson=config.poisson,
        ranks=[config.adapter.rank] * config.clients
        if config.adapter.unequal
        else None,  # known when the model is: see `initial_state`
        derive=True,
        encodes=(config.compression.down, config.compression.up, config.compression.top_k),
        round_timeout=config.round_timeout,
        max_weight=config.server.max_weight,
        max_update=config.server.max_update,
    )
    if strategy.personal and not config.evaluate.holdout:
        raise ConfigError(
            f"strategy={strategy.name} leaves a part of every model on its client, so that the server has none to test; set "
            "evaluate.holdout=0.2, and each client tests its own"
        )
    if config.compression.up != "none" and strategy.two_phase:
        raise ConfigError(
            f"compression.up={config.compression.up} does not go with strategy={strategy.name}, whose clients send products of "
            "their factors and not changes; set it to none"
        )
    if config.aggregation == "secure":
        if not strategy.linear:
            raise ConfigError(
                f"aggregation=secure does not go with strategy={strategy.name}, whose server step needs each client's own "
                f"factors and not their sum alone; {check.command()} --list shows those that it goes with"
            )
        strategy.sum_of = secure.SecureMean(config.server.secure_bound, LEAST[config.privacy.name])
    if strategy.two_phase and (config.server.mean != "weighted" or config.privacy.name == "user"):
        what = "privacy=user" if config.privacy.name == "user" else f"server.mean={config.server.mean}"
        raise ConfigError(f"strategy={strategy.name} never sees a client's own factors, which {what} needs; choose another")
    if config.server.mean != "weighted":
        strategy.robust = robust.make(config.server.mean, config.server.trim, config.server.norm_factor)
    if config.server.optimizer != "none":
        if not strategy.keeps_basis:
            raise ConfigError(
                f"server.optimizer={config.server.optimizer} does not go with strategy={strategy.name}, whose merge leaves the "
                "coordinates that its moments are in; set it to none"
            )
        rates = config.server.lr, config.server.momentum, config.server.beta2, config.server.tau
        strategy.optimizer = optimizers.make(config.server.optimizer, *rates)
    return strategy
