"""What clipping cannot bound is refused before any training: layers whose rows are not records, gradients that mix them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from clients import bounded, private
from clients.private import Mechanism
from clients.train import train
from fedlora.app import experiment, plan
from fedlora.check import ConfigError
from fedlora.compute import workbench
from fedlora.compute.rows import Rows
from fedlora.config import AdapterConfig, Config, ModelConfig
from fedlora.data import Dataset, Examples
from fedlora.models import load
from fedlora.models.adapted import AdaptedModel
from fedlora.models.base import Base
from fedlora.models.encode import Images
from fedlora.privacy.refusals import unsupported
from tests.conftest import run_py
from tests.test_experiment import rows_of
from tests.test_models import bert, reviews, vit  # noqa: F401 (fixtures)
from tests.test_models import photos as few_photos  # noqa: F401 (fixture)
from tests.tiny import SIZES, VOCABULARY

CPU = torch.device("cpu")
TEXT = [f"{'a ' * (k % 5)}{word} film{' bad' * (k % 3)}" for k in range(8) for word in ("good", "bad")]


@pytest.fixture(autouse=True)
def forget():
    """What was tried in another test is tried again."""
    bounded._ensured.clear()


@pytest.fixture
def deberta(tmp_path):
    folder = tmp_path / "deberta"
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)})
    tokenizer.save_pretrained(folder)
    attention = dict(relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"], position_buckets=4)
    config = transformers.DebertaV2Config(vocab_size=len(VOCABULARY), **SIZES, **attention, num_labels=2)
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def arguments(path, tmp_path) -> list[str]:
    lines = [f"{text}\t{'good' if 'good' in text else 'bad'}" for text in TEXT]
    (tmp_path / "reviews.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    data = ["dataset=files", f"dataset.path={tmp_path / 'reviews.tsv'}", "dataset.text=text"]
    model = ["model=hf", f"model.path={path}", "partition=iid", "clients=2", "rounds=1", "engine=inline", "device=cpu"]
    return [*model, *data, f"results={tmp_path / 'results'}"]


def bench_of(model: nn.Module | str, dataset: Dataset, encode=None, **settings):
    """What `ensure` needs of a workbench."""
    base = Base(model, encode) if isinstance(model, nn.Module) else load(ModelConfig("hf", str(model)), dataset, 0)
    adapted, examples = AdaptedModel(base, AdapterConfig(**{"rank": 2} | settings), CPU), base.encode(dataset.train)
    return SimpleNamespace(
        config=Config(), model=adapted, train=examples, dataset=dataset, rows=Rows(adapted, examples)
    )  # fmt: skip


# ---- as a user meets it


@pytest.mark.parametrize("more", [[], ["plan=true"], ["strategy=fedavg", "privacy.adjacency=replace"]], ids=str)
def test_deberta_with_shared_attention_keys_is_refused_with_a_sentence(deberta, tmp_path, more) -> None:
    """Its `query_proj` sees the table of relative positions too: one record moved the clipped sum by 1.07 to 1.32 C."""
    done = run_py(*arguments(deberta, tmp_path), "privacy=record", "privacy.epsilon=3", *more)
    assert done.returncode == 2, done.stdout + done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert sentence.startswith("error: privacy=record: ") and "query_proj" in sentence
    assert "sees 1 rows for 2 records" in sentence and "leave it out of adapter.target_modules" in sentence
    assert not list(tmp_path.rglob("rounds.jsonl"))


def test_a_deberta_whose_trained_layers_see_records_only_trains(deberta, tmp_path) -> None:
    cure = ["adapter.target_modules=[dense]", "adapter.train_head=false"]
    done = run_py(*arguments(deberta, tmp_path), "privacy=record", "privacy.epsilon=3", *cure)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a record adds" in done.stdout


def test_without_privacy_it_trains_as_before(deberta, tmp_path) -> None:
    assert run_py(*arguments(deberta, tmp_path)).returncode == 0


def test_a_client_refuses_for_itself(small, monkeypatch) -> None:
    """Where no driver has looked: as on a device."""
    config = small(privacy__name="record", privacy__epsilon=3.0, privacy__delta=1e-3)
    monkeypatch.setattr(plan, "sensitivity", lambda bench, strategy: [])

    def refuse(bench, trains) -> None:
        raise ConfigError(f"not with {trains}")

    monkeypatch.setattr(bounded, "ensure", refuse)
    for cohort in ("1", "4"):
        config.engine.cohort, config.name = cohort, f"cohort{cohort}"
        with pytest.raises(Exception, match="not with B"):
            experiment.run(config, 0.0)


# ---- which layers


class Toy(nn.Module):
    """A classifier of three positions of four features; `way` says what its one adapted layer, `inner`, is given."""

    def __init__(self, way) -> None:
        super().__init__()
        self.way, self.inner, self.head = way, nn.Linear(4, 4), nn.Linear(4, 2)
        self.table = nn.Parameter(torch.randn(3, 4))

    def forward(self, pixel_values, labels=None):
        x = pixel_values.flatten(1).view(len(pixel_values), 3, 4)
        logits = self.head(self.way(self, x).mean(1))
        return SimpleNamespace(logits=logits, loss=None if labels is None else nn.functional.cross_entropy(logits, labels))


def plain(toy, x):
    return toy.inner(x).tanh()


def twice(toy, x):
    return toy.inner(toy.inner(x).tanh())


def latents(toy, x):
    """Perceiver's: a table, but a copy of it for each record, which then looks at that record."""
    return toy.inner(toy.table.expand(len(x), 3, 4)) * x


