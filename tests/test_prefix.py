"""What is kept of the blocks below the adapters: the numbers are those without it, bounded, computed once."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from clients.train import perform
from fedlora.app import experiment, report
from fedlora.check import ConfigError
from fedlora.compute import workbench
from fedlora.compute.evaluate import predict
from fedlora.compute.prefix import NEIGHBOURS, Kept, Prefix
from fedlora.config import AdapterConfig, ModelConfig
from fedlora.data import Dataset, Examples
from fedlora.models import export, load
from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import PREFIX, Encoded
from fedlora.tools import cli
from tests.conftest import ROOT
from tests.test_cohort import (  # noqa: F401 (fixtures)
    STEPS,
    alone,
    assert_same,
    bert,
    either,
    factors,
    gpt2,
    llama,
    members,
    sharpen,
    together,
    vit,
)
from tests.test_models import CPU
from tests.tiny import SIZES, VOCABULARY

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS, COUNT = 4, NEIGHBOURS + 12  # a whole neighbourhood, and a part of one
ROOMY = 1e9
families = pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])


@pytest.fixture
def family() -> str:
    return "bert"


@pytest.fixture
def data(family) -> Dataset:
    """Texts of one to nine words, or images."""
    rng = np.random.default_rng(0)
    if family == "vit":
        examples = Examples([rng.random((8, 8, 3), dtype=np.float32) for _ in range(COUNT)], rng.integers(0, 3, COUNT))
        return Dataset("image", ["a", "b", "c"], examples, examples)
    examples = Examples([" ".join(rng.choice(VOCABULARY[5:], 1 + k % 9)) for k in range(COUNT)], rng.integers(0, 2, COUNT))
    return Dataset("text", ["no", "yes"], examples, examples)


@pytest.fixture
def make(request, family, data):
    """A maker of (model with a prefix, plain examples); the base has `BLOCKS` blocks and is always the same one."""
    folder = request.getfixturevalue(family)
    deeper(folder, num_hidden_layers=BLOCKS)

    def made(model=(), base=(), **adapter) -> tuple[AdaptedModel, Encoded]:
        loaded = dataclasses.replace(load(ModelConfig("hf", str(folder), **dict(model)), data, 0), **dict(base))
        loaded.model.apply(sharpen)
        adapted = AdaptedModel(loaded, AdapterConfig(**{"rank": 3, "layers": [-1], "train_head": True} | adapter), CPU)
        adapted.prefix = Prefix(adapted)
        return adapted, loaded.encode(data.train)

    return made


def deeper(folder, **settings) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)


def kept(model: AdaptedModel, examples: Encoded, limit: float = ROOMY) -> Kept:
    found = model.prefix.kept(examples, limit)
    assert isinstance(found, Kept) and not model.prefix.refusal, model.prefix.refusal
    return found


def logits(model: AdaptedModel, examples: Encoded, indices=range(5)) -> torch.Tensor:
    return predict(model, examples, np.array(indices), 64)


# ---- the same numbers


@families
@pytest.mark.parametrize(("layers", "first"), [([-1], 3), ([2, 3], 2), ([-3, 3], 1)])
@either
def test_training_is_that_without_a_prefix(make, family, layers, first, mechanism) -> None:
    model, examples = make(layers=layers, dropout=0.2)
    ours = kept(model, examples)
    assert model.prefix.first == first
    team = members(model, [40, 2], dataclasses.replace(STEPS, steps=2), mechanism=mechanism)
    fused = together(model, ours, team)
    for member, joint in zip(team, fused, strict=True):
        usual = alone(model, examples, member)
        assert_same(alone(model, ours, member), usual, member)
        assert_same(joint, usual, member)
    model.write(team[0].adapters, team[0].dense)
    torch.testing.assert_close(logits(model, ours, range(COUNT)), logits(model, examples, range(COUNT)), rtol=1e-5, atol=1e-5)


@families
def test_hidden_states_are_padded_to_the_longest_of_their_batch(make, family) -> None:
    model, examples = make()
    ours, indices = kept(model, examples), np.array([9, 0, 70])  # one word each, and eight
    batch = ours.batch(indices, CPU)
    assert batch.keys() - examples.batch(indices, CPU).keys() == {PREFIX}
    with torch.no_grad():
        whole = model.prefix.hidden(examples.batch(indices, CPU))
    lengths = examples.lengths()
    for row, full, length in zip(batch[PREFIX], whole, lengths[indices] if lengths is not None else [None] * 3, strict=True):
        torch.testing.assert_close(row[:length], full[:length], rtol=1e-5, atol=1e-5)
        assert length is None or not row[length:].any()
    assert batch[PREFIX].shape == whole.shape
    assert PREFIX not in ours.batch(np.array([], np.int64), CPU)


def test_a_whole_run_is_that_without_a_prefix(small) -> None:
    runs = []
    for limit in (0.0, 1.0):
        config = small(engine__prefix_cache=limit, adapter__layers=[-2, -1], name=f"limit{limit}")
        bench = workbench.build(config)
        assert isinstance(bench.train, Kept) == isinstance(bench.test, Kept) == bool(limit)
        experiment.run(config, 0.0)
        runs.append(report.read_rounds(Path(config.results, config.name)))
    for key in ("loss", "accuracy", "client_loss"):
        without, ours = ([row[key] for row in rows if key in row] for rows in runs)
        assert ours == pytest.approx(without, abs=1e-5) and without[0] != without[-1]


# ---- what is kept


@families
def test_what_is_kept_does_not_depend_on_the_order_of_asking(make, family) -> None:
    model, examples = make()
    orders = [[[5, 3], [70, 1]], [[70], [1, 2, 66, 5], [3], [5, 3], [70, 1]]]
    one, other = ([kept(model, examples).batch(np.array(i), CPU)[PREFIX] for i in order][-2:] for order in orders)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def stored(examples: Kept) -> int:
    """The bytes that are held, each storage once and whole."""
    rows = [row.untyped_storage() for chunk in examples._computed.values() for row in chunk]
    return sum({storage.data_ptr(): storage.nbytes() for storage in rows}.values())


@families
def test_memory_is_bounded(make, family) -> None:
    model, examples = make()
    lengths = examples.lengths() if family != "vit" else np.full(COUNT, 5)  # four patches and [CLS]
    sizes = lengths * 16 * 4  # float32
    whole, most = int(sizes.sum()), int(sizes[:NEIGHBOURS].sum())
    everything = np.arange(COUNT)
    usual = examples.batch(everything, CPU)
    for limit, held in [(whole, whole), (whole - 1, most), (most, most), (most - 1, 0), (1, 0)]:
        ours = kept(model, examples, limit)
        logits(model, ours, everything)
        batch = ours.batch(everything, CPU)
        assert stored(ours) == held <= limit
        assert all(torch.equal(batch[name], usual[name]) for name in usual)
        order = np.array([70, 3, 75, 64, 63, 3, 0])  # kept ones among others
        torch.testing.assert_close(logits(model, ours, order), logits(model, examples, order), rtol=1e-5, atol=1e-5)
    assert model.prefix.kept(examples, 0) is examples
    assert len(kept(model, examples, float("inf")).batch(everything, CPU)[PREFIX]) == COUNT


def test_a_prefix_is_computed_once(make) -> None:
    model, examples = make()
    ours, seen = kept(model, examples), []
    inner = model.prefix.blocks[0].attention  # the block's own hooks fire while it does nothing, too
    inner.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    for _ in range(2):
        for member in members(model, [40, COUNT - 40]):
            perform(dataclasses.replace(member.task, streams=(len(seen), 0, 0)), model, ours)
        logits(model, ours, range(COUNT))
    assert sum(seen) <= COUNT and sorted(ours._computed) == [0, 1]
    seen.clear()
    ours.batch(np.arange(COUNT), CPU)
    assert not seen
    partial = kept(model, examples, stored(ours) - 1)
    seen.clear()
    partial.batch(np.array([1, 64, 65, 2]), CPU)
    assert seen == [2]  # those beyond the limit, together


def test_cells_of_a_sweep_share_what_is_kept(small) -> None:
    one = workbench.build(small(adapter__layers=[-1], train__lr=0.1))
    train, test = one.train, one.test
    other = workbench.build(small(adapter__layers=[-1], train__lr=0.2, rounds=3, privacy__name="none"))
    assert other.train is train and other.test is test and isinstance(train, Kept) and train.prefix is other.model.prefix
    assert workbench.build(small(adapter__layers=[-1], engine__prefix_cache=0.5)).train is not train
    assert workbench.build(small(adapter__layers=[-1])).train.limit == 0.5e9  # half of a GB for each part


# ---- where nothing is kept


@pytest.mark.parametrize(("settings", "words"), [
    ({"layers": []}, "adapter sits in the first block"),
    ({"layers": [0, 3]}, "adapter sits in the first block"),
    ({"model": {"dropout": True}}, "model.dropout=true"),
    ({"layers": [], "target_modules": ["dense"]}, "first block"),  # the pooler among them
    ({"base": {"new": ["bert.encoder.layer.1.output.dense.weight"]}}, "something that is trained lies below"),
    ({"base": {"new": ["bert.embeddings.LayerNorm.weight"]}}, "something that is trained lies below"),
])  # fmt: skip
def test_refusals(make, settings, words) -> None:
    model, examples = make(**settings)
    assert model.prefix.kept(examples, ROOMY) is examples and words in model.prefix.refusal
    assert model.prefix.kept(examples, ROOMY) is examples
    assert not any(p.requires_grad for p in model.peft.parameters())


def test_adapters_outside_of_one_list_of_blocks_are_refused(make) -> None:
    model, _ = make(layers=[2, 3], target_modules=["query"])
    assert Prefix(model).first == 2
    *_, last = model.layers
    for old, new in (("encoder.layer.3.", "pooler."), ("encoder", "decoder")):
        other = last.replace(old, new)
        model._A[other] = model._A[last]
        assert Prefix(model).refusal and not Prefix(model).first
        del model._A[other]


@pytest.mark.parametrize("kind", ["pairs", "triples", "a change on the side"])
def test_blocks_that_hand_on_more_than_hidden_states(make, kind) -> None:
    model, examples = make()
    encoder = model.peft.get_submodule("base_model.model.bert.encoder")
    extra = {"pairs": 1, "triples": 2, "a change on the side": 0}[kind]

    class Block(type(encoder.layer[0])):
        def forward(self, *args, **kwargs):
            given = super().forward(*args, **kwargs)
            return (given, *[None] * extra) if extra else given

    def forward(hidden_states, attention_mask=None, *args, **kwargs):
        side = 1.0
        for block in encoder.layer:
            hidden_states = block(hidden_states, attention_mask)
            if extra:
                hidden_states, *rest = hidden_states
                assert len(rest) == extra
            side = side * (1 + hidden_states[:, :1, :1])
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states * (1 if extra else side))

    for block in encoder.layer:
        block.__class__ = Block
    encoder.forward = forward
    batches = [0], [0, 1], [2, 1, 70]
    usual = [logits(model, examples, indices) for indices in batches]
    ours = model.prefix.kept(examples, ROOMY)
    assert ours is examples and "Block hands on more than its hidden states" in model.prefix.refusal
    assert all(torch.equal(logits(model, ours, i), expected) for i, expected in zip(batches, usual, strict=True))


def test_pairs_are_not_mistaken_for_a_batch_of_two(bert, data) -> None:  # noqa: F811
    """DeBERTa's blocks give (hidden states, attention), and (2, T, H) unpacks as a pair."""
    transformers.DebertaV2Model(transformers.DebertaV2Config(vocab_size=len(VOCABULARY), **SIZES)).save_pretrained(bert)
    base = load(ModelConfig("hf", str(bert)), data, 0)
    model = AdaptedModel(base, AdapterConfig(rank=2, layers=[-1]), CPU)
    examples, model.prefix = base.encode(data.train), Prefix(model)
    ours = model.prefix.kept(examples, ROOMY)
    assert ours is examples and "DebertaV2Layer hands on more" in model.prefix.refusal
    assert torch.isfinite(logits(model, ours)).all()


