"""Clients that share a pass end where each would have ended by itself: whatever they train, however they differ."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from flwr.app import ConfigRecord

import strategies
from clients import cohort
from clients.cohort import Cohort, Member, Trained, train_together
from clients.private import Mechanism
from clients.task import Task, simulated_key
from clients.train import perform
from fedlora import engines
from fedlora.app import experiment
from fedlora.arrays import messages
from fedlora.compute import workbench
from fedlora.compute.rows import Rows
from fedlora.config import AdapterConfig, ModelConfig, TrainConfig
from fedlora.data import Dataset, Examples
from fedlora.models import load
from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Encoded, Texts
from tests.test_models import CPU, bert, gpt2, vit  # noqa: F401 (fixtures)
from tests.tiny import SIZES, VOCABULARY

PRIVATE = Mechanism(0.7, 0.3)
SHARDS = [9, 2, 1, 14, 6]  # examples of the clients; a batch is four
STEPS = TrainConfig(steps=3, batch_size=4, lr=0.3)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llama(gpt2):  # noqa: F811 (its tokenizer is used)
    config = transformers.LlamaConfig(vocab_size=len(VOCABULARY), max_position_embeddings=32, **SIZES)
    transformers.LlamaModel(config).save_pretrained(gpt2)
    return gpt2


@pytest.fixture
def albert(bert):  # noqa: F811
    """One layer that the model goes through twice."""
    config = transformers.AlbertConfig(vocab_size=len(VOCABULARY), embedding_size=16, **SIZES)
    transformers.AlbertModel(config).save_pretrained(bert)
    return bert


@pytest.fixture
def data(request) -> Dataset:
    """32 texts of one to nine words, or images; `family` says which."""
    rng = np.random.default_rng(0)
    if request.getfixturevalue("family") == "vit":
        images = Examples([rng.random((8, 8, 3), dtype=np.float32) for _ in range(32)], rng.integers(0, 3, 32))
        return Dataset("image", ["a", "b", "c"], images, images)
    words = [" ".join(rng.choice(VOCABULARY[5:], 1 + k % 9)) for k in range(32)]
    texts = Examples(words, rng.integers(0, 2, 32))
    return Dataset("text", ["no", "yes"], texts, texts)


@pytest.fixture
def family() -> str:
    return "bert"


@pytest.fixture
def make(request, family, data):
    """A maker of (adapted model, encoded examples), with settings of the adapter; the base is always the same one."""

    def built(**settings) -> tuple[AdaptedModel, Encoded]:
        base = load(ModelConfig("hf", str(request.getfixturevalue(family))), data, 0)
        base.model.apply(sharpen)
        model = AdaptedModel(base, AdapterConfig(**{"rank": 3, "alpha": 6.0, "train_head": True} | settings), CPU)
        return model, base.encode(data.train)

    return built


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The bases are drawn from torch's global generator, and a rare one learns so fast that rounding grows."""
    torch.manual_seed(0)


def sharpen(module) -> None:
    """Random weights as small as transformers draws them give gradients near nothing."""
    if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
        module.weight.data.mul_(8)


def factors(model: AdaptedModel, seed: int = 0):
    """A as in round 0, and a B that is not zero (at B = 0, A has no gradient)."""
    rng = np.random.default_rng(seed)
    begin = model.initial("kaiming", seed)
    return {name: p._replace(B=rng.normal(0, 0.05, p.B.shape).astype(np.float32)) for name, p in begin.items()}


def members(model: AdaptedModel, shards=SHARDS, settings=STEPS, trains="AB", mechanism=None, start=0) -> list[Member]:
    ends = np.cumsum(shards)
    keys = [mechanism and simulated_key((0, client, 1), "", mechanism) for client in range(len(shards))]
    return [
        Member(
            Task(np.arange(end - size, end), settings, trains, (1, 2), (0, client, 1), mechanism, keys[client]),
            factors(model, start),
            model.initial_head if model.trains_head else {},
            model.scale,
        )
        for client, (size, end) in enumerate(zip(shards, ends, strict=True))
    ]


def change(member: Member, **fields) -> Member:
    """The member with other fields of itself, of its task, or of the task's settings."""
    names = {kind: {field.name for field in dataclasses.fields(kind)} for kind in (Member, Task, TrainConfig)}
    task, settings = member.task, {k: v for k, v in fields.items() if k in names[TrainConfig]}
    if settings:
        task = dataclasses.replace(task, settings=dataclasses.replace(task.settings, **settings))
    task = dataclasses.replace(task, **{k: v for k, v in fields.items() if k in names[Task]})
    return dataclasses.replace(member, task=task, **{k: v for k, v in fields.items() if k in names[Member]})