def shared_bias(toy, x):
    """T5's: a frozen table that is added after the trained layer."""
    return toy.inner(x) + toy.table


def table(toy, x):
    return toy.inner(x) * toy.inner(toy.table)


def table_of_one_row(toy, x):
    return toy.inner(x) * toy.inner(toy.table[None])


def table_of_two_rows(toy, x):
    return toy.inner(x) * toy.inner(toy.table[:2]).sum(0)


def positions_first(toy, x):
    return toy.inner(x.transpose(0, 1)).transpose(0, 1)


def windows(toy, x):
    """Swin's and Longformer's: several rows of each record."""
    return toy.inner(x.reshape(-1, 1, 4)).view(x.shape)


def one_vector(toy, x):
    return x * toy.inner(toy.table[0])


def centred(toy, x):
    return toy.inner(x - x.mean(0)).tanh()


def turned(toy, x):
    """Rows are as many as records, and another's."""
    return toy.inner(x.flip(0)).tanh()


def unseen(toy, x):
    return nn.functional.linear(x, toy.inner.weight)


def toy(way):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = Examples([rng.random((3, 4, 1), dtype=np.float32) for _ in range(5)], np.array([0, 1, 0, 1, 1]))
    pixels = torch.from_numpy(np.stack(images.inputs).reshape(5, 1, 3, 4))
    dataset = Dataset("image", ["a", "b"], images, images)
    model = Toy(way).eval()
    return bench_of(model, dataset, lambda _: Images(torch.from_numpy(images.labels), pixels), target_modules=["inner"])


@pytest.mark.parametrize("trains", ["AB", "B", "A", "R"])
@pytest.mark.parametrize("way", [plain, twice, latents, shared_bias])
def test_what_is_right_passes(way, trains) -> None:
    bounded.ensure(toy(way), trains)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (table, "sees 3 rows for 2 records"),
        (table_of_one_row, "sees 1 rows for 2 records"),
        (table_of_two_rows, "sees 2 rows for 3 records"),
        (positions_first, "sees 3 rows for 2 records"),
        (windows, "sees 6 rows for 2 records"),
        (one_vector, "sees 4 rows for 2 records"),
        (centred, "give a record another gradient than it has alone"),
        (turned, "give a record another gradient than it has alone"),
        (unseen, "gets no gradient of its own"),
    ],
)
def test_what_is_wrong_is_refused_again_and_again(way, words) -> None:
    bench = toy(way)
    for _ in range(2):
        with pytest.raises(ConfigError, match=words) as error:
            bounded.ensure(bench, "AB")
        assert "inner" in str(error.value) and "\n" not in str(error.value)


def test_opacus_hooks_that_are_wrong_are_found_where_shared_passes_are_right(monkeypatch) -> None:
    backward = bounded.backward
    scaled = lambda *a: {n: g * (1.01 if a[-1] == "grad_sample" else 1) for n, g in backward(*a).items()}  # noqa: E731
    monkeypatch.setattr(bounded, "backward", scaled)
    with pytest.raises(ConfigError, match=r"Opacus' hooks give a record another gradient .*off by 0\.01"):
        bounded.ensure(toy(plain), "AB")


def test_shared_passes_that_are_wrong_are_found_where_hooks_are_right(monkeypatch) -> None:
    give = Rows.give
    monkeypatch.setattr(Rows, "give", lambda self, factors, scale, spans: give(self, factors, 1.01 * scale, spans))
    with pytest.raises(ConfigError, match="the shared pass gives a record another gradient"):
        bounded.ensure(toy(plain), "AB")


def longformer(folder) -> None:
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)})
    tokenizer.save_pretrained(folder)
    config = transformers.LongformerConfig(
        vocab_size=len(VOCABULARY), **SIZES, attention_window=4, max_position_embeddings=40, pad_token_id=0, num_labels=2
    )
    transformers.LongformerForSequenceClassification(config).save_pretrained(folder)


def t5(folder) -> None:
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)}, eos_token="[SEP]")
    tokenizer.save_pretrained(folder)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, eos_token_id=3)
    config = transformers.T5Config(vocab_size=len(VOCABULARY), **sizes, num_labels=2, pad_token_id=0)
    transformers.T5ForSequenceClassification(config).save_pretrained(folder)


@pytest.fixture
def texts() -> Dataset:
    examples = Examples(TEXT, np.array(["good" in text for text in TEXT]).astype(np.int64))
    return Dataset("text", ["bad", "good"], examples, examples)


