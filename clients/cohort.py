"""Many clients in one pass: their batches go through the frozen base together, each example with its own client's factors.

    a step of every client:   batches ──→ one forward and backward pass ──→ gradients by example ──→ client by client:
                              (own streams)                                 (N, P)                   clip, sum, noise, descend

What is a client's own stays its own: draws, dropout, noise, learning rate, optimiser. So the numbers are those of
`clients.train`, to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from clients.start import Trained
from clients.task import Task
from clients.train import mean
from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.compute.dropout import ByPlace, ByRecord, Masks
from fedlora.compute.layout import Layout
from fedlora.compute.rows import Rows, Span
from fedlora.models.encode import Encoded, moved

if TYPE_CHECKING:
    from clients.private import PrivateDescent


@dataclass(frozen=True)
class Member:
    """A client of a cohort: its task, and what it was sent. Ranks may differ from member to member."""

    task: Task
    adapters: Adapters
    dense: dict[str, np.ndarray]
    scale: float  # alpha / rank


def train_together(rows: Rows, examples: Encoded, members: Sequence[Member]) -> list[Trained]:
    """The local training of all members, in their order; the resident model's own factors are not touched.

    The smallest `physical_batch_size` of the members bounds the examples of a pass; without one a pass takes the whole
    batches of everybody. Raises ValueError for a model that `rows` refuses.
    """
    if rows.refusal:
        raise ValueError(rows.refusal)
    cohort = Cohort(rows, examples, members)
    with rows.installed():
        while active := [trainee for trainee in cohort.trainees if trainee.step < trainee.task.steps]:
            cohort.advance(active)
    return [trainee.result() for trainee in cohort.trainees]


class Cohort:
    """The members in training, and the vector of factors that a pass gives to each of their examples.

    The vector has every factor that any member trains, at the highest rank of each layer. Padding is zero in A and in B, so
    that it changes no product; a member takes its own entries out of the gradient, so that padding gets no noise.
    """

    def __init__(self, rows: Rows, examples: Encoded, members: Sequence[Member]) -> None:
        self.rows, self.examples, self.device = rows, examples, rows.model.device
        rows.model.freeze()
        rows.model.train_mode()
        ranks = {layer: max(member.adapters[layer].rank for member in members) for layer in members[0].adapters}
        wide = [{layer: lowrank.pad(pair, ranks[layer]) for layer, pair in member.adapters.items()} for member in members]
        trained = [f for f in "AB" if any(f in member.task.trains for member in members)]
        self.layout = Layout.of(wide[0], members[0].dense, "".join(trained))
        starts = [self._tensor(self.layout.join(w, member.dense)) for w, member in zip(wide, members, strict=True)]
        self.trainees = [Trainee(i, m, starts[i], self.layout) for i, m in enumerate(members)]
        frozen = [(layer, f) for layer in ranks for f in "AB" if f not in trained]
        self.frozen = {(layer, f): self._by_member([getattr(w[layer], f) for w in wide]) for layer, f in frozen}
        scales = [member.scale for member in members]
        self.scale = scales[0] if len(set(scales)) == 1 else self._tensor(np.array(scales, np.float32)).view(-1, 1, 1)
        self.limit = min((size for m in members if (size := m.task.settings.physical_batch_size)), default=None)

    def advance(self, active: list[Trainee]) -> None:
        """One step of every active member."""
        batches = [trainee.draw() for trainee in active]
        vectors = torch.stack([trainee.vector() for trainee in active])
        for trainee, batch in zip(active, batches, strict=True):
            if not len(batch):
                trainee.take(vectors[:0], vectors.new_zeros(0), last=True)
        for parts in self._passes([len(batch) for batch in batches]):
            owners = np.repeat([k for k, _, _ in parts], [stop - start for _, start, stop in parts])
            indices = np.concatenate([batches[k][start:stop] for k, start, stop in parts])
            gradients, losses = self.gradients(active, owners, vectors, indices)
            begin = 0
            for k, start, stop in parts:
                own = slice(begin, begin := begin + stop - start)
                active[k].take(gradients[own], losses[own], last=stop == len(batches[k]))

    def _passes(self, sizes: list[int]) -> list[list[tuple[int, int, int]]]:
        """What goes through together, for batches of these sizes: (place, start, stop) of a batch, in order.

        A batch is cut where that member would cut it by itself, since its dropout is drawn part by part.
        """
        limit = self.limit or max(1, sum(sizes))
        passes, room = list[list[tuple[int, int, int]]](), 0
        for k, size in enumerate(sizes):
            for start in range(0, size, limit):
                stop = min(start + limit, size)
                if stop - start > room:
                    passes.append([])
                    room = limit
                passes[-1].append((k, start, stop))
                room -= stop - start
        return passes

    def gradients(
        self, active: list[Trainee], owners: np.ndarray, vectors: Tensor, indices: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Gradients (N, P) and losses (N,) of these examples; the row of `vectors` (K, P) for example e is owners[e]."""
        owner = self._tensor(owners)
        number = self._tensor(np.array([trainee.number for trainee in active]))[owner]
        leaf = vectors.index_select(0, owner).requires_grad_()
        parts = leaf.split(self.layout.sizes, dim=1)
        trained = {(s.name, s.factor): p.view(-1, *s.shape) for s, p in zip(self.layout.slots, parts, strict=True)}
        frozen = {key: array if array.dim() == 2 else array[number] for key, array in self.frozen.items()}
        scale = self.scale if isinstance(self.scale, float) else self.scale[number]
        batch = self.examples.batch(indices, self.device)
        self.rows.give(trained | frozen, scale, self._spans(active, owners, indices, batch))
        losses = nn.functional.cross_entropy(self.rows.logits(batch), batch["labels"], reduction="none")
        losses.sum().backward()
        assert leaf.grad is not None
        return leaf.grad, losses.detach()

    def _spans(self, active: list[Trainee], owners: np.ndarray, indices: np.ndarray, batch: dict[str, Tensor]) -> list[Span]:
        """Whose rows are where, and the masks of their dropout; they are padded as they would be by themselves."""
        if not self.rows.drops:
            return []
        attention = batch.get("attention_mask")
        spans = []
        for k in np.unique(owners):
            start, stop = map(int, np.searchsorted(owners, [k, k + 1]))
            longest = int(attention[start:stop].sum(1).max()) if attention is not None else None
            spans.append(Span(start, stop, active[k].masks(indices[start:stop], longest)))
        return spans

    def _by_member(self, arrays: list[np.ndarray]) -> Tensor:
        """One array for all where it is the same, else stacked (K, …)."""
        same = all(array is arrays[0] or np.array_equal(array, arrays[0]) for array in arrays)
        return self._tensor(arrays[0] if same else np.stack(arrays))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return moved(torch.from_numpy(array), self.device)


