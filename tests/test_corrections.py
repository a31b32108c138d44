"""What a strategy moves into the base: as if it were in the weights, though they keep their bits; and what is saved of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from fedlora.app import experiment, records
from fedlora.arrays import lowrank, messages
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.compute import workbench
from fedlora.compute.rows import Rows
from fedlora.models import export
from fedlora.models.adapted import AdaptedModel
from tests.test_cohort import sharpen
from tests.test_models import adapted, bert, gpt2, reviews  # noqa: F401 (fixtures)
from tests.test_wire import bits, play

families = pytest.mark.parametrize("family", ["bert", "gpt2"])  # gpt2's Conv1D keeps its weights transposed


@pytest.fixture
def model(request, reviews, family) -> AdaptedModel:  # noqa: F811
    path = request.getfixturevalue(family)
    transformers.AutoModel.from_pretrained(path).apply(sharpen).save_pretrained(path)  # else attention hardly sees its inputs
    return adapted(path, reviews, rank=2, alpha=3.0)


def drawn(model: AdaptedModel, rank: int, seed: int) -> Adapters:
    rng, shapes = np.random.default_rng(seed), model.initial("kaiming", 0)
    return {
        layer: Pair(*(rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((rank, pair.A.shape[1]), (len(pair.B), rank))))
        for layer, pair in shapes.items()
    }


def batch_of() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[5, 6, 7], [8, 5, 5]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}


def logits(model: AdaptedModel) -> np.ndarray:
    model.peft.eval()
    with torch.no_grad():
        return model.forward(batch_of()).logits.double().numpy()


def weights(model: AdaptedModel) -> dict[str, bytes]:
    names = [(layer, model.peft.get_submodule(layer).base_layer.weight) for layer in model.layers]
    return {layer: weight.detach().numpy().tobytes() for layer, weight in names}


@families
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_correction_acts_as_if_it_were_in_the_weights(model, rank) -> None:
    factors, correction, before = drawn(model, 2, 1), drawn(model, rank, 2), weights(model)
    model.write(factors, {}, correction)
    found = logits(model)
    assert weights(model) == before
    model.write(factors, {})  # and is gone with the next
    plain = logits(model)
    assert (np.abs(found - plain).max() > 1e-3) == (rank > 0)
    for layer, pair in correction.items():
        module = model.peft.get_submodule(layer)
        change = torch.from_numpy(1.5 * pair.B @ pair.A)  # alpha / rank
        module.base_layer.weight.data += change.T if module.fan_in_fan_out else change
    np.testing.assert_allclose(found, logits(model), atol=1e-5)


@families
def test_a_correction_acts_in_the_pass_of_many_clients(request, reviews, model) -> None:  # noqa: F811
    from fedlora.config import ModelConfig
    from fedlora.models import load

    factors, correction = drawn(model, 2, 1), drawn(model, 3, 2)
    base = load(ModelConfig("hf", str(request.getfixturevalue(request.node.callspec.params["family"]))), reviews, 0)
    rows = Rows(model, base.encode(reviews.train))
    model.write(factors, {}, correction)
    expected = logits(model)
    given = {
        (layer, f): torch.from_numpy(np.stack([a, a])) for layer, pair in factors.items() for f, a in pair._asdict().items()
    }
    given |= {(name, ""): torch.from_numpy(np.stack([a, a])) for name, a in model.dense().items()}
    with rows.installed(), torch.no_grad():
        rows.give(given, model.scale, [])
        found = rows.logits(batch_of()).double().numpy()
        model.write({}, {})
        without = rows.logits(batch_of()).double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - without).max() > 1e-3


@families
def test_it_stands_in_the_scale_of_the_server_whatever_the_rank_of_the_client(model) -> None:
    """A client of rank 1 has the scale 3 for its own factors; the correction keeps 1.5."""
    correction, one = drawn(model, 3, 2), drawn(model, 1, 1)
    model.write(one, {}, correction)
    found = logits(model)
    same = {layer: lowrank.pad(Pair(pair.A, 2 * pair.B), 2) for layer, pair in one.items()}
    model.write(same, {}, correction)
    np.testing.assert_allclose(found, logits(model), atol=1e-5)


@families
@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_saved_gives_the_same_logits_without_us(request, model, tmp_path, family, rank) -> None:
    import peft

    factors, correction = drawn(model, 2, 1), drawn(model, rank, 2)
    model.write(factors, {}, correction)
    expected, own, base = logits(model), weights(model), request.getfixturevalue(family)
    export.adapter(model, tmp_path / "adapter")
    export.merged(model, tmp_path / "merged")
    assert np.array_equal(logits(model), expected) and weights(model) == own  # saving changes nothing
    assert (model.peft.peft_config["default"].r, model.peft.peft_config["default"].lora_alpha) == (2, 3.0)
    torch.manual_seed(0)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert not any("lora" in name for name, _ in merged.named_modules())
    for other in (loaded, merged):
        with torch.no_grad():
            np.testing.assert_allclose(other(**batch_of()).logits.double().numpy(), expected, atol=1e-5)


EXPORTED = {
    "flora": {}, "fedex_lora": {}, "fed_sb": {}, "fedsvd": {}, "fedask": {}, "fedsa_lora": {"evaluate__holdout": 0.2},
    "hetlora": {"adapter__ranks": {2: 0.5, 8: 0.5}}, "flexlora": {"adapter__memory": {1: 1.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_a_run_saves_the_model_that_it_tested(small, name) -> None:
    """The adapter by PEFT on the base, and the merged model by transformers alone."""
    import peft

    from fedlora.models.vit_digits import FOLDER

    config = small(strategy={"name": name}, save_merged=True, adapter__train_head=True, **EXPORTED[name])
    bench = workbench.build(config)
    own = {layer: bench.model.peft.get_submodule(layer).base_layer.weight.detach().clone() for layer in bench.model.layers}
    summary = experiment.run(config, 0.0)
    assert all(torch.equal(bench.model.peft.get_submodule(x).base_layer.weight, weight) for x, weight in own.items())
    folder, batch = records.Recorder(config).folder, bench.test.batch(np.arange(len(bench.test)), torch.device("cpu"))
    labels = batch.pop("labels")
    adapter = peft.PeftModel.from_pretrained(transformers.ViTForImageClassification.from_pretrained(FOLDER), folder / "adapter")
    for model in (adapter.eval(), transformers.ViTForImageClassification.from_pretrained(folder / "merged").eval()):
        with torch.no_grad():
            found = model(pixel_values=batch["pixel_values"]).logits
            np.testing.assert_allclose(found, bench.model.forward(batch | {}).logits, atol=2e-4)
        if name != "fedsa_lora":
            assert float((found.argmax(1) == labels).double().mean()) == summary["accuracy"]
            assert float(torch.nn.functional.cross_entropy(found.double(), labels)) == pytest.approx(summary["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_a_correction_is_thin_and_counted(small, name) -> None:
    """It grows by what the cohort adds, up to min(m, n), and is on the way down in every round after the first."""
    strategy, grid, states = play(small(strategy={"name": name}, rounds=3, adapter__rank=4))
    per_round = 4 * (4 if name == "flora" else 5)
    for round in (1, 2, 3):
        assert all(pair.rank <= min(64, round * per_round) for pair in states[round].base_correction.values())
    assert states[0].base_correction == {} != states[1].base_correction
    sent = grid.down()[4:8]
    thin = messages.named({}, {}, correction=states[1].base_correction)
    assert all(all(np.array_equal(arrays[key], array) for key, array in thin.items()) for arrays in sent)
    down = [report.bytes_down for report in strategy.reports]
    assert down[1] - down[0] == 4 * sum(array.nbytes + 128 for array in thin.values())


def test_a_correction_of_rank_zero_travels(small) -> None:
    """FedEx-LoRA's first round with one client: there is nothing that the averages miss."""
    config = small(strategy={"name": "fedex_lora"}, clients_per_round=1, rounds=3)
    strategy, _, states = play(config)
    assert strategy.report is not None and strategy.report.drops == {}
    assert {pair.rank for pair in states[-1].base_correction.values()} == {0}
    plain = play(small(strategy={"name": "fedavg"}, clients_per_round=1, rounds=3))[2][-1]
    assert {k: v for k, v in bits(states[-1]).items() if ".base_" not in k} == bits(plain)
