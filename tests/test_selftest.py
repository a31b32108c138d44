"""The self-test of private training: it passes where DP-SGD is right, and each planted fault is refused or FAILED."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from opacus.optimizers import DPOptimizer
from PIL import Image
from torch import nn

from clients import bounded
from clients.private import NoisyOptimizer
from clients.task import simulated_key
from fedlora.compute import workbench
from fedlora.compute.rows import Rows
from fedlora.tools import cli, selftest
from tests.conftest import ROOT
from tests.test_models import bert, gpt2, vit  # noqa: F401 (fixtures)

FINE = ["support", "per-example gradients", "shared passes", "independence", "clip bound", "noise", "movement"]


@pytest.fixture
def bench(small):
    """A workbench with a model of its own, that a test may spoil."""
    workbench.build_from.cache_clear()
    workbench._model.cache_clear()
    yield workbench.build(small(adapter__train_head=True))
    workbench.build_from.cache_clear()
    workbench._model.cache_clear()


@pytest.fixture
def reviews(tmp_path) -> list[str]:
    lines = [f"{'a ' * (k % 5)}{word} film{' bad' * (k % 3)}\t{word}" for k in range(8) for word in ("good", "bad")]
    (tmp_path / "reviews.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    return ["dataset=files", f"dataset.path={tmp_path / 'reviews.tsv'}", "dataset.text=text"]


@pytest.fixture
def photos(tmp_path) -> list[str]:
    rng, rows = np.random.default_rng(0), ["image,label"]
    for k in range(15):
        Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
        rows.append(f"{k}.png,{'abc'[k % 3]}")
    (tmp_path / "photos.csv").write_text("\n".join(rows) + "\n")
    return ["dataset=files", f"dataset.path={tmp_path / 'photos.csv'}", "dataset.image=image"]


def failed(bench, capsys) -> set[str]:
    """The names of the checks that failed."""
    status = selftest.report(bench)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == FINE
    names = {line.partition(":")[0] for line in lines if ": FAILED (" in line}
    assert status == bool(names)
    return names


def own(path, data) -> list[str]:
    return ["model=hf", f"model.path={path}", "clients=2", "device=cpu", "adapter.rank=8", "partition=iid", *data]


@pytest.mark.parametrize(("family", "data"), [("bert", "reviews"), ("gpt2", "reviews"), ("vit", "photos")])
def test_it_passes_on_the_families_that_users_bring(request, capsys, family, data) -> None:
    arguments = own(request.getfixturevalue(family), request.getfixturevalue(data))
    assert selftest.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [f"{name}: ok" for name in FINE]


def test_as_a_command_it_passes_on_the_embedded_model_with_any_privacy_settings() -> None:
    command = [sys.executable, "-m", "fedlora.tools.selftest", "device=cpu", "privacy=record", "privacy.epsilon=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok (") == len(FINE) and done.stderr == ""


def test_help_has_usage_meaning_and_the_exit_statuses(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        selftest.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith("usage: python -m fedlora.tools.selftest [-h] [setting=value ...]")
    assert "exit status: 0 " in shown and "python run.py --help" in shown and "`python -m" not in shown


@pytest.mark.parametrize(("arguments", "words"), [
    (["clients=0"], ["clients=0", "above 0"]),
    (["seed=1,2"], ["seed=1,2"]),
    (["modle=hf"], ["modle", "did you mean model?"]),
    (["model=hf", f"model.path={ROOT / 'docs'}"], ["model.path=", "config.json"]),
])  # fmt: skip
def test_bad_settings_are_one_sentence_and_status_2(capsys, arguments, words) -> None:
    assert selftest.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words)


# ---- what is refused


class AwakeNorm(nn.BatchNorm1d):
    """Batch normalisation that no mode turns off; frozen and in eval, as a run has it, it mixes no records."""

    training = property(lambda self: True, lambda self, value: None)


def add_loose_parameter(bench) -> None:
    scale = nn.Module()
    scale.weight = nn.Parameter(torch.ones(3))
    bench.model.peft.add_module("scale", scale)
    bench.model._head["scale.weight"] = scale.weight


def round_to_bfloat16(bench) -> None:
    parameter = next(iter(bench.model._B.values()))
    parameter.data = parameter.data.bfloat16()


def checkpoint(bench) -> None:
    bench.model.peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def add_batch_norm(bench) -> None:
    bench.model.peft.add_module("norm", AwakeNorm(4))


def add_dora(bench) -> None:
    layer = bench.model.peft.get_submodule(next(iter(bench.model._A)))
    layer.lora_magnitude_vector["default"] = nn.Identity()


def embed_adapter(bench) -> None:
    layer = bench.model.peft.get_submodule(next(iter(bench.model._A)))
    layer.base_layer = nn.Embedding(4, 64)


def turn_batch_around(bench) -> None:
    """A layer that is given one row for each record and position, as position-wise and windowed layers are."""
    head = bench.model.peft.get_submodule("base_model.model.classifier")
    forward = head.forward
    head.forward = lambda x: forward(x.repeat_interleave(2, 0))[::2]


@pytest.mark.parametrize(("plant", "words"), [
    (add_loose_parameter, ["scale (Module)", "only as Conv1d", "Linear", "adapter.train_head=false"]),
    (round_to_bfloat16, ["not float32"]),
    (checkpoint, ["use_reentrant=False", "switch it off"]),
    (add_batch_norm, ["norm (AwakeNorm)", "LayerNorm"]),
    (add_dora, ["DoRA", "plain LoRA"]),
    (embed_adapter, ["no linear layer", "adapter.target_modules"]),
    (turn_batch_around, ["classifier", "sees 4 rows for 2 records", "rows are not records"]),
])  # fmt: skip
def test_what_opacus_cannot_do_is_refused_with_reason_and_cure(bench, monkeypatch, capsys, plant, words) -> None:
    plant(bench)
    monkeypatch.setattr(workbench, "build", lambda config: bench)
    assert selftest.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert all(word in printed.err for word in words), printed.err


@pytest.mark.parametrize("head", ["true", "false"])
def test_windowed_attention_is_refused(tmp_path, photos, capsys, head) -> None:
    sizes = dict(image_size=8, patch_size=2, num_channels=3, embed_dim=8, depths=[2], num_heads=[2], window_size=2)
    config = transformers.SwinConfig(**sizes, num_labels=3)
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
    processor = '{"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}'
    (tmp_path / "swin" / "preprocessor_config.json").write_text(processor)
    assert selftest.main([*own(tmp_path / "swin", photos), f"adapter.train_head={head}"]) == 2
    assert "rows are not records" in capsys.readouterr().err


# ---- what fails


def with_loss(bench, monkeypatch, loss) -> None:
    """The model's loss replaced by loss(batch, each record's own)."""
    forward = bench.model.forward

    def other(batch):
        logits = forward(batch).logits
        each = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return SimpleNamespace(loss=loss(batch, each))

    monkeypatch.setattr(bench.model, "forward", other)


def class_weighted(batch, each):
    weights = 1.0 + batch["labels"]
    return (weights * each).sum() / weights.sum()


def token_mean(batch, each):
    lengths = batch["attention_mask"].sum(1)
    return (lengths * each).sum() / lengths.sum()


def padded(batch, each):
    return each.mean() * batch["input_ids"].shape[1]


@pytest.mark.parametrize("loss", [class_weighted, token_mean, padded])
def test_a_loss_that_mixes_records_fails(monkeypatch, bert, reviews, loss) -> None:  # noqa: F811
    bench = workbench.build(cli.compose(selftest.CONFIGS, own(bert, reviews)))
    assert selftest.independence(bench).ok
    with_loss(bench, monkeypatch, loss)
    found = selftest.independence(bench)
    assert not found.ok and "the loss must be a plain mean over records" in found.detail


def test_hooks_that_miss_scale_a_gradient_fail(bench, monkeypatch, capsys) -> None:
    backward = bounded.backward

    def wrong(*arguments):
        return {name: rows * (4 if arguments[-1] == "grad_sample" else 1) for name, rows in backward(*arguments).items()}

    monkeypatch.setattr(bounded, "backward", wrong)
    assert failed(bench, capsys) == {"per-example gradients"}


def test_shared_passes_with_the_factors_of_another_example_fail(bench, monkeypatch, capsys) -> None:
    give = Rows.give

    def turned(self, factors, scale, spans):
        give(self, {key: array.roll(1, 0) for key, array in factors.items()}, scale, spans)

    monkeypatch.setattr(Rows, "give", turned)
    assert failed(bench, capsys) == {"shared passes"}


def test_shared_passes_with_another_scale_fail(bench, monkeypatch, capsys) -> None:
    give = Rows.give
    monkeypatch.setattr(Rows, "give", lambda self, factors, scale, spans: give(self, factors, 1.01 * scale, spans))
    assert failed(bench, capsys) == {"shared passes"}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_shared_passes_are_tried_without_dropout(small, dropout) -> None:
    found = selftest.shared_passes(workbench.build(small(adapter__dropout=dropout)))
    assert found.ok and "single-example passes" in found.detail


def test_where_passes_cannot_be_shared_it_says_so_and_that_is_no_failure(bench, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench.rows, "refusal", "the reason")
    assert str(selftest.shared_passes(bench)) == "shared passes: ok (there are none, clients train one by one: the reason)"
    assert failed(bench, capsys) == set()


def test_without_clipping_the_bound_fails(bench, monkeypatch, capsys) -> None:
    accumulate = DPOptimizer.clip_and_accumulate

    def unclipped(self):
        self.max_grad_norm, kept = 1e9, self.max_grad_norm
        accumulate(self)
        self.max_grad_norm = kept

    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", unclipped)
    assert failed(bench, capsys) == {"clip bound"}


def test_noise_divided_by_the_batch_fails(bench, monkeypatch, capsys) -> None:
    add = NoisyOptimizer.add_noise

    def less(self):
        self.noise_multiplier /= 8
        add(self)

    monkeypatch.setattr(NoisyOptimizer, "add_noise", less)
    assert failed(bench, capsys) == {"noise"}


@pytest.mark.parametrize("forgotten", ["client", "round"])
def test_a_key_that_is_used_twice_fails(bench, monkeypatch, capsys, forgotten) -> None:
    def same(streams, *rest):
        seed, client, round = streams
        return simulated_key((seed, 0 if forgotten == "client" else client, 0 if forgotten == "round" else round), *rest)

    monkeypatch.setattr("clients.train.simulated_key", same)
    assert failed(bench, capsys) == {"noise"}


def test_empty_batches_without_noise_fail(bench, monkeypatch, capsys) -> None:
    add = NoisyOptimizer.add_noise

    def skip(self):
        self.noise_multiplier *= self.expected_batch_size >= 1
        add(self)

    monkeypatch.setattr(NoisyOptimizer, "add_noise", skip)
    assert failed(bench, capsys) == {"noise"}


def test_weights_that_do_not_move_fail(bench, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: None)
    assert {"movement", "noise"} <= failed(bench, capsys)


def test_a_frozen_factor_that_moves_fails(bench, monkeypatch, capsys) -> None:
    train = selftest.train

    def careless(model, *arguments):
        with torch.no_grad():
            next(iter(model._A.values())).add_(1.0)
        return train(model, *arguments)

    monkeypatch.setattr(selftest, "train", careless)
    assert "movement" in failed(bench, capsys)


def test_the_model_is_left_as_it_was_lent(bench) -> None:
    selftest.sensitivity(bench)
    assert "train" not in vars(bench.model.peft)
    assert not any(getattr(p, "grad_sample", None) is not None for p in bench.model.peft.parameters())
    assert bench.model.peft.train().training