# ---- the model afterwards


def untouched(model: AdaptedModel) -> bool:
    hooked = any(block._forward_pre_hooks for block in model.prefix.blocks)
    return not hooked and not any("forward" in vars(module) for module in model.peft.modules())


@pytest.mark.parametrize("broken", ["classifier.modules_to_save.default", "bert.encoder.layer.0.attention", None])
def test_the_model_is_left_as_it_was(make, broken) -> None:
    model, examples = make()
    before, ours = logits(model, examples), kept(model, examples)
    if broken:
        hook = model.peft.get_submodule(f"base_model.model.{broken}").register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, ours, [70])  # whose neighbourhood has not been computed
        hook.remove()
    else:
        logits(model, ours, [70])
    assert untouched(model)
    assert torch.equal(logits(model, examples), before)
    torch.testing.assert_close(logits(model, ours), before, rtol=1e-5, atol=1e-5)


# ---- adapter.layers


@pytest.mark.parametrize(("wanted", "expected"), [
    ([], [0, 1, 2, 3]), ([0], [0]), ([-1], [3]), ([-4, 3, -1, 1], [0, 1, 3]),
])  # fmt: skip
@families
def test_blocks_are_numbered_from_either_end(make, family, wanted, expected) -> None:
    model, _ = make(layers=wanted)
    assert sorted({int(re.search(r"\.(\d+)\.", name)[1]) for name in model.layers}) == expected


