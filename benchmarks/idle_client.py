"""A client that does nothing: it reads the arrays of the broadcast and sends them back, as numpy arrays both times.

`adding` is the same as `app`, and lets workers add up what it sends.
"""

from __future__ import annotations

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.app import CohortApp, query
from fedlora.arrays import messages
from fedlora.arrays.lowrank import Pair

app, adding = ClientApp(), CohortApp()


def train(message: Message, context: Context) -> Message:
    """The state as it came."""
    factors, dense, _ = messages.unpack(message.content.array_records[messages.ARRAYS])
    sent = messages.pack({layer: Pair(**both) for layer, both in factors.items()}, dense)
    client = int(context.node_config["partition-id"])
    metrics = MetricRecord({messages.CLIENT: client, messages.EXAMPLES: 20, "loss": 0.0})
    return Message(RecordDict({messages.ARRAYS: sent, messages.METRICS: metrics}), reply_to=message)


for one in (app, adding):
    one.query()(query)
    one.train()(train)
