"""Base models and the adapters in them, for the families that users bring: BERT, GPT-2, ViT; text and images."""

import dataclasses
import importlib
import json
import sys
import types

import numpy as np
import pytest
import torch

from fedlora import models
from fedlora.check import ConfigError
from fedlora.config import AdapterConfig, ModelConfig
from fedlora.data import Dataset, Examples
from fedlora.models import export, hf, load, names
from fedlora.models.adapted import AdaptedModel, file_name
from fedlora.models.base import Base
from fedlora.models.encode import Texts
from fedlora.models.vit_digits import FOLDER
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def reviews() -> Dataset:
    train = Examples(["a good film", "bad", "a bad film"], np.array([1, 0, 0]))
    return Dataset("text", ["no", "yes"], train, train)


@pytest.fixture
def photos() -> Dataset:
    rng = np.random.default_rng(0)
    images = [rng.random((12 + i, 10, 3), dtype=np.float32) for i in range(4)]
    examples = Examples(images, np.array([0, 1, 2, 0]))
    return Dataset("image", ["a", "b", "c"], examples, examples)


@pytest.fixture
def bert(tmp_path):
    return tiny.bert(tmp_path)


@pytest.fixture
def vit(tmp_path):
    return tiny.vit(tmp_path)


@pytest.fixture
def gpt2(tmp_path):
    return tiny.gpt2(tmp_path)


def adapted(path, dataset, seed=0, **settings) -> AdaptedModel:
    return AdaptedModel(load(ModelConfig("hf", str(path)), dataset, seed), AdapterConfig(**{"rank": 2} | settings), CPU)


def test_models_are_found_by_themselves() -> None:
    assert {"hf", "vit_digits"} <= set(names())
    assert all(callable(importlib.import_module(f"fedlora.models.{name}").load) for name in names())  # and nothing else is
    with pytest.raises(ConfigError, match=r"model.name=vit_digit is not known; did you mean vit_digits"):
        load(ModelConfig("vit_digit"), Dataset("image", [], None, None), 0)


@pytest.mark.parametrize(("family", "data", "modules"), [
    ("bert", "reviews", ["query", "value"]), ("gpt2", "reviews", ["c_attn"]), ("vit", "photos", ["q_proj", "v_proj"]),
])  # fmt: skip
def test_families_are_adapted_encoded_and_trained(request, family, data, modules) -> None:
    dataset = request.getfixturevalue(data)
    base = load(ModelConfig("hf", str(request.getfixturevalue(family))), dataset, 0)
    model = AdaptedModel(base, AdapterConfig(rank=2), CPU)
    assert model.target_modules == modules
    assert model.trains_head == (family != "vit")  # the ViT was saved with a head for these classes
    encoded = base.encode(dataset.train)
    parameters = model.trainable("AB")
    model.write(model.initial("orthonormal", 0), {})
    out = model.forward(encoded.batch(np.arange(len(encoded)), CPU))
    assert out.logits.shape == (len(dataset.train), len(dataset.classes))
    out.loss.backward()
    assert len(parameters) == 2 * len(model.adapters()) + len(model.dense())
    assert all(torch.isfinite(p.grad).all() for p in parameters)


