"""ClientApps that misbehave: the real one, with a fault in front of it. Workers import them by module and name."""

import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from clients import app as real
from clients.app import CohortApp

FAULTY = {1, 2}  # the clients with a fault, where an app has no other rule


class Cohorts(CohortApp):
    """Plays several clients together as the real one does, if none of them has the fault; else the fault happens then."""

    def __init__(self, together) -> None:
        super().__init__()
        self.fault = together

    def together(self, batch):
        clients = [int(context.node_config["partition-id"]) for _, context in batch]
        return self.fault(clients, lambda: super(Cohorts, self).together(batch))


def _wrap(fault, together=None):
    app = Cohorts(together) if together else ClientApp()
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


def _kills_its_node(message, context, client):
    """Whoever trains on the node that the mark names takes the whole node with it, in mid-round, once a mark."""
    import ray

    mark = Path(os.environ["FEDLORA_TEST_MARK"])
    if mark.exists() and mark.read_text() == ray.get_runtime_context().get_node_id():
        mark.unlink()
        os.kill(os.getppid(), signal.SIGKILL)  # the raylet
        time.sleep(3600)
    return real.train(message, context)


def _raises_together(clients, play):
    if FAULTY & set(clients):
        raise ValueError("one of them is broken, and nobody can tell which")
    return play()


def _nan_together(clients, play):
    return [_edit(reply, lambda a: a * np.nan) if c in FAULTY else reply for c, reply in zip(clients, play(), strict=True)]


def _dies_together(clients, play):
    if 1 in clients:
        os._exit(1)
    return play()


raises_together, nan_together = _wrap(_raises, _raises_together), _wrap(_raises, _nan_together)
raises, nan, another_shape, all_raise = map(_wrap, (_raises, _nan, _another_shape, _all_raise))
dies_once, hangs, kills_its_node = map(_wrap, (_dies_once, _hangs, _kills_its_node))
always_dies = _wrap(_always_dies, _dies_together)
