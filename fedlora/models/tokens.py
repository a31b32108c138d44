"""A checkpoint's tokenizer: read, tried on the data's texts, and refused where it would make nonsense of them in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from fedlora.check import ConfigError, reason
from fedlora.data import Examples, labels
from fedlora.models import files
from fedlora.models.encode import Encoded, Texts
from fedlora.models.reading import TOKENIZER, reading

# Files that hold a vocabulary, beside those that the tokenizer's class names.
VOCABULARIES = {"tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "tekken.json", "tiktoken.model"}
SAMPLE = 1000  # texts whose tokens are counted before training


@dataclass(frozen=True)
class Tokens:
    """A tokenizer and what the model takes of it."""

    path: str
    tokenizer: Any
    longest: int  # tokens of a text, the tokenizer's own among them; longer ones are cut
    rows: int  # of the embedding: ids at or above it have none
    one_end: bool = False  # whether the head reads the end token, of which each text must then have the same number

    def encode(self, examples: Examples) -> Encoded:
        """Token ids of every text, cut at `longest`. Raises ConfigError for a text that the model cannot take."""
        texts = texts_of(examples)
        tokens = [np.asarray(row, dtype=np.int64) for row in self.ids(texts)]
        self._refuse(tokens, texts)
        return Texts(torch.from_numpy(examples.labels), tokens, int(self.tokenizer.pad_token_id))

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of every text. Raises ConfigError for one that no tokenizer reads."""
        try:
            found: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=self.longest, padding=False)["input_ids"]
        except Exception as error:  # as varied as tokenizers are
            raise self._unreadable(texts, error) from error
        return found

    def unknown(self, texts: Sequence[str]) -> float:
        """The share of tokens that stand for something that the vocabulary lacks, special tokens left out; of a sample."""
        known = self.tokenizer
        ends = {known.pad_token_id, known.eos_token_id, known.bos_token_id, known.cls_token_id, known.sep_token_id}
        if known.unk_token_id is None or known.unk_token_id in ends:  # GPT-2's is its end token, and it knows every byte
            return 0.0
        chosen = [texts[i] for i in np.unique(np.linspace(0, len(texts) - 1, SAMPLE).astype(int))] if len(texts) else []
        ids = np.concatenate([np.zeros(0, np.int64), *map(np.asarray, self.ids(chosen))])
        ids = ids[~np.isin(ids, [end for end in ends if end is not None])]
        return float((ids == known.unk_token_id).mean()) if len(ids) else 0.0

    def refuse_unknown(self, texts: Sequence[str], most: float) -> None:
        """Raises ConfigError where more than the share `most` of the tokens is unknown."""
        share = self.unknown(texts)
        if share > most:
            raise ConfigError(
                f"model.path={self.path}: its tokenizer does not know {share:.0%} of the tokens of the texts "
                f"({self.tokenizer.unk_token}), above model.max_unknown={most:g}; use a checkpoint for their language and "
                "script, put its own tokenizer's files there, or raise model.max_unknown"
            )

    def _refuse(self, tokens: list[np.ndarray], texts: Sequence[str]) -> None:
        end = self.tokenizer.eos_token_id
        for number, row in enumerate(tokens):
            said = f"text {number + 1} of {len(tokens)} ({labels.cut(texts[number])!a})"
            if not len(row):
                raise ConfigError(f"{said} has no token for model.path={self.path}; remove it from the data")
            if row.max() >= self.rows:
                word = self.tokenizer.convert_ids_to_tokens(int(row.max()))
                raise ConfigError(
                    f"model.path={self.path}: the token {word} of {said} has the id {row.max()}, and the embedding has "
                    f"{self.rows} rows; resize the embedding and save the model, or use the tokenizer that belongs to it"
                )
            if self.one_end and (row == end).sum() != 1:
                raise ConfigError(
                    f"{said} holds the end token {self.tokenizer.eos_token}, by which model.path={self.path} finds what it "
                    "classifies; remove it from the text"
                )

    def _unreadable(self, texts: list[str], error: Exception) -> ConfigError:
        for number, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError:
                return ConfigError(
                    f"text {number + 1} of {len(texts)} ({labels.cut(text)!a}) holds half of a character (a lone surrogate), "
                    "which no tokenizer reads; mend it in the data"
                )
        return ConfigError(f"model.path={self.path}: its tokenizer cannot read the texts ({reason(error)}); {TOKENIZER}")


def read(path: str, at: dict[str, Any], max_length: int, model: nn.Module) -> Tokens:
    """The tokenizer at `path`, of the revision `at`, as `model` takes it; the model is told its padding token.

    Raises ConfigError where it is missing, has no token to pad with, or does not fit the model.
    """
    import transformers

    with reading(path, TOKENIZER):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **at)
    named = set(type(tokenizer).vocab_files_names.values())  # none where a token is a byte
    if named and not files.has(path, named | VOCABULARIES, at):  # then transformers makes a vocabulary of five tokens up
        raise ConfigError(f"model.path={path} has no tokenizer; {TOKENIZER}")
    if tokenizer.pad_token_id is None:  # decoders such as GPT-2 have none; the mask hides what stands there
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"model.path={path}: its tokenizer has neither a padding nor an end token; name one as pad_token in "
                "tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = model.config
    rows = _embedding_rows(model)
    if tokenizer.pad_token_id >= rows:
        raise ConfigError(
            f"model.path={path}: the padding token {tokenizer.pad_token} has the id {tokenizer.pad_token_id}, and the "
            f"embedding has {rows} rows; resize the embedding and save the model, or name another pad_token in "
            "tokenizer_config.json"
        )
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    longest = int(min(max_length, positions(model), tokenizer.model_max_length))
    own = tokenizer.num_special_tokens_to_add()
    if longest <= own:
        raise ConfigError(
            f"model.max_length={max_length} leaves no room beside the {own} tokens that the tokenizer adds; raise it"
        )
    ends = bool(getattr(config, "is_encoder_decoder", False)) and _counts_ends(model)
    return Tokens(path, tokenizer, longest, rows, ends)


def texts_of(examples: Examples) -> list[str]:
    """The texts of examples that are texts."""
    return cast("list[str]", examples.inputs)


def positions(model: nn.Module) -> float:
    """The longest text that the model has positions for; infinity where they are relative."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:  # XLNet says -1
        return float("inf")
    for name, module in model.named_modules():
        if "position" in name and isinstance(module, nn.Embedding) and module.num_embeddings == most:
            return most if module.padding_idx is None else most - module.padding_idx - 1  # RoBERTa counts from there
    return most


def _embedding_rows(model: nn.Module) -> int:
    """Rows of the embedding of tokens."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return len(embedding.weight)


def _counts_ends(model: nn.Module) -> bool:
    """Whether the head reads the end token as BART's and T5's do; T5Gemma's reads the last token that is no padding."""
    return hasattr(model, "classification_head")