@pytest.mark.parametrize("init", ["kaiming", "orthonormal", "pissa"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_initial_adapters(request, reviews, family, init) -> None:
    model = adapted(request.getfixturevalue(family), reviews)
    first, again, other = model.initial(init, 0), model.initial(init, 0), model.initial(init, 1)
    for name, (A, B) in first.items():
        assert not B.any() and A.dtype == B.dtype == np.float32
        assert np.array_equal(A, again[name].A)
        assert np.array_equal(A, other[name].A) == (init == "pissa")  # which is a function of W0 alone
        if init == "kaiming":
            assert np.abs(A).max() <= 1 / np.sqrt(A.shape[1])
        if init == "orthonormal":
            np.testing.assert_allclose(A @ A.T, np.eye(2), atol=1e-6)
        if init == "pissa":
            layer = model.peft.get_submodule(name).base_layer
            W0 = layer.weight.detach().numpy() if family == "bert" else layer.weight.detach().numpy().T  # Conv1D: (n, m)
            values, right = np.linalg.svd(W0)[1:]
            np.testing.assert_allclose(A @ A.T, np.diag(values[:2]), atol=1e-5)
            np.testing.assert_allclose(np.abs(A @ right[:2].T), np.diag(np.sqrt(values[:2])), atol=1e-4)


def test_array_names_are_those_of_pefts_file(bert, reviews, tmp_path) -> None:
    from safetensors.numpy import load_file

    from fedlora.arrays import messages

    model = adapted(bert, reviews)
    export.adapter(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    packed = messages.pack(model.adapters(), model.dense())
    assert set(saved) == set(packed)
    assert all(np.array_equal(saved[name], packed[name].numpy()) for name in saved)
    assert file_name("base_model.model.score.modules_to_save.default.weight") == "base_model.model.score.weight"


def test_a_new_head_is_the_same_in_every_process_and_follows_the_seed(bert, reviews) -> None:
    heads = [adapted(bert, reviews, seed).initial_head["base_model.model.classifier.weight"] for seed in (0, 0, 1)]
    assert np.array_equal(heads[0], heads[1]) and not np.array_equal(heads[0], heads[2])


def test_a_new_head_that_stays_frozen_is_saved_with_the_adapter(bert, reviews, tmp_path) -> None:
    from safetensors.numpy import load_file

    model = adapted(bert, reviews, train_head=False)
    assert model.dense() == {} and not model.trains_head
    export.adapter(model, tmp_path / "adapter")
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")


class Own(torch.nn.Module):
    """A model of nobody's format."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.ModuleDict({"hidden": torch.nn.Linear(4, 4)})
        self.head = torch.nn.Linear(4, 2)


def test_a_model_of_ones_own_is_saved_with_its_classes_and_not_merged(reviews, tmp_path, monkeypatch) -> None:
    own = types.SimpleNamespace(load=lambda *_: Base(Own(), encode=Texts, new=["head.weight", "head.bias"]))
    monkeypatch.setitem(sys.modules, "fedlora.models.own", own)
    monkeypatch.setattr(models, "names", lambda: ["own"])
    base = load(ModelConfig("own"), reviews, 0)
    assert base.classes == reviews.classes and base.head == "drawn at random"
    model = AdaptedModel(base, AdapterConfig(rank=2, target_modules=["hidden"]), torch.device("cpu"))
    export.adapter(model, tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text()) == reviews.classes
    with pytest.raises(ConfigError, match=r"save_merged=true is for models of transformers"):
        export.refuse_merging(model)


def test_a_head_for_another_number_of_classes_is_replaced(vit, photos) -> None:
    four = dataclasses.replace(photos, classes=["a", "b", "c", "d"])
    model = adapted(vit, four)
    assert model.trains_head and model.initial_head["base_model.model.classifier.weight"].shape == (4, 16)


def test_text_is_padded_to_the_longest_of_its_batch_only(bert, reviews) -> None:
    encoded = load(ModelConfig("hf", str(bert)), reviews, 0).encode(reviews.train)
    assert isinstance(encoded, Texts)
    assert encoded.batch(np.array([1]), CPU)["input_ids"].shape == (1, 3)  # [CLS] bad [SEP]
    both = encoded.batch(np.array([0, 1]), CPU)
    assert both["input_ids"].shape == (2, 5) and both["attention_mask"].sum(1).tolist() == [5, 3]
    short = load(ModelConfig("hf", str(bert), max_length=4), reviews, 0).encode(reviews.train)
    assert short.batch(np.array([0]), CPU)["input_ids"].shape == (1, 4)


@pytest.mark.parametrize(("channels_in", "channels_out"), [(1, 3), (3, 1), (4, 3), (3, 3)])
def test_images_get_the_channels_that_the_model_reads(channels_in, channels_out) -> None:
    image = np.random.default_rng(0).random((5, 5, channels_in), dtype=np.float32)
    turned = hf._to_channels(image, channels_out)
    assert turned.shape == (5, 5, channels_out)
    expected = image[..., :3].mean(2) if channels_in > 1 and channels_out == 1 else image[..., 0]
    np.testing.assert_allclose(turned[..., 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("base", "adapter", "equal"), [(False, 0.0, True), (True, 0.0, False), (False, 0.5, False)])
@pytest.mark.parametrize("settings", [{}, {"train_head": False}], ids=str)
def test_which_dropout_acts_in_training(bert, reviews, base, adapter, equal, settings) -> None:
    loaded = load(ModelConfig("hf", str(bert), dropout=base), reviews, 0)
    assert loaded.model.config.hidden_dropout_prob == 0.1
    model, batch = AdaptedModel(loaded, AdapterConfig(rank=2, dropout=adapter, **settings), CPU), loaded.encode(reviews.train)
    model.write({name: pair._replace(B=pair.B + 1) for name, pair in model.initial("kaiming", 0).items()}, {})
    model.trainable("AB")
    modes = {}
    for mode in (model.train_mode, lambda: model.train_mode(dropout=False), model.peft.eval):
        mode()
        one, other = (model.forward(batch.batch(np.arange(3), CPU)).logits for _ in range(2))
        modes[mode] = torch.equal(one, other)
    assert list(modes.values()) == [equal, True, True]


@pytest.mark.parametrize("acts", ["base", "adapters"])
def test_dropout_of_base_and_adapters_act_side_by_side(bert, reviews, acts) -> None:
    loaded = load(ModelConfig("hf", str(bert), dropout=True), reviews, 0)
    model = AdaptedModel(loaded, AdapterConfig(rank=2, dropout=0.5), CPU)
    model.trainable("AB")
    model.train_mode()
    dropouts = {name: module for name, module in model.peft.named_modules() if isinstance(module, torch.nn.Dropout)}
    chosen = [module for name, module in dropouts.items() if ("lora_dropout" in name) == (acts == "adapters")]
    assert len(chosen) >= 4 and all(module.training and module.p in (0.1, 0.5) for module in chosen)


@pytest.mark.parametrize(("settings", "words"), [
    ({"target_modules": ["qurey"]}, ["adapter.target_modules=qurey", "did you mean query?", "key"]),
    ({"target_modules": ["embeddings"]}, ["adapter.target_modules=embeddings", "there are:", "query"]),
])  # fmt: skip
def test_modules_that_match_nothing_are_refused_with_the_names_there_are(bert, reviews, settings, words) -> None:
    with pytest.raises(ConfigError) as error:
        adapted(bert, reviews, **settings)
    assert all(word in str(error.value) for word in words)


def test_the_embedded_checkpoint_is_small_and_refuses_other_data(reviews) -> None:
    assert (FOLDER / "model.safetensors").stat().st_size < 1_000_000
    with pytest.raises(ConfigError, match="model=vit_digits reads 8 × 8 grey digits only"):
        load(ModelConfig(), reviews, 0)


def test_a_folder_without_weights_and_a_name_without_a_model_are_refused(bert, reviews) -> None:
    (bert / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model.path=.* cannot be loaded .*model.safetensors"):
        load(ModelConfig("hf", str(bert)), reviews, 0)
