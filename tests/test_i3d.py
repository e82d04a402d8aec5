"""I3D against a network written anew in torch, on weights of the published layout, and pickles that are refused."""

import hashlib
import os
import pickle

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from g4v_jax import trees
from g4v_jax.errors import UserError
from g4v_jax.evals import i3d

SMALL = i3d.I3D(
    classes=7,
    stem=(3, 4, 5),
    stages=(
        ((3, 2, 4, 1, 2, 2), (2, 3, 3, 2, 3, 1)),
        tuple((2, 2, 3, 1, 2, k) for k in range(1, 6)),
        ((3, 2, 4, 1, 2, 2), (4, 2, 3, 2, 3, 2)),
    ),
)
BLOCKS = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
BRANCHES = ("0/Conv3d_0a_1x1", "1/Conv3d_0a_1x1", "1/Conv3d_0b_3x3", "2/Conv3d_0a_1x1", "2/Conv3d_0b_3x3")
BRANCHES += ("3/Conv3d_0b_1x1",)


def published() -> dict:
    """Random weights of SMALL under the names and shapes of the published file."""
    rng, tree = np.random.default_rng(0), {"params": {}, "batch_stats": {}}

    def add(name, taps, inputs, outputs, norm=True):
        kernel = rng.normal(0, 1.4 / np.sqrt(taps**3 * inputs), (taps, taps, taps, inputs, outputs)).astype("f4")
        bias = rng.normal(0, 0.3, outputs).astype("f4")
        if not norm:
            tree["params"][name] = {"Conv_0": {"kernel": kernel, "bias": bias}}
            return
        tree["params"][name] = {"Conv_0": {"kernel": kernel}, "BatchNorm_0": {"bias": bias}}
        moments = {
            "mean": rng.normal(0, 0.1, (1, 1, 1, 1, outputs)).astype("f4"),
            "var": rng.uniform(0.1, 0.3, (1, 1, 1, 1, outputs)).astype("f4"),
        }
        tree["batch_stats"][name] = {"BatchNorm_0": moments}

    add("Conv3d_1a_7x7", 7, 3, SMALL.stem[0])
    add("Conv3d_2b_1x1", 1, *SMALL.stem[:2])
    add("Conv3d_2c_3x3", 3, *SMALL.stem[1:])
    width = SMALL.stem[2]
    for block, (a, b, c, d, e, f) in zip(BLOCKS, sum(SMALL.stages, ())):
        sides = ((1, width, a), (1, width, b), (3, b, c), (1, width, d), (3, d, e), (1, width, f))
        for branch, side in zip(BRANCHES, sides):
            add(f"Mixed_{block}/Branch_{branch}", *side)
        width = a + c + e + f
    add("Logits/Conv3d_0c_1x1", 1, width, SMALL.classes, norm=False)
    # the two-level names of the file: {"Mixed_3b": {"Branch_0/Conv3d_0a_1x1": ...}}
    for part in tree.values():
        for name in [name for name in part if "Branch_" in name]:
            block, rest = name.split("/", 1)
            part.setdefault(block, {})[rest] = part.pop(name)
    return tree


