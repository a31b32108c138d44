# ruff: noqa: F811 (fixtures)
"""What users bring as model.path, and what a run leaves there: used as it is meant, or refused in one sentence."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
import transformers

from fedlora import models
from fedlora.check import ConfigError
from fedlora.compute import evaluate
from fedlora.config import AdapterConfig, ModelConfig
from fedlora.data import Dataset, Examples
from fedlora.models import export
from fedlora.models.adapted import AdaptedModel
from fedlora.models.trial import tried
from fedlora.models.vit_digits import FOLDER
from tests.test_cohort import factors
from tests.test_models import CPU, bert, gpt2, photos, reviews, vit  # noqa: F401 (fixtures)
from tests.tiny import SIZES, VOCABULARY


def load(path, dataset, **settings):
    return models.load(ModelConfig("hf", str(path), **settings), dataset, 0)


def adapted(path, dataset, **settings) -> AdaptedModel:
    return AdaptedModel(load(path, dataset), AdapterConfig(**{"rank": 2} | settings), CPU)


def texts(*inputs, classes=("no", "yes")) -> Dataset:
    examples = Examples(list(inputs), np.arange(len(inputs)) % len(classes))
    return Dataset("text", list(classes), examples, examples)


def logits(model: AdaptedModel, dataset: Dataset) -> torch.Tensor:
    encoded = model.base.encode(dataset.train)
    return evaluate.predict(model, encoded, np.arange(len(encoded)), 8)


# ---- the tokenizer


def test_a_folder_without_a_tokenizer_is_refused(bert, reviews) -> None:
    for file in bert.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer; it needs the tokenizer's files beside the model"):
        load(bert, reviews)


def test_texts_that_the_tokenizer_does_not_know_are_refused_with_their_share(bert) -> None:
    strange = texts("a good film", "cinéma bon a film")
    with pytest.raises(ConfigError, match=r"does not know 29% of the tokens of the texts \(\[UNK\]\).*model.max_unknown=0.05"):
        load(bert, strange)
    load(bert, strange, max_unknown=0.3)


def test_a_padding_or_an_added_token_beyond_the_embedding_is_refused(bert, reviews) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.add_tokens(["wow"])
    tokenizer.save_pretrained(bert)
    load(bert, reviews).encode(reviews.train)
    with pytest.raises(ConfigError, match=r"the token wow of text 2 of 2 \('wow'\) has the id 9, and the embedding has 9 rows"):
        load(bert, texts("good", "wow")).encode(texts("good", "wow").train)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(bert)
    with pytest.raises(ConfigError, match=r"the padding token <new> has the id 10, and the embedding has 9 rows"):
        load(bert, reviews)


def test_a_tokenizer_with_neither_padding_nor_end_is_refused(gpt2, reviews) -> None:
    config = json.loads((gpt2 / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (gpt2 / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"neither a padding nor an end token; name one as pad_token"):
        load(gpt2, reviews)


def test_half_a_character_is_refused_by_the_number_of_its_text(bert) -> None:
    with pytest.raises(ConfigError, match=r"text 2 of 2 \('a \\ud83d'\) holds half of a character"):
        load(bert, texts("good", "a \ud83d"))


def test_a_text_without_a_token_is_refused_by_its_number(gpt2) -> None:
    empty = texts("good", "")
    with pytest.raises(ConfigError, match=r"text 2 of 2 \(''\) has no token"):
        load(gpt2, empty).encode(empty.train)


def test_a_length_without_room_for_text_is_refused(bert, reviews) -> None:
    with pytest.raises(ConfigError, match=r"model.max_length=2 leaves no room beside the 2 tokens"):
        load(bert, reviews, max_length=2)


@pytest.mark.parametrize("mean", [[0.5, [0.5], 0.5], [0.5, {}, 0.5]])
def test_an_image_processor_with_nonsense_in_it_is_one_sentence(vit, photos, mean) -> None:
    file = vit / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": mean}))
    with pytest.raises(ConfigError, match=r"its preprocessor_config.json prepares no image \(.+\); fetch or save it again"):
        load(vit, photos).encode(photos.train)


# ---- positions, and models that read an end token


@pytest.mark.parametrize(("family", "most"), [("roberta", 30), ("xlnet", 128), ("bert", 32)])
def test_a_long_text_is_cut_to_the_positions_that_the_model_has(bert, family, most) -> None:
    long = texts("good " * 200, "bad film")
    many = dict(vocab_size=len(VOCABULARY), max_position_embeddings=32, pad_token_id=0 if family != "roberta" else 1)
    if family == "xlnet":
        config = transformers.XLNetConfig(vocab_size=len(VOCABULARY), d_model=16, n_layer=1, n_head=2, d_inner=32)
        transformers.XLNetModel(config).save_pretrained(bert)
    elif family == "roberta":  # counts positions from its padding token's id on
        transformers.RobertaModel(transformers.RobertaConfig(**many, **SIZES)).save_pretrained(bert)
        tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(["[UNK]", "[PAD]", *VOCABULARY[2:]])})
        tokenizer.save_pretrained(bert)
    else:
        transformers.BertModel(transformers.BertConfig(**many, **SIZES)).save_pretrained(bert)
    base = load(bert, long)
    encoded = base.encode(long.train)
    assert encoded.lengths()[0] == most
    tried(AdaptedModel(base, AdapterConfig(rank=2, target_modules=[] if family != "xlnet" else ["layer_1"]), CPU), long)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_end_token_inside_a_text_is_refused_where_the_head_reads_it(tmp_path, family) -> None:
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as kinds

    words = Tokenizer(kinds.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    ends = {"eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends).save_pretrained(tmp_path)
    tokens = dict(vocab_size=len(VOCABULARY), pad_token_id=0, eos_token_id=3, decoder_start_token_id=0)
    if family == "bart":
        sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in
                 (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
        config = transformers.BartConfig(d_model=16, max_position_embeddings=32, bos_token_id=2, **sizes, **tokens)
        transformers.BartModel(config).save_pretrained(tmp_path)
    else:
        config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **tokens)
        transformers.T5Model(config).save_pretrained(tmp_path)
    fine, wrong = texts("a good film", "bad"), texts("a [SEP] film", "bad")
    targets = ["q_proj", "v_proj"] if family == "bart" else ["q", "v"]
    tried(AdaptedModel(load(tmp_path, fine), AdapterConfig(rank=2, target_modules=targets), CPU), fine)
    with pytest.raises(ConfigError, match=r"text 1 of 2 \('a \[SEP\] film'\) holds the end token \[SEP\]"):
        load(tmp_path, wrong).encode(wrong.train)


def test_what_a_model_raises_in_its_first_pass_is_one_sentence(bert, reviews, monkeypatch) -> None:
    model = adapted(bert, reviews)
    monkeypatch.setattr(model, "forward", lambda batch: {}["positions"])
    with pytest.raises(ConfigError, match=r"cannot take examples of 3 and 5 tokens \('positions'\); lower model.max_length"):
        tried(model, reviews)


# ---- files


@pytest.mark.parametrize(("name", "content", "words"), [
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", r"is a pointer of Git LFS"),
    ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", r"is a pointer of Git LFS"),
    ("model.safetensors", None, r"model.safetensors is cut off or damaged .*; fetch or save it again"),
    ("config.json", b"{", r"cannot be loaded"),
    ("tokenizer.json", b"{", r"cannot be loaded .*; it needs the tokenizer's files"),
])  # fmt: skip
def test_a_damaged_file_is_one_sentence_with_its_name(bert, reviews, name, content, words) -> None:
    file = bert / name
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ConfigError, match=words) as error:
        load(bert, reviews)
    assert "\n" not in str(error.value)


def test_data_of_the_other_kind_are_refused(bert) -> None:
    image = Examples(np.zeros((2, 8, 8, 3), np.float32), np.array([0, 1]))
    with pytest.raises(ConfigError, match=r"is of the type bert, for which transformers has no ImageClassification"):
        load(bert, Dataset("image", ["a", "b"], image, image))


# ---- what a run leaves behind


def test_what_is_saved_is_used_elsewhere_with_the_same_answers(bert, reviews, tmp_path, capfd) -> None:
    model = adapted(bert, reviews)
    model.write(factors(model), {name: array + 1 for name, array in model.initial_head.items()})
    expected = logits(model, reviews)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    capfd.readouterr()
    export.adapter(model, adapter)
    export.merged(model, merged)
    assert "Writing model shards" not in capfd.readouterr().err
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS" and saved["base_model_name_or_path"] == str(bert)
    assert not (adapter / "README.md").exists() and (adapter / "labels.json").read_text() == '["no", "yes"]\n'
    assert (adapter / "tokenizer.json").exists() and (merged / "tokenizer.json").exists()

    for again in (merged, adapter):
        torch.testing.assert_close(logits(adapted(again, reviews), reviews), expected, rtol=1e-4, atol=1e-5)
        assert load(again, reviews).head == "the checkpoint has one" and not load(again, reviews).new
    guesses = [["no", "yes"][int(row.argmax())] for row in expected]
    pipeline = transformers.pipeline("text-classification", model=str(merged), device="cpu")
    assert [answer["label"] for answer in pipeline(reviews.train.inputs)] == guesses
    auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(adapter)).eval()
    batch = model.base.encode(reviews.train).batch(np.arange(3), CPU)
    with torch.no_grad():
        found = auto(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_for_more_classes_than_its_base_and_an_adapter_on_an_adapter(bert, tmp_path) -> None:
    three = texts("a good film", "bad", "film", classes=("a", "b", "c"))
    model = adapted(bert, three)
    model.write(factors(model), {})
    export.adapter(model, tmp_path / "first")
    second = adapted(tmp_path / "first", three)
    torch.testing.assert_close(logits(second, three), logits(model, three), rtol=1e-4, atol=1e-5)
    second.write(factors(second, 1), {})
    export.adapter(second, tmp_path / "second")
    torch.testing.assert_close(logits(adapted(tmp_path / "second", three), three), logits(second, three), rtol=1e-4, atol=1e-5)


def test_somebody_elses_adapter_brings_its_own_head(bert, tmp_path, reviews) -> None:
    own = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    made = peft.get_peft_model(own, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    made.save_pretrained(tmp_path / "adapter")
    three = texts("a good film", "bad", "film", classes=("a", "b", "c"))
    base = load(tmp_path / "adapter", three)
    assert not base.new and torch.equal(base.model.classifier.weight, own.classifier.modules_to_save["default"].weight)
    assert load(tmp_path / "adapter", reviews).new == ["classifier.bias", "classifier.weight"]  # another number of classes


def test_an_adapter_whose_base_is_gone_or_that_cannot_be_merged_is_refused(bert, reviews, tmp_path) -> None:
    own = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    prompts = peft.get_peft_model(own, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    prompts.save_pretrained(tmp_path / "prompts")
    with pytest.raises(ConfigError, match=r"an adapter of the kind PROMPT_TUNING, which cannot be merged; use model.path="):
        load(tmp_path / "prompts", reviews)
    export.adapter(adapted(bert, reviews), tmp_path / "adapter")
    bert.rename(tmp_path / "gone") if bert != tmp_path else (bert / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"is an adapter of .*, which cannot be loaded; put it there"):
        load(tmp_path / "adapter", reviews)


def test_the_digits_model_is_saved_so_that_model_hf_loads_the_same(tmp_path) -> None:
    rng = np.random.default_rng(0)
    examples = Examples(rng.random((10, 8, 8, 1), dtype=np.float32), np.arange(10))
    digits = Dataset("image", [str(i) for i in range(10)], examples, examples)
    model = AdaptedModel(models.load(ModelConfig(), digits, 0), AdapterConfig(rank=2), CPU)
    model.write(factors(model), {})
    export.adapter(model, tmp_path / "adapter")
    export.merged(model, tmp_path / "merged")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(FOLDER)
    for folder in ("adapter", "merged"):
        again = adapted(tmp_path / folder, digits)
        torch.testing.assert_close(logits(again, digits), logits(model, digits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.Linear])
def test_a_layernorm_without_bias_is_refused_under_privacy_with_the_cure(kind) -> None:
    """ModernBERT's head has one. Opacus takes a linear layer without bias."""
    from fedlora.privacy.refusals import unsupported

    module = kind(4, bias=False) if kind is torch.nn.LayerNorm else kind(4, 4, bias=False)
    said = unsupported(module)
    assert ("LayerNorm without bias" in said and "adapter.train_head=false" in said) == (kind is torch.nn.LayerNorm)
    assert unsupported(torch.nn.LayerNorm(4)) == ""
