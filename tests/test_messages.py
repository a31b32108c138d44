"""What travels: names, order, bytes and shapes."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from fedlora.arrays import messages
from fedlora.arrays.lowrank import Adapters, Pair

M, N, R = 6, 5, 2


def adapters(dtype: type = np.float32) -> Adapters:
    rng = np.random.default_rng(0)
    return {
        f"model.{layer}": Pair(rng.standard_normal((R, N)).astype(dtype), rng.standard_normal((M, R)).astype(dtype))
        for layer in ("value", "query")
    }


def head(dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {"classifier.weight": np.ones((3, M), dtype), "classifier.bias": np.zeros(3, dtype)}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_pack_and_unpack_are_inverse(dtype: type) -> None:
    factors, dense, _ = messages.unpack(messages.pack(adapters(dtype), head(dtype)))
    for layer, pair in adapters(dtype).items():
        for factor, array in pair._asdict().items():
            assert factors[layer][factor].dtype == dtype
            assert np.array_equal(factors[layer][factor], array)
    assert factors.keys() == adapters().keys()
    assert dense.keys() == head().keys() and np.array_equal(dense["classifier.weight"], np.ones((3, M)))


def test_names_are_those_of_peft_in_sorted_order() -> None:
    assert list(messages.pack(adapters(), head())) == [
        "classifier.bias",
        "classifier.weight",
        "model.query.lora_A.weight",
        "model.query.lora_B.weight",
        "model.value.lora_A.weight",
        "model.value.lora_B.weight",
    ]


@pytest.mark.parametrize(("factors", "per_layer"), [("AB", R * (M + N)), ("B", R * M), ("A", R * N)])
def test_bytes_by_hand(factors: str, per_layer: int) -> None:
    """Two layers of float32: 4 bytes a number and a header of 128 bytes an array."""
    content = RecordDict({"arrays": messages.pack(adapters(), {}, factors)})
    assert messages.array_bytes(content) == 2 * (4 * per_layer + 128 * len(factors))


def test_bytes_of_several_records_and_of_none() -> None:
    record = messages.pack(adapters(), {})
    assert messages.array_bytes(RecordDict({"one": record, "two": record})) == 2 * messages.array_bytes(
        RecordDict({"one": record})
    )
    assert messages.array_bytes(RecordDict()) == 0


def test_packing_does_not_depend_on_memory_layout_or_on_the_order_of_layers() -> None:
    turned = {layer: Pair(np.asfortranarray(p.A), np.ascontiguousarray(p.B.T).T) for layer, p in reversed(adapters().items())}
    plain, other = messages.pack(adapters(), {}), messages.pack(turned, {})
    assert list(plain) == list(other)
    assert all(plain[name].data == other[name].data for name in plain)


def test_unpacked_arrays_are_copies_that_may_be_written() -> None:
    record = messages.pack(adapters(), {})
    messages.unpack(record)[0]["model.query"]["A"][:] = 7.0
    assert np.array_equal(messages.unpack(record)[0]["model.query"]["A"], adapters()["model.query"].A)


@pytest.mark.parametrize(
    "name", ["head.weight", "lora_A.weight", "x.lora_B.bias", "x.lora_magnitude_vector", "a.lora_C.weight"]
)
def test_what_is_no_factor_is_dense(name: str) -> None:
    factors, dense, _ = messages.unpack(ArrayRecord({name: Array(np.ones(2))}))
    assert not factors and list(dense) == [name]


# ---- completing what was sent


def test_the_factor_that_was_not_sent_is_the_one_broadcast() -> None:
    known = adapters()
    sent = {layer: {"B": 2 * pair.B} for layer, pair in known.items()}
    for layer, pair in messages.complete(sent, known).items():
        assert pair.A is known[layer].A
        assert np.array_equal(pair.B, 2 * known[layer].B)


def test_what_is_completed_has_the_dtype_of_the_broadcast() -> None:
    """Else the first client would choose the precision, and the bytes, of every later round."""
    sent: messages.Factors = {
        layer: {"A": pair.A.astype(np.float64), "B": pair.B.astype(np.float16)} for layer, pair in adapters().items()
    }
    for pair in messages.complete(sent, adapters()).values():
        assert pair.A.dtype == pair.B.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda sent: sent.pop("model.query"), "layer model.query is missing"),
        (lambda sent: sent.update({"model.key": {"B": np.ones((M, R))}}), "layer model.key is unknown"),
        (lambda sent: sent["model.value"].update(B=np.ones((M, R + 1))), r"model.value.lora_B has shape \(6, 3\) instead of"),
        (lambda sent: sent["model.value"].update(A=np.ones((N, R))), r"model.value.lora_A has shape \(5, 2\) instead of"),
    ],
)
def test_what_does_not_fit_is_named(change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    sent = {layer: dict(pair._asdict()) for layer, pair in adapters().items()}
    change(sent)
    with pytest.raises(ValueError, match=sentence):
        messages.complete(sent, adapters())


# ---- the first broadcast


def test_state_of_a_full_broadcast() -> None:
    state = messages.state_of(messages.pack(adapters(), head()), scale=0.5)
    assert list(state.adapters) == ["model.query", "model.value"]
    assert state.scale == 0.5 and state.dense.keys() == head().keys()
    assert not state.base_correction and not state.extra
    assert np.array_equal(state.adapters["model.value"].B, adapters()["model.value"].B)


@pytest.mark.parametrize(("factors", "lacking"), [("A", "lora_B"), ("B", "lora_A")])
def test_initial_arrays_need_both_factors(factors: str, lacking: str) -> None:
    with pytest.raises(ValueError, match=f"initial arrays lack {lacking} of model.query"):
        messages.state_of(messages.pack(adapters(), {}, factors), 1.0)


def test_initial_arrays_need_an_adapter() -> None:
    """PEFT's own state_dict() says `lora_A.default.weight`: without this, all would be averaged as dense arrays."""
    named = {
        "model.query.lora_A.default.weight": Array(np.ones((R, N))),
        "model.query.lora_B.default.weight": Array(np.ones((M, R))),
    }
    with pytest.raises(ValueError, match="get_peft_model_state_dict"):
        messages.state_of(ArrayRecord(named), 1.0)


# ---- on the wire


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, ">f4"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5), (1, 0, 4)])
def test_the_wire_has_the_bytes_of_flowers_own_arrays(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.arange(np.prod(shape, dtype=int)), dtype=dtype).reshape(shape)
    ours, theirs = messages.pack({}, {"head": array})["head"], Array(array)
    assert (ours.data, ours.dtype, ours.shape, ours.stype) == (theirs.data, theirs.dtype, theirs.shape, theirs.stype)
    (back,) = messages.unpack(ArrayRecord({"head": theirs}))[1].values()
    assert back.dtype == array.dtype and np.array_equal(back, array)


def test_arrays_of_another_order_are_read_and_bytes_that_are_none_are_refused() -> None:
    turned = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert np.array_equal(messages.unpack(ArrayRecord({"head": Array(turned)}))[1]["head"], turned)
    whole = Array(np.ones(4))
    for data in (whole.data[:-1], whole.data[:50], b"no array", b""):
        cut = ArrayRecord({"head": Array(dtype="float64", shape=(4,), stype="numpy.ndarray", data=data)})
        with pytest.raises((ValueError, EOFError)):
            messages.unpack(cut)
