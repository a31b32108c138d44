"""What a device says before it connects: its data, its model, what may leave it, what an experiment costs it."""

from __future__ import annotations

import math
from dataclasses import replace

import psutil

from fedlora.app.terminal import say, size
from fedlora.check import ConfigError
from fedlora.config import Config
from fedlora.deploy.account import Account
from fedlora.deploy.holdings import Holdings, localised, work

NEIGHBOURS = {"add_remove": "added or removed", "replace": "replaced by another"}  # by the adjacency of ε


def data(own: Holdings) -> Holdings:
    """Reads the device's file and says what is in it; returns the holdings with their number.

    Raises ConfigError for a file that cannot be read, for one with other classes than its owner declared, and where those
    are neither declared nor known.
    """
    from fedlora.data import files, labels

    declared = own.data.classes or _known(own)
    try:
        dataset = files.load(replace(own.data, classes=declared), 0)
    except ConfigError as error:
        raise ConfigError(f"--data and its columns and --classes (here dataset.…): {error}") from error
    if not declared:
        found = ",".join(dataset.classes)
        raise ConfigError(
            f"--classes is missing; name all labels of the federation. {own.data.path} has --classes {found:.200}"
        )
    say(f"data: {own.data.path}, {len(dataset.train)} examples ({labels.shown(dataset)}); they stay here")
    return replace(own, examples=len(dataset.train), data=replace(own.data, classes=dataset.classes))


def _known(own: Holdings) -> list[str]:
    """The classes where the owner need not declare them: of the experiment that was agreed to, or of a model with its own."""
    if own.agreed is not None:
        return own.agreed.dataset.classes
    return [] if own.model[0] == "hf" else [str(digit) for digit in range(10)]


def limits(account: Account) -> None:
    """Says what the owner allows, and what is spent of it."""
    allowed = account.limits
    if math.isinf(allowed.epsilon):
        say("privacy: none (--epsilon inf); updates may reveal what is in the data")
    else:
        left = f"spent so far: {account.spent:.4g} in {len(account.rows)} rounds"
        if math.isinf(account.spent):
            left += ", some without privacy (--epsilon inf): no budget is left for these data"
        protected = NEIGHBOURS[allowed.adjacency]
        say(f"privacy: ε ≤ {allowed.epsilon:g} at δ = {allowed.delta:g} for each record, {protected}; {left}")
    say(
        f"limits: clip {allowed.clip:g}, {allowed.steps} steps, rank {allowed.rank}, {allowed.threads} threads, "
        f"{allowed.seconds:g} s a round, {size(allowed.memory)} of memory"
    )
    say(f"ledger and secret: {account.folder}")


def experiment(own: Holdings, account: Account) -> None:
    """Loads the model, for the experiment that was agreed to or else for the default one, and says what would be sent.

    Loading it now also spares the first round that time. Raises ConfigError or RunError where the device cannot take part.
    """
    from clients import private, train  # noqa: F401  # Opacus takes a second to load
    from fedlora.app import experiment as whole
    from fedlora.app import plan, traffic
    from fedlora.compute import workbench
    from fedlora.server.participation import schedule

    config = localised(own, own.agreed or _usual(own))
    rate, steps, examples = work(own, config)
    if own.agreed is not None:
        account.limits.allow(config)
        account.limits.allow_steps(steps)
    bench, strategy = workbench.build(config), whole.make_strategy(config)
    state = whole.initial_state(bench, strategy)
    weights = sum(p.numel() * p.element_size() for p in bench.model.peft.parameters())
    needs = plan.saved_bytes(bench, strategy, own.client) + 4 * plan.trained(state, strategy) * 4
    free = psutil.virtual_memory().available
    say(f"model: {config.model.path or config.model.name}, {size(weights)}; a step needs {size(needs)}, {size(free)} are free")
    if needs > free:
        raise ConfigError(f"a step of this model needs {size(needs)} and {size(free)} are free; close something")
    rank = None if strategy.ranks is None else strategy.ranks[own.client]
    arrays = strategy.sent_up(state, 1, rank)
    name, array = next(iter(arrays.items()))
    up, down = traffic.bytes_up(state, strategy, rank), traffic.bytes_down(state, strategy, rank)
    usual = "" if own.agreed is not None else " (fedsvd at rank 8; the server may ask for others, --experiment allows one)"
    say(f"trains{usual}: {plan.trained(state, strategy):,} parameters on {examples} examples, {steps} steps a round")
    say(f"sends in a round: {len(arrays)} arrays, such as {name} {array.shape}, {size(up)}; receives {size(down)}")
    told = "the number of examples, of steps and of seconds"
    if (own.agreed is None and math.isfinite(account.limits.epsilon)) or config.privacy.name == "record":
        say(f"also sends: {told}; no loss, no accuracy")
    else:
        say(f"also sends: {told}, the loss" + (", the accuracy on held-out examples" if config.evaluate.holdout else ""))
    if own.agreed is not None and config.privacy.name == "record":
        rounds = schedule(config.seed, config.rounds, config.clients, config.cohort_size)[own.client]
        sigma = _sigma(config, rate, steps, rounds)
        after = account.after(sigma, rate, steps * rounds)
        say(f"costs: ε = {after:.4g} after its {rounds} rounds (σ = {sigma:.4g}, q = {rate:.3g}, {steps * rounds} steps)")


def _usual(own: Holdings) -> Config:
    """The default experiment on data like the device's."""
    base = Config(clients=own.client + 1, deploy="none")
    return replace(base, model=replace(base.model, name=own.model[0], path=own.model[1]), dataset=own.data)


def _sigma(config: Config, rate: float, steps: int, rounds: int) -> float:
    """σ as the server derives it for a client with these numbers."""
    from fedlora.privacy.record_level import Client, noise_multipliers

    fraction = config.cohort_size / config.clients
    return noise_multipliers(config.privacy, [Client(rate, steps, rounds)], config.rounds, fraction)[0]
