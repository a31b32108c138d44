# ruff: noqa: F811 (fixtures)
"""Of the last block only what the head reads is computed: nothing that is read changes, forward or back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from fedlora.compute import readout
from fedlora.compute.prefix import blocks
from fedlora.compute.readout import Readout
from fedlora.compute.rows import Rows
from fedlora.models.encode import Texts
from tests.test_cohort import albert, data, factors, family, llama, make, seeded  # noqa: F401 (fixtures)
from tests.test_models import CPU, bert, gpt2, vit  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("one_thread")


def names(found: Readout) -> list[str]:
    known = {module: name for name, module in found.block.named_modules()}
    return [known[layer] for layer in found.layers]


@pytest.mark.parametrize(
    "family, place, layers, alone",
    [
        ("bert", readout.first, ["attention.output.dense", "intermediate.dense", "output.dense"], True),
        ("vit", readout.first, ["attention.o_proj", "mlp.fc1", "mlp.fc2"], True),
        ("gpt2", readout.last_but_padding, ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"], False),
        ("llama", readout.last_but_padding, ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], False),
        ("albert", None, [], False),  # its one block is gone through twice
    ],
)
def test_what_follows_the_attention_of_the_last_block_is_computed_where_the_head_reads(make, place, layers, alone) -> None:
    model, examples = make()
    found = Readout(model, examples)
    assert names(found) == layers
    assert found.asks_alone == alone
    if layers:
        assert getattr(found.place, "func", found.place) is place


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
def test_logits_and_gradients_are_those_of_the_whole_block(make) -> None:
    model, examples = make()
    model.write(factors(model), {})
    batch = examples.batch(np.array([3, 8, 0, 31]), model.device)  # texts of four lengths, padded
    found, results, seen = Readout(model, examples), [], []
    hook = found.layers[0].register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    for layers, alone in ((found.layers, found.asks_alone), ([], False)):
        found.layers, found.asks_alone = layers, alone
        parameters = model.trainable("AB")
        with found.installed():
            found.batch = batch
            output = model.forward(batch)
        output.loss.backward()
        results.append([output.logits.detach()] + [parameter.grad.clone() for parameter in parameters])
    hook.remove()
    assert seen[0] == 1 < seen[1]
    for cut, whole in zip(*results, strict=True):
        assert whole.abs().max() > 1e-4
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(found.block)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "texts", [["good [SEP]", "a bad film"], ["[SEP]", "good [SEP] [SEP]"], ["a [SEP] film", "bad"]], ids=str
)
def test_a_text_that_ends_in_the_padding_token_is_read_where_the_model_reads_it(make, texts) -> None:
    """The tokenizer's end token is its padding token too, and the model's own rule leaves it out at the end of a text."""
    model, examples = make()
    model.write(factors(model), {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.base.source)
    rows = [np.array(tokenizer(text)["input_ids"]) for text in texts]
    assert any(row[-1] == examples.padding for row in rows) or texts[0] == "a [SEP] film"
    asked = Texts(torch.zeros(len(rows), dtype=torch.long), rows, examples.padding)
    shared = Rows(model, examples)
    assert shared.refusal == "" and shared.readout.layers
    factors_of = {(n, f): array for n, pair in model.adapters().items() for f, array in pair._asdict().items()}
    factors_of |= {(name, ""): array for name, array in model.dense().items()}
    copies = {key: torch.from_numpy(array).expand(len(rows), *array.shape) for key, array in factors_of.items()}
    with torch.no_grad():
        with shared.installed():
            shared.give(copies, model.scale, ())
            together = shared.logits(asked.batch(np.arange(len(rows)), CPU))
        alone = [model.forward(asked.batch(np.array([i]), CPU)).logits[0] for i in range(len(rows))]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_a_head_that_reads_all_positions_is_left_alone(make, monkeypatch) -> None:
    model, examples = make()
    pooler = next(module for name, module in model.peft.named_modules() if name.endswith("pooler"))
    monkeypatch.setattr(pooler, "forward", lambda hidden: pooler.activation(pooler.dense(hidden.mean(1))))
    found = Readout(model, examples)
    assert not found.layers and not found.asks_alone


def test_a_layer_that_mixes_positions_is_not_cut(make, monkeypatch) -> None:
    model, examples = make()
    dense = blocks(model)[0][-1].intermediate.dense
    usual = dense.forward
    monkeypatch.setattr(dense, "forward", lambda x: usual(x - x.mean(1, keepdim=True) / 10))
    assert names(Readout(model, examples)) == ["output.dense"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_not_drawn_for_fewer_positions(make, dropout) -> None:
    model, examples = make(target_modules=["query", "intermediate.dense"], dropout=dropout)
    cut = names(Rows(model, examples).readout)
    assert ("intermediate.dense" in cut) == (not dropout)
    assert "output.dense" in cut and not any("base_layer" in name or "lora" in name for name in cut)
