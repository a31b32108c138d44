"""The baseline's ClientApp: built up for every message, as in Flower's examples; private with Opacus, as in examples/opacus.

Every message loads the model, puts PEFT's adapters in, makes a DataLoader and, with a σ in the message, calls
`PrivacyEngine.make_private`. Data and split stay in the process, as they do in the example. `example` also asks for the
client's ε after every training, as the example does; `app` does not. Opacus takes q = 1 / ⌈n / batch⌉, which is at most
fedlora's, and so has no more examples in a batch.
"""

from __future__ import annotations

import logging
import warnings
from itertools import chain, islice, repeat
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

from clients import start
from clients.app import query
from clients.task import local_steps
from fedlora import models
from fedlora.arrays import messages
from fedlora.compute import workbench
from fedlora.models.adapted import AdaptedModel

DELTA = 1e-5
warnings.filterwarnings("ignore", category=UserWarning)
logging.getLogger("opacus").setLevel(logging.ERROR)


def train(message: Message, context: Context, epsilon: bool = False) -> Message:
    """A client that builds everything anew."""
    job: Any = message.content.config_records[messages.CONFIG]
    bench = workbench.build_from(job[messages.EXPERIMENT])
    config, client = bench.config, int(context.node_config["partition-id"])

    model = AdaptedModel(models.load(config.model, bench.dataset, config.seed), config.adapter, bench.model.device)
    parameters = model.trainable(job[messages.TRAINS])
    begun = start.begin(bench, job, start.read(message.content.array_records[messages.ARRAYS]), context.state)
    model.write(begun.adapters, begun.dense, begun.correction)  # fedlora's strategy sends what a client cannot derive
    model.train_mode()
    indices, _ = bench.examples_of(client)
    tensors = bench.train.batch(indices, model.device)
    loader = DataLoader(TensorDataset(*tensors.values()), batch_size=config.train.batch_size, shuffle=True)
    optimizer: Any = torch.optim.SGD(parameters, lr=config.train.lr)
    network: Any = model.peft
    if messages.NOISE in job:
        engine = PrivacyEngine(secure_mode=False)
        network, optimizer, loader = engine.make_private(
            module=network.train(),  # it takes no module in eval; the ViT has no dropout
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=job[messages.NOISE][client],
            max_grad_norm=config.privacy.clip,
        )
    steps = local_steps(config.train, len(indices))
    for batch in islice(chain.from_iterable(repeat(loader)), steps):
        optimizer.zero_grad()
        network(**dict(zip(tensors, batch, strict=True))).loss.backward()
        optimizer.step()
    if epsilon:
        engine.get_epsilon(DELTA)

    arrays = messages.pack(model.adapters(), model.dense(), job[messages.TRAINS])
    metrics = MetricRecord({messages.CLIENT: client, messages.EXAMPLES: len(indices), "steps": float(steps)})
    return Message(RecordDict({messages.ARRAYS: arrays, messages.METRICS: metrics}), reply_to=message)


def client_app(epsilon: bool) -> ClientApp:
    """The app, with or without a client's ε."""
    made = ClientApp()
    made.query()(query)
    made.train()(lambda message, context: train(message, context, epsilon))
    return made


app, example = client_app(False), client_app(True)
