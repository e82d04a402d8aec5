"""ONNX graphs of DINOv2, exported by PyTorch here: their tensors under transformers' names, and the same features."""

import json

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from test_weights_vision import randomise

from g4v_jax.errors import UserError
from g4v_jax.weights import parity
from g4v_jax.weights.convert import import_tower
from g4v_jax.weights.forward import run
from g4v_jax.weights.onnx import OnnxGraph
from g4v_jax.weights.vision import bicubic

pytestmark = pytest.mark.usefixtures("one_device")

SIZES = dict(hidden_size=24, num_attention_heads=3, mlp_ratio=2, num_hidden_layers=3, image_size=35, patch_size=7)


class Inner(torch.nn.Module):
    """A tower inside a larger model, as published graphs hold it."""

    def __init__(self, tower):
        super().__init__()
        self.backbone, self.decoder = tower, torch.nn.Linear(24, 1)

    def forward(self, pixels):
        return self.decoder(self.backbone(pixels).last_hidden_state)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(ONNX file, the tower as transformers computes it, beside the file as it saves it)."""
    tower = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)).eval()
    randomise(tower)
    path = tmp_path_factory.mktemp("onnx") / "tower.onnx"
    tower.save_pretrained(path.parent)
    for name, free in (("tower.onnx", {0: "n", 2: "h", 3: "w"}), ("fixed.onnx", {})):
        torch.onnx.export(
            Inner(tower).eval(),
            torch.zeros(2, 3, 28, 28),
            path.with_name(name),
            input_names=["pixels"],
            dynamic_axes={"pixels": free},
            dynamo=False,
            opset_version=14,
        )
    return path, tower


def test_tensors_have_transformers_names_and_values(exported):
    path, tower = exported
    graph = OnnxGraph(path)
    state = load_file(path.parent / "model.safetensors")
    del state["embeddings.mask_token"]
    assert {name for name in graph.names() if not name.startswith("decoder")} == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(graph.read(name), value, err_msg=name)
        assert graph.shape(name) == value.shape and graph.dtype(name) == np.float32
    wanted = tower.config.to_dict()
    assert {key: wanted[key] for key in graph.config if key != "architectures"} == {
        key: value for key, value in graph.config.items() if key != "architectures"
    }


@pytest.mark.parametrize("size", [35, 28, 51])
def test_features_agree_at_any_size(exported, tmp_path, size):
    path, tower = exported
    folder, report = import_tower(path, tmp_path / "out", [r"decoder\..*"], image_size=size)
    assert folder.module.image_size == size and folder.module.patches == (size // 7) ** 2 + 1
    assert len(report.left) == 2
    compared = parity.compare(path, folder)
    assert compared["reference"] == "onnxruntime" and compared["relative_error"] < 2e-5
    frames = np.random.default_rng(0).standard_normal((1, 2, size, size, 3)).astype(np.float32)
    ours = run("vision", folder.module, folder.load_whole(), {"frames": frames})["features"]
    with torch.no_grad():
        theirs = tower(torch.tensor(frames[0].transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    assert np.abs(ours[0] - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_a_graph_of_one_size_is_compared_at_that_size_alone(exported, tmp_path):
    path = exported[0].with_name("fixed.onnx")
    for size, compared in ((28, True), (35, False)):
        folder, _ = import_tower(path, tmp_path / str(size), [r"decoder\..*"], image_size=size)
        found = parity.compare(path, folder)
        assert ("relative_error" in found) == compared == ("skipped" not in found)


def test_the_first_layers_alone(exported, tmp_path):
    path, tower = exported
    with pytest.raises(UserError, match=r"18 tensors have no place, the first 'encoder.layer.2"):
        import_tower(path, tmp_path / "out", [r"decoder\..*"], layers=2)
    folder, _ = import_tower(path, tmp_path / "out", [r"decoder\..*", r"encoder\.layer\.2\..*"], layers=2)
    assert folder.module.num_layers == 2 and json.loads((tmp_path / "out/tower.json").read_text())["fields"]["num_layers"] == 2
    with pytest.raises(UserError, match="--layers=4; this tower has 3"):
        import_tower(path, tmp_path / "new", layers=4)
    with pytest.raises(UserError, match="--image_size=6 is less than a patch of 7"):
        import_tower(path, tmp_path / "new", image_size=6)
    assert not (tmp_path / "new").exists()


def test_bicubic_weights_are_torch_s():
    for old, new in ((37, 16), (5, 7), (4, 4), (3, 11)):
        line = np.random.default_rng(0).standard_normal(old)
        square = torch.tensor(np.broadcast_to(line, (old, old)).copy())[None, None]
        theirs = torch.nn.functional.interpolate(square, (old, new), mode="bicubic", align_corners=False)[0, 0, 0]
        np.testing.assert_allclose(bicubic(old, new) @ line, theirs.numpy(), atol=1e-12)


def test_hostile_and_foreign_files_are_refused(exported, tmp_path):
    path, _ = exported
    data = path.read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut.onnx: not a whole ONNX file"):
        import_tower(cut, tmp_path / "out")
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    (tmp_path / "far.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="keeps .* in another file"):
        import_tower(tmp_path / "far.onnx", tmp_path / "out")
    other = onnx.helper.make_graph([], "empty", [], [])
    (tmp_path / "other.onnx").write_bytes(onnx.helper.make_model(other).SerializeToString())
    with pytest.raises(UserError, match="holds no DINOv2 encoder"):
        import_tower(tmp_path / "other.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
