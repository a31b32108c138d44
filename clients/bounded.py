"""Whether clipping bounds what one record adds to a step: what is clipped must be that record's gradient, and all of it.

    rows        every call of every trained layer is given the records as its rows, in batches of two and of three
    gradients   of the records of a batch, by Opacus' hooks and by the pass that clients share, are those of each record
                alone, without hooks and with nothing beside it

A table that all records share (relative positions in DeBERTa-v2), windows, positions before records: where a trained layer
is given one, a record's gradient lands in other rows or in none, and clipping bounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from clients.cohort import Cohort, Member
from clients.private import hooks
from clients.task import Task
from fedlora import check
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import rotation
from fedlora.check import ConfigError
from fedlora.compute.workbench import Workbench
from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Texts
from fedlora.models.targets import file_name
from fedlora.privacy.refusals import trained, unsupported

TOLERANCE = 1e-4  # relative, between two ways to compute one gradient in float32
COARSE = 32  # roundings of a base of lower precision, where those are more

Gradients = dict[str, Tensor]  # by record: (records, …) of each array that is trained, by its name on the wire

_ensured: WeakKeyDictionary[AdaptedModel, set[str]] = WeakKeyDictionary()


def ensure(bench: Workbench, trains: str) -> None:
    """Raises ConfigError, with layer, reason and cure, where one record may move a clipped sum by more than C.

    Checked once a process for each model and each `trains` ("AB", "A", "B" or "R"), without dropout, on the shortest, a
    middle and the longest training record; with no records there is nothing to check or to protect. The model is left as
    it was, and no stream is drawn from.
    """
    model, known = bench.model, _ensured.setdefault(bench.model, set())
    if trains in known or not len(bench.dataset.train):
        return
    with untouched(model):
        few, shared = records(bench, 3), not bench.rows.refusal  # which tries the model as it was found
        supported(bench, trains, few)
        for chosen in (few[[0, -1]], few):
            _compare(bench, "Opacus' hooks give", *by_hooks(bench, trains, chosen))
            if shared:
                _compare(bench, "the shared pass gives", *by_sharing(bench, trains, chosen))
    known.add(trains)


def supported(bench: Workbench, trains: str, chosen: np.ndarray) -> None:
    """Raises ConfigError for the first module that cannot be trained by record, or is given other rows than records.

    Guarantee: after it every trained parameter is float32 and lies in a layer with exact per-example gradients, each of whose
    calls has one row for each record; no layer normalises over a batch.
    """
    model = bench.model
    start(bench, trains)
    model.train_mode(dropout=False)
    for name, module in model.peft.named_modules():
        if reason := unsupported(module):
            raise ConfigError(f"{name or 'the model'} ({type(module).__name__}) {reason}")
    for count in (2, 3):
        with torch.no_grad(), _counted(model, count):
            model.forward(bench.train.batch(np.resize(chosen, count), model.device))


def by_hooks(bench: Workbench, trains: str, chosen: np.ndarray) -> tuple[Gradients, Gradients]:
    """Gradients of these records: in one batch by hooks, and of each record alone."""
    start(bench, trains)
    alone = [backward(bench, record[None], "grad") for record in chosen]
    return per_example(bench, trains, [chosen])[0], _stacked(alone)


def by_sharing(bench: Workbench, trains: str, chosen: np.ndarray) -> tuple[Gradients, Gradients]:
    """The same in a pass that clients share, each of whom has one of the records and factors of its own."""
    model, members, alone = bench.model, [], []
    for client, record in enumerate(chosen):
        start(bench, trains, client)
        alone.append(backward(bench, record[None], "grad"))
        task = Task(record[None], bench.config.train, trains, (1, 1), (bench.config.seed, client, 1))
        members.append(Member(task, model.adapters(), model.dense(), model.scale_written))
    with still(model), bench.rows.installed():
        cohort = Cohort(bench.rows, bench.train, members)
        vectors = torch.stack([trainee.vector() for trainee in cohort.trainees])
        found, _ = cohort.gradients(cohort.trainees, np.arange(len(chosen)), vectors, chosen)
    slots = zip(cohort.layout.slots, found.split(cohort.layout.sizes, dim=1), strict=True)
    named = {f"{s.name}.lora_{s.factor}.weight" if s.factor else s.name: rows.view(-1, *s.shape) for s, rows in slots}
    return named, _stacked(alone)


def records(bench: Workbench, count: int) -> np.ndarray:
    """Indices of so many training records, from the shortest to the longest; some twice where there are fewer."""
    examples = bench.train
    lengths = [len(row) for row in examples.tokens] if isinstance(examples, Texts) else [0] * len(examples)
    return np.argsort(lengths, kind="stable")[np.linspace(0, len(examples) - 1, count).astype(int)]


def start(bench: Workbench, trains: str, client: int = 0) -> list[nn.Parameter]:
    """The parameters to train, with factors of this client's own, none of them zero: beside B = 0 A has no gradient."""
    model, rng = bench.model, np.random.default_rng(client)

    def draw(shape: tuple[int, ...], deviation: float) -> np.ndarray:
        return rng.normal(0, deviation, shape).astype(np.float32)

    own = {name: Pair(draw(p.A.shape, p.A.shape[1] ** -0.5), draw(p.B.shape, 0.02)) for name, p in model.adapters().items()}
    mixed = {rotation(name): draw((pair.rank, pair.rank), 0.3) for name, pair in own.items()} if "R" in trains else {}
    model.write(own, model.initial_head | mixed)
    return model.trainable(trains)