def reference(tree: dict, clips: torch.Tensor) -> np.ndarray:
    """Clips f64 [N 3 T 224 224] in [-1, 1] -> logits, by the paper's figure 3, with batch norms of their own."""
    held = {k: torch.from_numpy(np.asarray(v, np.float64)) for k, v in trees.flatten(tree).items()}

    def padded(x, window, stride, value):
        sides = []
        for size, k, s in reversed(list(zip(x.shape[2:], window, stride))):
            whole = max(0, (-(-size // s) - 1) * s + k - size)
            sides += [whole // 2, whole - whole // 2]
        return F.pad(x, sides, value=value)

    def unit(x, name, stride=1):
        kernel = held[f"params/{name}/Conv_0/kernel"].permute(4, 3, 0, 1, 2)
        x = F.conv3d(padded(x, kernel.shape[2:], (stride,) * 3, 0.0), kernel, stride=stride)
        if f"params/{name}/Conv_0/bias" in held:
            return x + held[f"params/{name}/Conv_0/bias"].view(-1, 1, 1, 1)
        mean, var = (held[f"batch_stats/{name}/BatchNorm_0/{m}"].flatten() for m in ("mean", "var"))
        return F.relu(F.batch_norm(x, mean, var, None, held[f"params/{name}/BatchNorm_0/bias"], eps=1e-3))

    def pool(x, window, stride):
        return F.max_pool3d(padded(x, window, stride, -torch.inf), window, stride)

    def mixed(x, name):
        a, b, c, d, e, f = (f"{name}/Branch_{branch}" for branch in BRANCHES)
        views = unit(x, a), unit(unit(x, b), c), unit(unit(x, d), e), unit(pool(x, (3, 3, 3), (1, 1, 1)), f)
        return torch.cat(views, 1)

    x = pool(unit(clips, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    for block in BLOCKS:
        if block == "4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if block == "5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        x = mixed(x, f"Mixed_{block}")
    x = F.avg_pool3d(x, (2, 7, 7), stride=1)
    return unit(x, "Logits/Conv3d_0c_1x1").mean((2, 3, 4)).numpy()


def clips(count: int, frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, frames, height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(3, 9, 32, 40), (1, 17, 224, 224)])
def test_features_are_those_of_the_published_network(shape):
    tree, videos = published(), clips(*shape)
    frames = torch.from_numpy(videos.astype(np.float64)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    frames = F.interpolate(frames, (224, 224), mode="bilinear", align_corners=False)
    wanted = reference(tree, (frames / 127.5 - 1).unflatten(0, shape[:2]).transpose(1, 2))
    found = i3d.features(i3d.convert(tree, SMALL, "weights"), videos, batch=2, module=SMALL)
    assert found.dtype == np.float32 and found.shape == wanted.shape == (shape[0], 7)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.ptp(wanted, axis=0).max() > 1e-3 * np.abs(wanted).max() or shape[0] == 1  # clips differ


def test_the_published_size_has_the_published_tensors():
    kernels = i3d.kernels(i3d.I3D())
    assert len(kernels) == 58 and kernels["logits"] == (1, 1, 1, 1024, 400)
    names = {i3d._published(path) for path in kernels}
    assert names == {"Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "Logits/Conv3d_0c_1x1"} | {
        f"Mixed_{block}/Branch_{branch}" for block in BLOCKS for branch in BRANCHES
    }
    assert sum(int(np.prod(shape)) + shape[-1] for shape in kernels.values()) == 12_689_984


def test_clips_must_have_two_steps_of_frames():
    assert i3d.features({}, clips(0, 9, 8, 8), module=SMALL).shape == (0, 7)
    with pytest.raises(UserError, match="a clip of 8 frames is shorter than the metric needs: I3D takes 9 or more"):
        i3d.features({}, clips(1, 8, 8, 8), module=SMALL)
    with pytest.raises(ValueError, match="not uint8"):
        i3d.features({}, clips(1, 9, 8, 8) / 255, module=SMALL)


# Weights


def test_weights_are_read_from_the_pickle_of_the_known_hash_alone(tmp_path, monkeypatch):
    tree, path = published(), tmp_path / "i3d.ckpt"
    tree["params"]["Conv3d_1a_7x7"]["Conv_0"]["kernel"] = np.asfortranarray(
        tree["params"]["Conv3d_1a_7x7"]["Conv_0"]["kernel"]
    )
    path.write_bytes(pickle.dumps(tree, protocol=4))
    with pytest.raises(UserError, match="i3d.ckpt: not the published weights of I3D; bring them with g4v data"):
        i3d.load(path)
    monkeypatch.setattr(i3d, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(i3d, "I3D", lambda: SMALL)
    same = jax.tree.map(np.array_equal, i3d.load(path), i3d.convert(tree, SMALL, "weights"))
    assert len(jax.tree.leaves(same)) == 116 and all(jax.tree.leaves(same))
    with pytest.raises(UserError, match="none.ckpt: cannot read the weights of I3D .No such file"):
        i3d.load(tmp_path / "none.ckpt")


def test_every_tensor_has_its_place():
    kernel = "params/Mixed_4c/Branch_1/Conv3d_0b_3x3/Conv_0/kernel"
    for changes, message in (
        ({kernel: None}, f"weights: {kernel} is missing"),
        ({kernel: np.zeros((3, 3, 3, 2, 4), "f4")}, r"Conv_0/kernel is \[3, 3, 3, 2, 4\], not \[3, 3, 3, 2, 3\]"),
        ({"params/Conv3d_9/Conv_0/kernel": np.zeros(1, "f4")}, "1 tensors have no place, the first params/Conv3d_9"),
    ):
        flat = trees.flatten(published()) | changes
        with pytest.raises(UserError, match=message):
            i3d.convert(trees.unflatten({k: v for k, v in flat.items() if v is not None}), SMALL, "weights")


class Call:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "content, reason",
    [
        (lambda path: Call(os.system, f"touch {path}"), "it names (posix|nt).system"),
        (lambda path: Call(eval, f"open({str(path)!r}, 'w')"), "it names builtins.eval"),
        (lambda path: Call(np.load, str(path)), "it names numpy.load"),
        (lambda path: Call(np.ndarray, (2, 2)), "not made in the usual way"),
        (lambda path: np.array([Call(os.system, f"touch {path}")], object), "numbers of type '.''O8'"),
        (lambda path: np.zeros(3), "numbers of type '<''f8'"),
        (lambda path: np.zeros(3, ">f4"), "numbers of type '>''f4'"),
        (lambda path: [np.zeros(3, "f4")], "a list"),
        (lambda path: {1: np.zeros(3, "f4")}, "a dict"),
        (lambda path: 3, "a int"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path, content, reason):
    data = pickle.dumps({"params": content(tmp_path / "ran")}, protocol=4)
    with pytest.raises(UserError, match=f"^x.ckpt: not a pickle of float32 arrays alone .*{reason}"):
        i3d.unpickle(data, "x.ckpt")
    assert not (tmp_path / "ran").exists()


def test_damaged_pickles_are_refused():
    data = pickle.dumps({"x": np.arange(6, dtype="f4").reshape(2, 3)}, protocol=4)
    assert np.array_equal(i3d.unpickle(data, "x")["x"], [[0, 1, 2], [3, 4, 5]])
    for broken in (data[:-30], b"", b"PK\x03\x04", data.replace(b"K\x02K\x03", b"K\x02K\x09")):
        with pytest.raises(UserError, match="nothing in it was run"):
            i3d.unpickle(broken, "x")
