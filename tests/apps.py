"""ClientApps that misbehave: the real one, with a fault in front of it. Workers import them by module and name."""

import os
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from clients import app as real

FAULTY = {1, 2}  # the clients with a fault, where an app has no other rule


def _wrap(fault):
    app = ClientApp()
    app.query()(real.query)
    app.evaluate()(real.evaluate)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return fault(message, context, int(context.node_config["partition-id"]))

    return app


def _edit(reply: Message, change) -> Message:
    arrays = {name: change(array.numpy()) for name, array in reply.content["arrays"].items()}
    reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return reply


def _raises(message, context, client):
    if client in FAULTY:
        raise ValueError("the camera is broken")
    return real.train(message, context)


def _nan(message, context, client):
    reply = real.train(message, context)
    return _edit(reply, lambda array: array * np.nan) if client in FAULTY else reply


def _another_shape(message, context, client):
    reply = real.train(message, context)
    return _edit(reply, lambda array: array[:1]) if client in FAULTY else reply


def _all_raise(message, context, client):
    raise ValueError("no client is well")


def _dies_once(message, context, client):
    """The process of client 1 ends in its first training of the run, once for the whole run."""
    mark = Path(os.environ["FEDLORA_TEST_MARK"])
    if client == 1 and not mark.exists():
        mark.touch()
        os._exit(1)
    return real.train(message, context)


def _always_dies(message, context, client):
    if client == 1:
        os._exit(1)
    return real.train(message, context)


def _hangs(message, context, client):
    if client == 1:
        time.sleep(3600)
    return real.train(message, context)


raises, nan, another_shape, all_raise = map(_wrap, (_raises, _nan, _another_shape, _all_raise))
dies_once, always_dies, hangs = map(_wrap, (_dies_once, _always_dies, _hangs))