def per_example(bench: Workbench, trains: str, batches: Sequence[np.ndarray]) -> list[Gradients]:
    """For each batch, the gradients by record of everything that is trained, by the hooks that private steps use.

    Raises ConfigError where Opacus has none, or has other rows than records.
    """
    start(bench, trains)
    try:
        with hooks(bench.model):
            found = [backward(bench, batch, "grad_sample") for batch in batches]
    except (AttributeError, IndexError, RuntimeError) as error:
        raise ConfigError(
            f"Opacus finds no per-example gradients ({check.reason(error)}); change adapter.target_modules"
        ) from error
    for batch, arrays in zip(batches, found, strict=True):
        for name, rows in arrays.items():
            if len(rows) != len(batch):
                raise _not_records(name, len(rows), len(batch), "change adapter.target_modules")
    return found


def backward(bench: Workbench, batch: np.ndarray, attribute: str) -> Gradients:
    """This attribute of everything that is trained after one backward pass. Raises ConfigError if one has got no gradient."""
    bench.model.train_mode(dropout=False)
    loss = bench.model.forward(bench.train.batch(batch, bench.model.device)).loss
    if loss.requires_grad:
        loss.backward()
    found = {}
    for name, parameter in bench.model.peft.named_parameters():
        if parameter.requires_grad:
            gradient = getattr(parameter, attribute, None)
            if not isinstance(gradient, Tensor):
                raise ConfigError(f"{name} gets no gradient of its own; leave its layer out of adapter.target_modules")
            found[file_name(name)] = gradient.detach().clone()
            parameter.grad = None
            if attribute != "grad":
                setattr(parameter, attribute, None)
    return found


def difference(ours: Gradients, theirs: Gradients) -> tuple[float, str]:
    """The largest norm of a difference of one record in one array, relative to the largest gradient of that array; its name.

    An array whose gradients are below a thousandth of the whole is measured by that, since it holds rounding errors only.
    """
    names = list(theirs)
    norms = torch.stack([theirs[name].flatten(1).norm(dim=1) for name in names])  # (arrays, records)
    scale = norms.amax(1).clamp(min=1e-3 * float(norms.norm(dim=0).max()) + 1e-30)
    apart = torch.stack([(ours[name] - theirs[name]).flatten(1).norm(dim=1) for name in names])
    worst = (apart / scale[:, None]).nan_to_num(torch.inf).amax(1)
    return float(worst.max()), names[int(worst.argmax())]


@contextmanager
def still(model: AdaptedModel) -> Iterator[None]:
    """While this lasts, the model trains without dropout."""
    model.train_mode = partial(AdaptedModel.train_mode, model, dropout=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.train_mode
        model.peft.eval()


@contextmanager
def untouched(model: AdaptedModel) -> Iterator[None]:
    """Afterwards the model is as it was: what was written, what requires gradients, modes, torch's generators."""
    factors, dense, correction = model.adapters(), model.dense(), model.correction
    required = [parameter for parameter in model.peft.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in model.peft.modules()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            model.write(factors, dense)
            model.correction = correction
            model.freeze()
            for parameter in required:
                parameter.requires_grad_(True)
            for module, mode in modes:
                module.training = mode


@contextmanager
def _counted(model: AdaptedModel, count: int) -> Iterator[None]:
    """While this lasts, a trained layer that is given other than so many rows raises ConfigError."""
    heads = set(model.owners.values())

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for given in (*args, *kwargs.values()):
            if isinstance(given, Tensor) and (not given.dim() or len(given) != count):
                cure = "set adapter.train_head=false" if module in heads else "leave it out of adapter.target_modules"
                raise _not_records(name, len(given) if given.dim() else 0, count, cure)

    layers = [(name, module) for name, module in model.peft.named_modules() if trained(module)]
    handles = [layer.register_forward_pre_hook(partial(watch, name), with_kwargs=True) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _not_records(name: str, rows: int, count: int, cure: str) -> ConfigError:
    return ConfigError(
        f"privacy=record: {name} sees {rows} rows for {count} records, so its rows are not records (windows, a table that "
        f"records share) and clipping would bound no record; {cure}, or use another model"
    )


def _compare(bench: Workbench, way: str, ours: Gradients, theirs: Gradients) -> None:
    """Raises ConfigError where gradients by record are not those of each record alone."""
    rounding = max(torch.finfo(parameter.dtype).eps for parameter in bench.model.peft.parameters())
    apart, name = difference(ours, theirs)
    if apart > max(TOLERANCE, COARSE * rounding):
        raise ConfigError(
            f"privacy=record: in a batch, {way} a record another gradient than it has alone (off by {apart:.2g} in {name}), so "
            "clipping would bound no record: a layer mixes records, or the loss is no plain mean over them; change "
            "adapter.target_modules, or use another model"
        )


def _stacked(alone: list[Gradients]) -> Gradients:
    return {name: torch.stack([each[name] for each in alone]) for name in alone[0]}