def alone(model: AdaptedModel, examples: Encoded, member: Member) -> Trained:
    model.write(member.adapters, member.dense)
    metrics = perform(member.task, model, examples)
    return Trained(model.adapters(), model.dense(), metrics)


def together(model: AdaptedModel, examples: Encoded, members: list[Member]) -> list[Trained]:
    return train_together(Rows(model, examples), examples, members)


def arrays(trained: Trained | Member) -> dict[str, np.ndarray]:
    pairs = {f"{name}.{f}": array for name, pair in trained.adapters.items() for f, array in pair._asdict().items()}
    return {name: array.astype(np.float64) for name, array in (pairs | trained.dense).items()}


def assert_same(fused: Trained, lone: Trained, member: Member, tolerance: float = 1e-5) -> None:
    """Each array's move within `tolerance` of the whole move (and the rounding of the array itself); so the metrics."""
    one, other, start = arrays(fused), arrays(lone), arrays(member)
    assert one.keys() == other.keys()
    moved = np.sqrt(sum(np.sum((other[name] - start[name]) ** 2) for name in start))
    assert moved > 1e-3
    for name in one:
        rounding = 3e-7 * np.linalg.norm(other[name])
        assert np.linalg.norm(one[name] - other[name]) <= tolerance * moved + rounding, name
        if name.endswith((".A", ".B")) and name[-1] not in member.task.trains:
            assert np.array_equal(one[name], start[name]), name
    assert fused.metrics == pytest.approx(lone.metrics, rel=max(2e-5, tolerance), abs=1e-7)


def check(model: AdaptedModel, examples: Encoded, team: list[Member], tolerance: float = 1e-5) -> None:
    for fused, member in zip(together(model, examples, team), team, strict=True):
        assert_same(fused, alone(model, examples, member), member, tolerance)


either = pytest.mark.parametrize("mechanism", [None, PRIVATE], ids=["plain", "private"])


# ---- one by one, or together


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama", "albert"])
@pytest.mark.parametrize("trains", ["AB", "B", "A"])
@either
def test_families_train_together_as_they_do_alone(make, family, trains, mechanism) -> None:
    model, examples = make()
    check(model, examples, members(model, trains=trains, mechanism=mechanism))


@pytest.mark.parametrize("settings", [
    {"steps": None, "epochs": 2},  # clients take from 2 to 8 steps
    {"batch_size": 64},
    {"sampling": "poisson", "batch_size": 2},  # batches of every size, none among them
    {"sampling": "poisson", "batch_size": 0.01, "weight_decay": 0.1},  # nobody is drawn in almost every step
    {"momentum": 0.9},
    {"weight_decay": 0.2, "momentum": 0.5},
    {"max_grad_norm": 0.05},
    {"max_grad_norm": 0.05, "physical_batch_size": 3},
    {"physical_batch_size": 1},
    {"physical_batch_size": 3, "steps": None, "epochs": 1},
    {"schedule": "cosine", "warmup": 0.1, "steps": 4},
], ids=str)  # fmt: skip
@either
def test_settings_of_training(make, settings, mechanism) -> None:
    if mechanism and "max_grad_norm" in settings:
        pytest.skip("refused with privacy=record")
    model, examples = make()
    check(model, examples, members(model, settings=dataclasses.replace(STEPS, **settings), mechanism=mechanism))


@either
def test_adamw(make, mechanism) -> None:
    """Adam divides by √v: in a coordinate whose gradient is near zero, what rounding left becomes a step of size lr."""
    model, examples = make()
    settings = dataclasses.replace(STEPS, optimizer="adamw", lr=0.02, weight_decay=0.1)
    check(model, examples, members(model, settings=settings, mechanism=mechanism), tolerance=2e-3)


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize("settings", [
    {}, {"physical_batch_size": 3}, {"sampling": "poisson", "batch_size": 2}
], ids=str)  # fmt: skip
@either
def test_adapter_dropout_is_each_clients_own(make, family, settings, mechanism) -> None:
    model, examples = make(dropout=0.4)
    team = members(model, settings=dataclasses.replace(STEPS, **settings), mechanism=mechanism)
    check(model, examples, team)
    other = together(model, examples, [change(team[0], streams=(0, 7, 1)), *team[1:]])
    assert other[1].metrics == pytest.approx(alone(model, examples, team[1]).metrics, rel=2e-5)


