"""Small model folders with random weights, as users have them: weights, configuration, and tokenizer or image processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a"]
SIZES: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


def named(classes: Sequence[str]) -> dict[str, Any]:
    """The settings of a configuration that name the classes of a head."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def bert(folder: Path, classes: Sequence[str] = (), words: Sequence[str] = VOCABULARY) -> Path:
    """An encoder; with classes, a head for them."""
    import transformers

    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=len(words), **SIZES, **named(classes) if classes else {})
    made = transformers.BertForSequenceClassification if classes else transformers.BertModel
    made(config).save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    """A decoder of 32 positions without a head for classes, and without a padding token."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]").save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=len(VOCABULARY), n_embd=16, n_layer=2, n_head=2, n_positions=32)
    transformers.GPT2Model(config).save_pretrained(folder)
    return folder


def vit(folder: Path, classes: int = 3) -> Path:
    """A classifier of images of 8 × 8 pixels in three channels."""
    import transformers

    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=3, num_labels=classes, **SIZES)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"image_std": [0.5] * 3}))
    return folder
