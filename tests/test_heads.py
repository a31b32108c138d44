# ruff: noqa: F811 (fixtures)
"""A checkpoint's own head and the dataset's classes: matched by name, else refused with the setting that decides."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from fedlora import models
from fedlora.check import ConfigError
from fedlora.compute import evaluate
from fedlora.config import AdapterConfig, ModelConfig
from fedlora.data import Dataset, Examples
from fedlora.models import heads
from fedlora.models.adapted import AdaptedModel
from fedlora.validate import from_json
from tests.test_models import CPU, bert  # noqa: F401 (fixtures)
from tests.tiny import SIZES, VOCABULARY

TEXTS = ["good", "bad", "film", "a good film", "bad film"]


@pytest.fixture
def classifier(bert):
    """A maker of a BERT with a head for these classes, and of its own answers to TEXTS."""

    def make(names, **settings):
        config = transformers.BertConfig(vocab_size=len(VOCABULARY), num_labels=len(names), **SIZES, **settings)
        if any(names):
            config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter)  # so that texts get different answers
        model.save_pretrained(bert)
        tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
        with torch.no_grad():
            return [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in TEXTS]

    return make


def reviews(classes, labels) -> Dataset:
    examples = Examples(TEXTS, np.array(labels))
    return Dataset("text", list(classes), examples, examples)


def accuracy(path, dataset, **settings) -> float:
    """Before any training."""
    base = models.load(ModelConfig("hf", str(path), **settings), dataset, 0)
    model = AdaptedModel(base, AdapterConfig(rank=2), CPU)
    return evaluate.evaluate(model, base.encode(dataset.test), np.arange(len(TEXTS)), 8)["accuracy"]


@pytest.mark.parametrize("own", [["pos", "neg", "neutral"], [" Pos", "NEG ", "Neutral"], ["neg", "neutral", "pos"]], ids=str)
def test_a_head_is_matched_by_name_whatever_the_order_case_and_spaces(bert, classifier, own) -> None:
    answers, classes = classifier(own), ["neg", "neutral", "pos"]
    data = reviews(classes, [classes.index(own[answer].strip().casefold()) for answer in answers])
    assert len(set(answers)) > 1
    assert accuracy(bert, data) == 1.0
    base = models.load(ModelConfig("hf", str(bert)), data, 0)
    assert base.new == [] and base.head.startswith("the checkpoint has one")
    assert [base.model.config.id2label[i] for i in range(3)] == base.classes == [name.strip().casefold() for name in own]


@pytest.mark.parametrize(("own", "classes"), [
    (["NEGATIVE", "POSITIVE"], ["0", "1"]),
    (["pos", "neg"], ["good", "bad"]),
    (["neg", "neutral", "pos"], ["neg", "pos"]),
])  # fmt: skip
def test_a_head_for_other_classes_is_refused_with_the_settings_that_decide(bert, classifier, own, classes) -> None:
    classifier(own)
    with pytest.raises(ConfigError) as error:
        models.load(ModelConfig("hf", str(bert)), reviews(classes, [0] * 5), 0)
    said = str(error.value)
    assert ", ".join(own) in said and ", ".join(classes) in said and "draw a new head by model.head=new" in said
    assert ("model.head=position" in said) == ("model.head={" in said) == (len(own) == len(classes))


def test_no_map_is_proposed_that_cannot_be_typed(bert, classifier) -> None:
    classifier(["gut", "schlecht, öde"])
    with pytest.raises(ConfigError) as error:
        models.load(ModelConfig("hf", str(bert)), reviews(["0", "1"], [0] * 5), 0)
    said = str(error.value)
    assert "gut, 'schlecht, öde'" in said and "model.head=position" in said and "model.head={" not in said


def test_a_map_and_the_position_say_what_the_heads_classes_are(bert, classifier) -> None:
    answers = classifier(["NEGATIVE", "POSITIVE"])
    assert accuracy(bert, reviews(["0", "1"], answers), head={"NEGATIVE": 0, "POSITIVE": 1}) == 1.0
    assert accuracy(bert, reviews(["0", "1"], [1 - a for a in answers]), head={"NEGATIVE": 1, "POSITIVE": 0}) == 1.0
    assert accuracy(bert, reviews(["0", "1"], answers), head="position") == 1.0


def test_a_new_head_is_drawn_by_the_seed_and_trained(bert, classifier) -> None:
    classifier(["NEGATIVE", "POSITIVE"])
    data = reviews(["0", "1"], [0, 1, 0, 1, 0])
    drawn = [models.load(ModelConfig("hf", str(bert), head="new"), data, seed) for seed in (0, 0, 1)]
    weights = [base.model.classifier.weight for base in drawn]
    assert drawn[0].new == ["classifier.bias", "classifier.weight"]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    kept = models.load(ModelConfig("hf", str(bert), head="position"), data, 0).model
    assert not torch.equal(weights[0], kept.classifier.weight)
    assert torch.equal(drawn[0].model.bert.embeddings.word_embeddings.weight, kept.bert.embeddings.word_embeddings.weight)


def test_a_head_without_names_is_taken_by_number_or_position_and_the_plan_says_so(bert, classifier) -> None:
    answers = classifier(["", ""])
    assert accuracy(bert, reviews(["1", "0"], [1 - a for a in answers])) == 1.0  # LABEL_1 is the class 1
    named = reviews(["no", "yes"], answers)
    assert accuracy(bert, named) == 1.0
    assert "without names; its classes are taken as no, yes" in models.load(ModelConfig("hf", str(bert)), named, 0).head


def test_a_head_for_another_task_is_replaced(bert, classifier) -> None:
    classifier([f"animal {i}" for i in range(5)])
    base = models.load(ModelConfig("hf", str(bert)), reviews(["no", "yes"], [0] * 5), 0)
    assert base.head == heads.NONE and base.new == ["classifier.bias", "classifier.weight"]


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_head_for_several_labels_or_for_numbers_is_refused(bert, classifier, problem) -> None:
    classifier(["no", "yes"] if "multi" in problem else ["score"], problem_type=problem)
    data = reviews(["no", "yes"], [0, 1, 0, 1, 0])
    with pytest.raises(ConfigError, match=f"has a head for {problem}.*draw a new head by model.head=new"):
        models.load(ModelConfig("hf", str(bert)), data, 0)
    assert 0 <= accuracy(bert, data, head="new") <= 1
    base = models.load(ModelConfig("hf", str(bert), head="new"), data, 0)
    assert base.model(**base.encode(data.train).batch(np.arange(5), CPU)).loss.dim() == 0


@pytest.mark.parametrize(("head", "words"), [
    ("postion", "model.head=postion is not known; did you mean position"),
    ({"NEGATVE": "no", "POSITIVE": "yes"}, "names the class NEGATVE, which its head has not; did you mean NEGATIVE"),
    ({"NEGATIVE": "no", "POSITIVE": "yse"}, "names the class yse, which the data have not; did you mean yes"),
    ({"NEGATIVE": "no", "POSITIVE": "no"}, "must give each class"),
    ({"NEGATIVE": "no"}, "must give each class"),
])  # fmt: skip
def test_a_setting_that_does_not_fit_is_refused(bert, classifier, head, words) -> None:
    classifier(["NEGATIVE", "POSITIVE"])
    with pytest.raises(ConfigError, match=words):
        models.load(ModelConfig("hf", str(bert), head=head), reviews(["no", "yes"], [0] * 5), 0)


def test_a_map_for_a_checkpoint_without_a_head_is_refused(bert) -> None:
    for head in ("position", {"a": "no", "b": "yes"}):
        with pytest.raises(ConfigError, match=r"but it has none; leave model.head out"):
            models.load(ModelConfig("hf", str(bert), head=head), reviews(["no", "yes"], [0] * 5), 0)


def test_a_map_travels_as_text(small) -> None:
    config = small(model__head={"a": 0, 1: "b"})
    assert dataclasses.asdict(from_json(config.to_json()).model)["head"] == {"a": "0", "1": "b"}
