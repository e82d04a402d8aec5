"""safetensors files: read and written as the library does, streamed, and never trusted."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from g4v_jax.errors import UserError
from g4v_jax.weights.tensors import SafetensorsFile, SafetensorsFolder, Writer

ARRAYS = {
    "b": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a.weight": np.arange(6, dtype=np.float16).reshape(3, 2),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def specs(arrays):
    return {name: (value.dtype, value.shape) for name, value in arrays.items()}


def test_reads_what_the_library_writes(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.names()) == set(ARRAYS)
    for name, value in ARRAYS.items():
        assert file.shape(name) == value.shape and file.dtype(name) == value.dtype
        np.testing.assert_array_equal(file.read(name), value)
        assert b"".join(file.blocks(name, 5)) == value.tobytes()
    np.testing.assert_array_equal(file.read("b", 1), ARRAYS["b"][1])
    np.testing.assert_array_equal(file.read("b", 1, slice(1, 3)), ARRAYS["b"][1, 1:3])
    np.testing.assert_array_equal(file.read("a.weight", rows=slice(1, 2)), ARRAYS["a.weight"][1:2])


def test_the_library_reads_what_is_streamed(tmp_path):
    with Writer(tmp_path / "x.safetensors", specs(ARRAYS)) as writer:
        for layer in (1, 0):
            writer.write("b", ARRAYS["b"][layer], layer)
        for name in ("scalar", "empty", "a.weight"):
            writer.write(name, ARRAYS[name])
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], value)


def test_bfloat16_passes_through(tmp_path):
    value = np.arange(5).astype(ml_dtypes.bfloat16)
    with Writer(tmp_path / "x.safetensors", {"x": (value.dtype, (5,))}) as writer:
        writer.write("x", value)
    read = SafetensorsFile(tmp_path / "x.safetensors").read("x")
    assert read.dtype == value.dtype and np.array_equal(read, value)


def test_a_writer_that_lacks_a_part_says_so(tmp_path):
    writer = Writer(tmp_path / "x.safetensors", specs(ARRAYS))
    writer.write("b", ARRAYS["b"][0], 0)
    with pytest.raises(ValueError, match="float64"):
        writer.write("b", ARRAYS["b"][1].astype(np.float64), 1)
    with pytest.raises(ValueError, match="bytes were not written"):
        writer.close()


def damaged(header, data=b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "header is longer"),
        (b"\xff" * 8, "header is longer"),
        (damaged(b"{nonsense"), "not a safetensors file"),
        (damaged([1]), "not a safetensors file"),
        (damaged({"x": tensor()}, b"\0" * 7), "truncated or damaged"),
        (damaged({"x": tensor()}, b"\0" * 9), "truncated or damaged"),
        (damaged({"x": tensor(shape=(3,))}), "has 8 bytes for F32"),
        (damaged({"x": tensor(shape=(-2,))}), "not whole numbers"),
        (damaged({"x": tensor(shape=(2.0,))}), "not whole numbers"),
        (damaged({"x": tensor("F8_E4M3", (8,))}), "has dtype F8_E4M3; supported: F64, F32"),
        (damaged({"x": tensor(), "y": tensor()}), "does not begin where"),
        (damaged({"x": {"dtype": "F32"}}), "not a safetensors file"),
        (damaged({"x": None}), "not a safetensors file"),
    ],
)
def test_hostile_files(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)


def test_folders(tmp_path):
    with pytest.raises(UserError, match="holds no .safetensors"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="pytorch_model.bin: a pickle runs whatever code"):
        SafetensorsFolder(tmp_path)
    save_file({"a": ARRAYS["b"]}, tmp_path / "one.safetensors")
    save_file({"b": ARRAYS["b"]}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def point(**where):
        index.write_text(json.dumps({"weight_map": where}))

    point(a="one.safetensors", b="two.safetensors")
    assert set(SafetensorsFolder(tmp_path).names()) == {"a", "b"}
    point(a="one.safetensors", b="three.safetensors")
    with pytest.raises(UserError, match="three.safetensors: this shard of model.safetensors.index.json is missing"):
        SafetensorsFolder(tmp_path)
    point(a="one.safetensors", b="one.safetensors")
    with pytest.raises(UserError, match="b is not in one.safetensors"):
        SafetensorsFolder(tmp_path)
    point(a="../one.safetensors")
    with pytest.raises(UserError, match="outside its folder"):
        SafetensorsFolder(tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match="not an index"):
        SafetensorsFolder(tmp_path)
    index.unlink()
    save_file({"a": ARRAYS["b"]}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="a is in one.safetensors and in two.safetensors"):
        SafetensorsFolder(tmp_path)


def test_a_full_disk_is_told_before_the_work(tmp_path):
    with pytest.raises(UserError, match="no space left for .*x.safetensors"):
        Writer(tmp_path / "x.safetensors", {"x": (np.float32, (1 << 41,))})
