"""Somebody else's federation: a model of twelve layers, its LoRA by PEFT, and ClientApps of torch that know no fedlora."""

from collections.abc import Callable
from functools import lru_cache

import peft
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

LAYERS, WIDTH, RANK, CLASSES = 12, 8, 2, 3
SCALE = 2.0  # alpha / rank


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.query(x))


class Net(nn.Module):
    """Layers of one shape, so that arrays in another order would be taken without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@lru_cache
def build() -> peft.PeftModel:
    """The model of this process, the same in every other; each client overwrites all that is trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=["query"], modules_to_save=["head"])
        return peft.get_peft_model(Net(), settings)


@lru_cache
def initial() -> ArrayRecord:
    """What the strategy is started with, in PEFT's order: a model that nobody has trained."""
    return ArrayRecord(peft.get_peft_model_state_dict(build.__wrapped__()))


def by_name(model: peft.PeftModel, arrays: ArrayRecord) -> None:
    """As PEFT's documentation has it."""
    assert not peft.set_peft_model_state_dict(model, arrays.to_torch_state_dict()).unexpected_keys


def by_position(model: peft.PeftModel, arrays: ArrayRecord) -> None:
    """As many of Flower's examples have it: the n-th array is the model's n-th."""
    names = peft.get_peft_model_state_dict(model).keys()
    tensors = arrays.to_torch_state_dict().values()
    peft.set_peft_model_state_dict(model, dict(zip(names, tensors, strict=True)))


def make(
    load: Callable[[peft.PeftModel, ArrayRecord], None] = by_name,
    careless: Callable[[int], bool] = lambda client: False,
    keys: tuple[str, str, str] = ("arrays", "config", "num-examples"),
    mods: list | None = None,
    half: bool = False,
) -> ClientApp:
    """A ClientApp without a query function. Those who are `careless` train all of the adapter, whatever the message says."""
    app, (arrays_key, config_key, weight_key) = ClientApp(), keys

    @app.train(mods=mods)
    def train(message: Message, context: Context) -> Message:
        client, model = int(context.node_config["partition-id"]), build()
        load(model, message.content[arrays_key])
        trains = "AB" if careless(client) else message.content[config_key]["trains"]
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad = any(f"lora_{factor}" in name for factor in trains)
        generator = torch.Generator().manual_seed(client)
        x, y = torch.randn(16, WIDTH, generator=generator), torch.randint(CLASSES, (16,), generator=generator)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        state = peft.get_peft_model_state_dict(model)
        if half:
            state = {name: tensor.bfloat16().float() for name, tensor in state.items()}
        weight = 10 + client if weight_key == "num-examples" else 0.25 * (1 + client)
        metrics = MetricRecord({weight_key: weight, "train_loss": float(loss.detach()), "each": [float(client), 1.0]})
        arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.items()})
        return Message(RecordDict({"mine": arrays, "said": metrics}), reply_to=message)

    @app.evaluate(mods=mods)
    def evaluate(message: Message, context: Context) -> Message:
        client, model = int(context.node_config["partition-id"]), build()
        load(model, message.content[arrays_key])
        return Message(RecordDict({"said": MetricRecord({weight_key: 1 + client, "f1": client / 10})}), reply_to=message)

    return app