def test_longformers_windows_are_refused(tmp_path, texts) -> None:
    longformer(tmp_path)
    with pytest.raises(ConfigError, match="rows are not records"):
        bounded.ensure(bench_of(tmp_path, texts), "AB")


def test_t5_with_its_shared_bias_passes(tmp_path, texts) -> None:
    t5(tmp_path)
    bounded.ensure(bench_of(tmp_path, texts, train_head=False, target_modules=["q", "v"]), "AB")


@pytest.mark.parametrize(("family", "data"), [("bert", "texts"), ("vit", "few_photos")])
def test_families_that_users_bring_pass(request, family, data) -> None:
    bench = bench_of(request.getfixturevalue(family), request.getfixturevalue(data), dropout=0.5)
    for trains in ("AB", "B", "R"):
        bounded.ensure(bench, trains)


def test_a_bfloat16_base_passes(small) -> None:
    bounded.ensure(workbench.build(small(model__dtype="bfloat16", adapter__train_head=True)), "AB")


def test_fewer_records_than_a_batch_are_tried_too(bert, texts) -> None:  # noqa: F811
    one = Dataset("text", texts.classes, Examples(TEXT[:1], texts.train.labels[:1]), texts.test)
    bounded.ensure(bench_of(bert, one), "AB")
    none = Dataset("text", texts.classes, Examples([], texts.train.labels[:0]), texts.test)
    bounded.ensure(SimpleNamespace(model=nn.Module(), dataset=none), "AB")  # a server of devices has none


# ---- it leaves no trace


def test_a_model_is_left_as_it_was_and_tried_once(small, monkeypatch) -> None:
    bench = workbench.build(small(adapter__train_head=True, adapter__dropout=0.3))
    model, rng = bench.model, np.random.default_rng(5)
    low = {n: p._replace(A=p.A[:2], B=rng.normal(size=(len(p.B), 2)).astype(np.float32)) for n, p in model.adapters().items()}
    model.write(low, {name: array + 1 for name, array in model.initial_head.items()}, dict(list(low.items())[:1]))
    model.trainable("B")
    model.train_mode()

    def state():
        modules = [(name, module.training, type(module).forward is not module.forward) for name, module in names()]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for _, m in names()]
        arrays = {name: (p.requires_grad, p.grad, p.detach().clone()) for name, p in model.peft.named_parameters()}
        return modules, hooks, arrays, model.correction, model.scale_written, model.mixes, torch.get_rng_state()

    def names():
        return list(model.peft.named_modules())

    before = state()
    for trains in ("AB", "B"):
        bounded.ensure(bench, trains)
    after = state()
    assert before[0] == after[0] and before[1] == after[1] and before[4:6] == after[4:6]
    assert before[3] is after[3] and len(before[3]) == 1
    assert torch.equal(before[6], after[6])
    for name, (required, gradient, array) in before[2].items():
        assert after[2][name][0] == required and after[2][name][1] is gradient is None
        assert torch.equal(after[2][name][2], array)
    assert not any(getattr(p, "grad_sample", None) is not None for p in model.peft.parameters())
    monkeypatch.setattr(bounded, "supported", lambda *a: pytest.fail("tried again"))
    bounded.ensure(bench, "B")


def test_a_refusal_leaves_no_trace_either() -> None:
    bench = toy(table)
    before = bench.model.adapters()
    with pytest.raises(ConfigError):
        bounded.ensure(bench, "AB")
    after = bench.model.adapters()
    assert all(np.array_equal(before[n].A, after[n].A) and np.array_equal(before[n].B, after[n].B) for n in before)
    assert not any(module._forward_pre_hooks for module in bench.model.peft.modules() if type(module) is nn.Linear)


@pytest.mark.parametrize("cohort", ["1", "4"])
def test_the_numbers_of_a_run_do_not_change_by_it(small, monkeypatch, cohort) -> None:
    settings = {"privacy__name": "record", "privacy__noise_multiplier": 1.0, "engine__cohort": cohort}
    tried = small(**settings, name="tried", adapter__dropout=0.2)
    experiment.run(tried, 0.0)
    workbench.build_from.cache_clear()
    workbench._model.cache_clear()
    monkeypatch.setattr(bounded, "ensure", lambda bench, trains: None)
    experiment.run(untried := small(**settings, name="untried", adapter__dropout=0.2), 0.0)
    for one, other in zip(rows_of(tried), rows_of(untried), strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k and k != "started"} == {
            k: v for k, v in other.items() if "seconds" not in k and k != "started"
        }


# ---- the last guard, and the bound itself


def test_a_private_step_still_refuses_rows_that_are_not_records() -> None:
    bench = toy(windows)
    with pytest.raises(Exception, match="clipping would bound no record"):
        train(bench.model, bench.train, np.arange(5), bench.config.train, "AB", (1, 1), (0, 0, 1), Mechanism(1.0, 1.0))
    assert private.rows_are_not_records(6, 2)


def test_frozen_batch_normalisation_in_eval_is_no_reason() -> None:
    norm = nn.BatchNorm1d(4).requires_grad_(False)
    assert "normalises over the batch" in unsupported(norm)
    assert unsupported(norm.eval()) == ""