@pytest.mark.parametrize(("family", "modules"), [
    ("bert", ["query", "dense"]),  # the pooler among them, which sees no positions
    ("gpt2", ["c_attn", "c_proj", "c_fc"]),
])  # fmt: skip
@either
def test_any_linear_layer_may_be_adapted(make, modules, mechanism) -> None:
    model, examples = make(target_modules=modules, dropout=0.2)
    check(model, examples, members(model, mechanism=mechanism))


@pytest.mark.parametrize(("mechanism", "bias"), [(None, True), (None, False), (PRIVATE, True)])  # Opacus wants one
def test_a_head_of_linear_layers_and_layer_norms(data, bert, mechanism, bias) -> None:  # noqa: F811
    base = load(ModelConfig("hf", str(bert)), data, 0)
    base.model.apply(sharpen)
    last = "bert.encoder.layer.1.output"
    if not bias:
        base.model.get_submodule(last).LayerNorm.bias = None
        base.model.classifier.bias = None
    base = dataclasses.replace(base, new=["classifier.weight", f"{last}.LayerNorm.weight", f"{last}.dense.weight"])
    model, examples = AdaptedModel(base, AdapterConfig(rank=2), CPU), base.encode(data.train)
    assert len(model.dense()) == (6 if bias else 4)
    check(model, examples, members(model, mechanism=mechanism))


@either
def test_members_may_differ_in_everything_but_the_examples(make, mechanism) -> None:
    model, examples = make()
    first, second, third, fourth, fifth = members(model, mechanism=mechanism)
    louder = mechanism and Mechanism(2.0, 0.1)
    team = [
        change(first, trains="B", lr=0.05, mechanism=louder),
        change(second, trains="A", streams=(5, 1, 1), steps=1),
        change(third, adapters=factors(model, 9), progress=(2, 2), schedule="linear"),
        change(fourth, trains="B", batch_size=3, steps=5, dense={n: a + 0.1 for n, a in fourth.dense.items()}),
        change(fifth, mechanism=None, key=None, momentum=0.9, sampling="poisson"),  # one without privacy among private ones
    ]
    check(model, examples, team)


@pytest.mark.parametrize("trains", ["AB", "B", "A"])
@either
def test_ranks_and_scales_may_differ(make, trains, mechanism) -> None:
    models = [make(rank=rank, alpha=6.0) for rank in (1, 5, 3)]  # scales 6, 1.2 and 2
    teams = [change(members(model, trains=trains, mechanism=mechanism)[k], steps=1 + k) for k, (model, _) in enumerate(models)]
    fused = together(*make(rank=4), teams)  # the resident model's own rank is of no account
    for (model, examples), member, result in zip(models, teams, fused, strict=True):
        assert_same(result, alone(model, examples, member), member)


def test_a_frozen_factor_may_differ_from_member_to_member(make) -> None:
    model, examples = make(train_head=False)
    steps = [1, 3, 2, 5, 4]  # who is left does not stand where it stood
    team = [change(m, adapters=factors(model, k), steps=steps[k]) for k, m in enumerate(members(model, trains="B"))]
    check(model, examples, team)


@either
def test_a_frozen_head_and_a_cohort_of_one(make, mechanism) -> None:
    model, examples = make(train_head=False)
    assert model.dense() == {}
    check(model, examples, members(model, [7], mechanism=mechanism))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # in the diagnosis of the broken one
def test_a_client_that_is_not_finite_changes_nobody_else(make) -> None:
    model, examples = make()
    team = members(model, mechanism=PRIVATE, settings=dataclasses.replace(STEPS, batch_size=64))
    poisoned = {name: pair._replace(B=pair.B * np.float32(np.inf)) for name, pair in team[1].adapters.items()}
    fused = together(model, examples, [team[0], change(team[1], adapters=poisoned), *team[2:]])
    for k in (0, 2, 3, 4):
        assert_same(fused[k], alone(model, examples, team[k]), team[k])
    assert fused[1].metrics["gradient_norm"] == 0.0  # none of its records took part


def test_the_resident_model_is_left_as_it_was(make) -> None:
    model, examples = make(dropout=0.2)
    model.write(factors(model, 3), {name: array + 1 for name, array in model.initial_head.items()})
    before = {name: p.clone() for name, p in model.peft.named_parameters()}
    model.peft.eval()
    logits = model.forward(examples.batch(np.arange(4), CPU)).logits
    together(model, examples, members(model, mechanism=PRIVATE))
    assert all(torch.equal(p, before[name]) for name, p in model.peft.named_parameters())
    assert not any("forward" in vars(module) for module in model.peft.modules())
    model.peft.eval()
    assert torch.equal(model.forward(examples.batch(np.arange(4), CPU)).logits, logits)