def test_blocks_of_modules_that_are_named_with_a_dot(make) -> None:
    model, _ = make(target_modules=["self.query"])
    assert model.layers == ["base_model.model.bert.encoder.layer.3.attention.self.query"]


@pytest.mark.parametrize("wrong", [4, -5])
def test_a_block_that_is_not_there_is_refused(make, wrong) -> None:
    with pytest.raises(ConfigError, match=f"adapter.layers has {wrong}, but this model has 4 blocks; use 0 to 3, or -1"):
        make(layers=[1, wrong])


def test_the_command_line_refuses_a_block_that_is_not_there(capsys, tmp_path) -> None:
    arguments = ["adapter.layers=[7]", "engine=inline", "device=cpu", f"results={tmp_path}"]
    assert cli.main(ROOT / "configs", arguments) == 2
    sentence = "adapter.layers has 7, but this model has 4 blocks; use 0 to 3, or -1 for the last"
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_the_blocks_survive_in_the_saved_adapter(make, bert, data, tmp_path) -> None:  # noqa: F811
    from peft import PeftModel

    model, examples = make(layers=[-1, 1])
    model.write(factors(model), {name: array + 0.1 for name, array in model.initial_head.items()})
    export.adapter(model, tmp_path / "adapter")
    base = load(ModelConfig("hf", str(bert)), data, 0)
    base.model.apply(sharpen)
    again = PeftModel.from_pretrained(base.model, tmp_path / "adapter").eval()
    assert again.peft_config["default"].layers_to_transform == [1, 3]
    with torch.no_grad():
        assert torch.equal(again(**examples.batch(np.arange(5), CPU)).logits, logits(model, examples))
