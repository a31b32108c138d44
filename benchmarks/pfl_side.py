"""Apple's pfl as a baseline: federated averaging of the trainable parameters of a torch model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from fedlora import seeds
from fedlora.config import TrainConfig


class Idle(FederatedAveraging):
    """A client that trains nothing and sends its difference."""

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
        """What FederatedAveraging does, without the steps."""
        return model.get_model_difference(initial_model_state), Metrics()


class Clock(TrainingProcessCallback):
    """Notes when each round ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_central_iteration(self, *arguments: Any, **keywords: Any) -> tuple[bool, Metrics]:
        """Called by pfl at the end of a round; never asks to stop."""
        self.ends.append(time.perf_counter())
        return False, Metrics()


def train(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    users: Sequence[Mapping[str, Tensor]],
    settings: TrainConfig,
    cohort: int,
    rounds: int,
    algorithm: type[FederatedAveraging] = FederatedAveraging,
) -> list[float]:
    """Train the parameters of `network`, whose output has a `.loss`, in place; returns the `time.perf_counter()` of every
    round's end.

    `users` holds the examples of each client, as keyword arguments of the network. Clients are drawn at random; each goes
    through its examples in their order, `settings.steps` batches, with plain SGD. The server adds the mean difference.
    """
    network.loss = lambda **batch: network(**batch).loss  # type: ignore[assignment]
    network.metrics = lambda **batch: {}  # type: ignore[assignment]
    rng, clock = seeds.stream(0, "pfl"), Clock()
    datasets = [PyTorchTensorDataset(dict(user), user_id=str(i)) for i, user in enumerate(users)]
    drawn = FederatedDataset(lambda user: datasets[user], lambda: int(rng.integers(len(datasets))))

    def local_optimizer(all_parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr)

    model = PyTorchModel(network, local_optimizer, torch.optim.SGD(parameters, lr=1.0))
    algorithm().run(
        NNAlgorithmParams(rounds, 10**9, cohort, None),
        SimulatedBackend(drawn, drawn),
        model,
        NNTrainHyperParams(settings.batch_size, None, settings.lr, local_num_steps=settings.steps),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    return clock.ends
