"""Small model folders, damaged: a run begins with them, or one sentence says why not."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fuzz import damage
from tests.fuzz.commands import standing_in, tried, warm

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "is", "a", "good", "bad", "long", "x")
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert(folder: Path) -> Path:
    """A text classifier of the classes no and yes."""
    import transformers

    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=len(WORDS), id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}, **SIZES)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    """A decoder without a head for classes."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]").save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2Model(config).save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    """An image classifier."""
    import transformers

    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=3, num_labels=10, **SIZES)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"image_std": [0.5] * 3}))
    return folder


def adapter(folder: Path) -> Path:
    """What PEFT saves: no base model."""
    settings = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "nowhere", "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    shutil.copy(folder.parent / "bert" / "model.safetensors", folder / "adapter_model.safetensors")
    return folder


MAKERS = {"bert": bert, "gpt2": gpt2, "vit": vit, "adapter": adapter}
TEXTS = ["dataset=files", "dataset.path=t.csv", "dataset.text=text"]
BASE = ["plan=true", "model=hf", "model.path=model", "clients=2", "engine=inline", "device=cpu", "partition=iid"]


@contextlib.contextmanager
def part(folder: Path) -> Iterator[Callable[[int], Counter[str]]]:
    """The function from a seed to what came of its damage."""
    whole = folder / "whole"
    for name, make in MAKERS.items():
        (whole / name).mkdir(parents=True)
        make(whole / name)
    with standing_in(folder / "work") as here:
        warm()
        (here / "t.csv").write_text("text,label\n" + "a good film,yes\na bad film,no\n" * 8)

        def case(seed: int) -> Counter[str]:
            rng = random.Random(seed)
            name = rng.choice(["bert", "bert", *MAKERS])
            shutil.rmtree(here / "model", ignore_errors=True)
            shutil.copytree(whole / name, here / "model")
            for _ in range(rng.choice((1, 1, 2))):
                damage.file(rng.choice(damage.files(here / "model")), rng)
            return Counter({f"{tried([*BASE, *([] if name == 'vit' else TEXTS)], folder / 'work')} ({name})": 1})

        yield case