class Trainee:
    """A member in training: one flat parameter with all that it trains, its optimiser, its streams."""

    def __init__(self, number: int, member: Member, start: Tensor, wide: Layout) -> None:
        self.number, self.member, self.task, self.start = number, member, member.task, start
        self.layout = Layout.of(member.adapters, member.dense, self.task.trains)
        places = self.layout.places_in(wide)
        self.places = None if places is None else torch.from_numpy(places).to(start.device)
        self.flat = nn.Parameter(start.clone() if self.places is None else start[self.places])
        self.descent = self._descent()
        self.generator = torch.Generator(device=start.device)  # of a plain member's dropout
        self.generator.manual_seed(self.task.dropout_seed())
        self.draws, self.step, self.losses = self.task.batches(), 0, list[Tensor]()

    def _descent(self) -> PlainDescent | PrivateDescent:
        optimizer = self.task.optimizer([self.flat])
        if self.task.mechanism is None:
            return PlainDescent(self.flat, optimizer, self.task.settings.max_grad_norm, self.task.expected)
        assert self.task.expected is not None
        return self.task.mechanism.descent(optimizer, self.task.expected, self.task.noise())

    def masks(self, records: np.ndarray, positions: int | None) -> Masks:
        """Of this step's dropout for these examples, the longest of which has so many positions (None: all alike)."""
        if self.task.key is None:
            return ByPlace(self.generator, positions)
        return ByRecord(self.task.derived("dropout"), self.step, records)

    def draw(self) -> np.ndarray:
        """The examples of the next step."""
        batch = next(self.draws)
        self.divisor = self.task.expected or max(1, len(batch))
        return batch

    def vector(self) -> Tensor:
        """The cohort's vector (P,) with this member's numbers in it."""
        if self.places is None:
            return self.flat.detach()
        return self.start.index_copy(0, self.places, self.flat.detach())

    def take(self, gradients: Tensor, losses: Tensor, last: bool) -> None:
        """Gradients (n, P) of the cohort's vector and losses (n,) of this member's examples; with the last, descend."""
        self.losses.append(losses if self.task.mechanism else losses.sum()[None] / self.divisor)
        own = gradients if self.places is None else gradients[:, self.places]
        self.descent.take(own, self.task.lr(self.step), last)
        self.step += last

    def result(self) -> Trained:
        """What this member sends back."""
        factors, dense = self.layout.split(self.flat.detach().cpu().numpy())
        sent = self.member.adapters
        adapters = {layer: Pair(**(pair._asdict() | factors.get(layer, {}))) for layer, pair in sent.items()}
        metrics = {"loss": self._loss(), "steps": float(self.task.steps)}
        metrics |= self.descent.diagnose(self.layout, sent, self.member.scale)
        return Trained(adapters, dense, metrics)

    def _loss(self) -> float:
        """The mean over steps of the batch's loss; of a private client, the mean over all records drawn."""
        return mean(self.losses) if self.task.mechanism else float(torch.cat(self.losses).sum()) / self.task.steps


@dataclass
class PlainDescent:
    """From the gradients of single examples to a step without privacy; one flat parameter (P,)."""

    flat: nn.Parameter
    optimizer: torch.optim.Optimizer
    max_grad_norm: float | None
    expected: float | None  # what the sum over a Poisson batch is divided by; None: the examples there are
    taken: int = 0  # examples of the step so far

    def take(self, gradients: Tensor, lr: float, last: bool = True) -> None:
        """Adds the gradients (n, P) up; with the last of a step, descends along their mean."""
        total = gradients.sum(0)
        self.flat.grad = total if self.flat.grad is None else self.flat.grad.add_(total)
        self.taken += len(gradients)
        if not last:
            return
        self.flat.grad.div_(self.expected or self.taken)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([self.flat], self.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.flat.grad, self.taken = None, 0

    def diagnose(self, layout: Layout, sent: Adapters, scale: float) -> dict[str, float]:
        """Nothing beyond the loss."""
        return {}
