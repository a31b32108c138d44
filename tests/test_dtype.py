"""A frozen base in bfloat16: what is trained, its gradients, the noise and what is saved stay float32."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from clients.private import Mechanism, PrivateDescent
from fedlora.check import ConfigError
from fedlora.compute.evaluate import predict
from fedlora.models import export
from tests.test_cohort import (  # noqa: F401 (fixtures)
    PRIVATE,
    alone,
    arrays,
    bert,
    factors,
    gpt2,
    llama,
    members,
    together,
    vit,
)
from tests.test_models import CPU
from tests.test_prefix import data, families, family, kept, make  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = {"dtype": "bfloat16"}
ROUNDING = 2**-8  # of one bfloat16 number, relative
EVERY = np.arange(12)


@families
def test_only_the_frozen_base_is_rounded(make, family) -> None:  # noqa: F811
    model, examples = make(model=BF16, layers=[])
    model.write(factors(model), {})
    parameters = model.trainable("AB")
    assert len(parameters) == 2 * len(model.layers) + len(model.dense()) and model.dense()
    trained = {id(parameter) for parameter in parameters}
    for name, parameter in model.peft.named_parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in trained else torch.bfloat16), name
    output = model.forward(examples.batch(EVERY, CPU))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in parameters)


@families
@pytest.mark.parametrize("train_head", [True, False])
def test_the_loss_is_near_that_of_float32(make, family, train_head) -> None:  # noqa: F811
    whole, examples = make(layers=[], train_head=train_head)
    rounded, _ = make(model=BF16, layers=[], train_head=train_head)
    for model in (whole, rounded):
        model.write(factors(model), model.initial_head if train_head else {})
    exact, near = (predict(model, examples, EVERY, 12) for model in (whole, rounded))
    assert exact.dtype == near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 16 * ROUNDING * exact.abs().max()
    batch = examples.batch(EVERY, CPU)
    loss = rounded.forward(batch).loss
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(whole.forward(batch).loss.item(), abs=16 * ROUNDING)
    torch.testing.assert_close(loss, cross_entropy(near, batch["labels"]))  # in float32, whatever the logits are


@families
@pytest.mark.parametrize(("mechanism", "train_head"), [
    (None, True), (Mechanism(0.0, 0.3), True), (Mechanism(0.0, 0.3), False),  # noise would hide what differs
])  # fmt: skip
def test_training_together_is_training_alone(make, family, mechanism, train_head) -> None:  # noqa: F811
    """To a few roundings of bfloat16: Opacus goes back through the base from the mean's gradient, scaled by 1/n."""
    model, examples = make(model=BF16, layers=[], train_head=train_head)
    team = members(model, [9, 2, 14], mechanism=mechanism)
    for fused, member in zip(together(model, examples, team), team, strict=True):
        usual = alone(model, examples, member)
        one, other, start = arrays(fused), arrays(usual), arrays(member)
        moved, apart = (np.sqrt(sum(np.sum((other[n] - x[n]) ** 2) for n in start)) for x in (start, one))
        assert apart <= 6 * ROUNDING * moved and moved > 1e-3
        assert fused.metrics == pytest.approx(usual.metrics, rel=8 * ROUNDING)


def test_a_prefix_is_kept_in_bfloat16(make) -> None:  # noqa: F811
    model, examples = make(model=BF16, layers=[-1])
    ours = kept(model, examples)
    assert ours.batch(EVERY, CPU)["prefix"].dtype == torch.bfloat16
    usual = predict(model, examples, EVERY, 12)
    assert (predict(model, ours, EVERY, 12) - usual).abs().max() <= 16 * ROUNDING * usual.abs().max()


def test_noise_is_float32(make, monkeypatch) -> None:  # noqa: F811
    model, examples = make(model=BF16, layers=[])
    seen = []

    def take(descent, gradients, lr, last=True):
        usual(descent, gradients, lr, last)
        seen.extend((gradients.dtype, descent.flat.dtype, descent.noise.dtype))

    usual = PrivateDescent.take
    monkeypatch.setattr(PrivateDescent, "take", take)
    (member,) = members(model, [9], mechanism=PRIVATE)
    alone(model, examples, member)
    together(model, examples, [member])
    assert len(seen) == 2 * 3 * member.task.steps and set(seen) == {torch.float32}


def test_what_is_saved_is_float32(make, tmp_path) -> None:  # noqa: F811
    model, _ = make(model=BF16, layers=[])
    begin, head = factors(model), {name: array + 1e-4 for name, array in model.initial_head.items()}
    model.write(begin, head)
    export.adapter(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * len(begin) + len(head)
    for name, pair in begin.items():
        assert torch.equal(saved[f"{name}.lora_A.weight"], torch.from_numpy(pair.A))
        assert torch.equal(saved[f"{name}.lora_B.weight"], torch.from_numpy(pair.B))
    assert all(torch.equal(saved[name], torch.from_numpy(array)) for name, array in head.items())


@pytest.mark.parametrize("init", ["kaiming", "orthonormal", "pissa"])
def test_the_initial_adapters(make, init) -> None:  # noqa: F811
    one, other = (make(model=model, layers=[])[0].initial(init, 0) for model in ({}, BF16))
    for name, pair in one.items():
        products = [p.A.T @ p.A for p in (pair, other[name])]  # pissa's rows are known up to their sign
        assert other[name].A.dtype == np.float32
        assert np.linalg.norm(products[0] - products[1]) <= (init == "pissa") * 4 * ROUNDING * np.linalg.norm(products[0])


@pytest.mark.parametrize("dtype", ["float16", "half"])
def test_other_types_are_refused(small, dtype) -> None:
    with pytest.raises(ConfigError, match=f"^model.dtype={dtype} is not known; (did you mean|choose one of).*float"):
        small(model__dtype=dtype)