# ---- the gradients of a pass


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama", "albert"])
def test_gradients_by_example_are_those_of_single_backward_passes(make, family) -> None:
    model, examples = make()
    team = [change(m, adapters=factors(model, k)) for k, m in enumerate(members(model))]
    joint = Cohort(Rows(model, examples), examples, team)
    owners, indices = np.array([0, 0, 1, 2, 3, 3, 4]), np.arange(3, 10)
    with joint.rows.installed():
        vectors = torch.stack([trainee.vector() for trainee in joint.trainees])
        gradients, losses = joint.gradients(joint.trainees, owners, vectors, indices)
    for row, (owner, index) in enumerate(zip(owners, indices, strict=True)):
        model.write(team[owner].adapters, team[owner].dense)
        parameters = model.trainable("AB")
        model.peft.eval()
        loss = model.forward(examples.batch(np.array([index]), CPU)).loss
        loss.backward()
        single = torch.cat([parameter.grad.flatten() for parameter in parameters])
        assert float(losses[row]) == pytest.approx(loss.item(), rel=1e-5)
        assert torch.linalg.norm(gradients[row] - single) <= 1e-5 * torch.linalg.norm(single)


# ---- whole experiments


def final(config) -> tuple[dict, dict]:
    """The products and the head that the server ends with, and the last round's metrics."""
    strategy = experiment.make_strategy(config)
    bench = workbench.build(config)
    state = experiment.initial_state(bench, strategy)
    job = ConfigRecord({messages.EXPERIMENT: config.to_json()})
    if config.privacy.name == "record":
        job[messages.NOISE] = [0.5 + client / 10 for client in range(config.clients)]
    arrays = messages.pack(state.adapters, state.dense)
    engine = engines.make(config)
    engine.run(lambda grid: strategy.start(grid, arrays, config.rounds, train_config=job))
    end = strategy.state
    products = {name: end.scale * pair.B.astype(float) @ pair.A for name, pair in end.adapters.items()}
    for name, pair in end.base_correction.items():
        products[name] = products[name] + pair.B.astype(float) @ pair.A
    metrics = {k: v for k, v in strategy.report.metrics.items() if k not in ("client_seconds", "client_cohort")}
    return products | {name: array.astype(float) for name, array in end.dense.items()}, metrics


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """The sizes of all cohorts that have been trained together."""
    seen: list[int] = []

    def spy(rows, examples, team):
        trained = train_together(rows, examples, team)
        seen.append(len(team))
        return trained

    monkeypatch.setattr(cohort, "train_together", spy)
    return seen


@pytest.mark.parametrize("privacy", ["none", "record"])
@pytest.mark.parametrize("name", strategies.names())
def test_every_strategy_ends_in_the_same_state(small, sizes, name, privacy) -> None:
    settings = {"strategy": {"name": name}, "adapter__train_head": True, "adapter__dropout": 0.1, "rounds": 3}
    settings |= {"train__lr": 0.1}  # at 0.5 training amplifies rounding, by more or less on one processor or another
    settings |= {"evaluate__holdout": 0.2} if strategies.strategy_class(name).personal else {}
    if privacy == "record":
        settings |= {"privacy__name": "record", "privacy__noise_multiplier": 1.0, "privacy__clip": 0.5}
    (one, metrics_one), (three, metrics_three) = (final(small(engine__cohort=n, **settings)) for n in ("1", "3"))
    assert sizes == [3] * 3  # four clients a round: three together, and one that plays by itself
    assert one.keys() == three.keys()
    for key in one:
        assert np.linalg.norm(three[key] - one[key]) <= 1e-5 * np.linalg.norm(one[key]), key
    assert metrics_three == pytest.approx(metrics_one, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("quickest", "cores", "expected"), [(64, 2, [2, 2]), (3, 1, [3]), (1, 1, []), (64, 8, [])])
def test_auto_takes_the_quickest_size_that_leaves_work_for_every_core(
    small, sizes, tmp_path, monkeypatch, quickest, cores, expected
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("clients.cost.measure", lambda bench, trains: quickest)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    final(small(engine__cohort="auto", rounds=1))  # of four clients
    assert sizes == expected


# ---- models without factors by example


@pytest.fixture
def fresh():
    """A resident model that the test may spoil."""
    workbench.build_from.cache_clear()
    workbench._model.cache_clear()
    yield
    workbench.build_from.cache_clear()
    workbench._model.cache_clear()


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def dora(model: AdaptedModel) -> None:
    model.peft.get_submodule(model.layers[0]).lora_magnitude_vector["default"] = torch.nn.Identity()


def other_head(model: AdaptedModel) -> None:
    for module in model.peft.modules():
        if any(parameter is p for parameter in module.parameters(recurse=False) for p in model._head.values()):
            module.__class__ = Scaled


@pytest.mark.parametrize(("spoil", "words"), [(dora, "other than plain LoRA"), (other_head, "the head trains a Scaled")])
def test_what_has_no_form_by_example_is_played_one_by_one(small, fresh, sizes, spoil, words) -> None:
    settings = {"adapter__train_head": True}
    spoil(workbench.build(small(**settings)).model)
    (one, _), (three, _), (auto, _) = (final(small(engine__cohort=n, **settings)) for n in ("1", "3", "auto"))
    assert words in workbench.build(small(engine__cohort="auto", **settings)).rows.refusal and not sizes
    assert all(np.array_equal(one[key], three[key]) and np.array_equal(one[key], auto[key]) for key in one)


def test_the_dropout_of_the_base_is_drawn_client_by_client(small, fresh, sizes, bert, tmp_path) -> None:  # noqa: F811
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(VOCABULARY[5:], 1 + k % 5)) + f"\t{k % 2}" for k in range(40)]
    (tmp_path / "reviews.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    settings = {"dataset__name": "files", "dataset__path": str(tmp_path / "reviews.tsv"), "dataset__text": "text"}
    settings |= {"model__name": "hf", "model__path": str(bert), "model__dropout": True}
    (one, _), (three, _) = (final(small(engine__cohort=n, **settings)) for n in ("1", "3"))
    assert "model.dropout=true" in workbench.build(small(engine__cohort="3", **settings)).rows.refusal and not sizes
    assert all(np.array_equal(one[key], three[key]) for key in one)
    settings["model__dropout"] = False
    (one, _), (three, _) = (final(small(engine__cohort=n, **settings)) for n in ("1", "3"))
    assert sizes == [3, 3]
    assert all(np.linalg.norm(one[key] - three[key]) <= 1e-5 * np.linalg.norm(one[key]) for key in one)


def test_windowed_attention_is_played_one_by_one(small, fresh, sizes, tmp_path) -> None:
    folder = tmp_path / "swin"
    shape = dict(image_size=8, patch_size=2, num_channels=1, embed_dim=8, depths=[2], num_heads=[2], window_size=2)
    transformers.SwinForImageClassification(transformers.SwinConfig(**shape, num_labels=10)).save_pretrained(folder)
    sizes_of_pixels = {"size": {"height": 8, "width": 8}, "image_mean": [0.5], "image_std": [0.5]}
    processor = {"image_processor_type": "ViTImageProcessor"} | sizes_of_pixels
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    settings = {"model__name": "hf", "model__path": str(folder), "strategy": {"name": "fedavg"}, "rounds": 1}
    (one, _), (three, _), (auto, _) = (final(small(engine__cohort=n, **settings)) for n in ("1", "3", "auto"))
    bench = workbench.build(small(engine__cohort="auto", **settings))
    assert bench.rows.refusal == "a layer sees 8 rows for 2 examples (windowed attention, positions first)" and not sizes
    assert all(np.array_equal(one[key], three[key]) and np.array_equal(one[key], auto[key]) for key in one)
    with pytest.raises(ValueError, match="windowed attention"):
        train_together(bench.rows, bench.train, members(bench.model, [3, 3]))


@pytest.mark.parametrize("positions", [2, 3, 7])
def test_positions_first_are_refused_even_where_they_are_as_many_as_the_examples(make, positions) -> None:
    """As in Longformer, whose projections see (positions, examples, features)."""
    model, _ = make()
    query = model.peft.get_submodule(model.layers[0])
    query.register_forward_pre_hook(lambda module, args: (args[0].transpose(0, 1),))
    query.register_forward_hook(lambda module, args, out: out.transpose(0, 1))
    texts = Texts(torch.zeros(8, dtype=torch.int64), [np.full(positions, 5)] * 8, 0)
    assert f"a layer sees {positions} rows for" in Rows(model, texts).refusal
