"""ONNX graphs of DINOv2 towers, as PyTorch's exporter writes them, as a source of transformers' tensors.

May hold the finding of names: the exporter keeps a parameter's own name unless it folded a transpose into it, and then
the node that uses it still stands at the module's path. Parsing is the `onnx` package's. Data outside the file is
refused: a graph may name any path of the machine for it.
"""

import math
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from g4v_jax.errors import UserError

MAX_BYTES = 2 << 30  # protobuf's own limit
CLASS = "embeddings.cls_token"
POSITIONS = "embeddings.position_embeddings"
RENAMED = {  # modules as transformers 5 names them in memory -> as it saves them
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


class OnnxGraph:
    """The encoder inside an ONNX file as a Source, under `Dinov2Model`'s names, with the `config` that fits it.

    Raises UserError for a file that is not ONNX, keeps its data elsewhere, or holds no DINOv2.
    """

    def __init__(self, path: str | Path):
        import onnx

        self.path = Path(path)
        if self.path.stat().st_size > MAX_BYTES:
            raise UserError(f"{self.path}: larger than an ONNX file can be")
        try:
            self._graph = onnx.load(self.path, load_external_data=False).graph
        except Exception as error:  # the parser's own exceptions have no common class
            raise UserError(f"{self.path}: not a whole ONNX file ({error})") from None
        stored = {tensor.name: tensor for tensor in self._graph.initializer}
        for name, tensor in stored.items():
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise UserError(f"{self.path}: keeps {name} in another file; save it with its data inside")
        found = [name.removesuffix(CLASS) for name in stored if name.endswith(CLASS)]
        if len(found) != 1:
            raise UserError(f"{self.path}: holds no DINOv2 encoder ({CLASS} is not there once); no other graph is known")
        self.prefix = found[0]
        self._array = lambda name: onnx.numpy_helper.to_array(stored[name])
        self._folded = self._find_folded(stored)
        hidden = {name for names in self._folded.values() for name in names}
        self._plain = {self._bare(name): name for name in stored if name not in hidden}

    def _bare(self, name: str) -> str:
        for here, saved in RENAMED.items():
            name = name.replace(f".{here}.", f".{saved}.")
        return name.removeprefix(self.prefix)

    def _node(self, module: str) -> str:
        """What the names of a module's nodes begin with: its path, but for the numbers of layers, by slashes."""
        return "/" + re.sub(r"\.(?!\d)", "/", self.prefix + module) + "/"

    def _find_folded(self, stored: dict) -> dict[str, tuple[str, ...]]:
        """Tensors that the exporter changed, by their name in the model: transposed weights, and the cut positions."""
        folded: dict[str, tuple[str, ...]] = {}
        embeddings = self._node("embeddings")
        pieces = []
        for node in self._graph.node:
            unnamed = [name for name in node.input if name in stored and "::" in name]
            if node.op_type == "MatMul" and len(unnamed) == 1:
                module = node.name.strip("/").rsplit("/", 1)[0].replace("/", ".")
                folded[self._bare(f"{module}.weight")] = (unnamed[0],)
            elif node.name.startswith(embeddings):
                pieces += [name for name in unnamed if len(stored[name].dims) == 3]
        pieces.sort(key=lambda name: stored[name].dims[1])  # the class token's place, then the patches'
        if len(pieces) != 2 or stored[pieces[0]].dims[1] != 1:
            raise UserError(f"{self.path}: its positions are not a class token's and the patches'")
        return folded | {POSITIONS: tuple(pieces)}

    def names(self):
        return self._plain.keys() | self._folded.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.read(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self.read(name).dtype

    def read(self, name: str) -> np.ndarray:
        if name not in self._folded:
            return self._array(self._plain[name])
        values = [self._array(part) for part in self._folded[name]]
        return np.concatenate(values, axis=1) if name == POSITIONS else values[0].T

    @property
    def last(self) -> str:
        """The graph's name of the encoder's last hidden state."""
        path = self._node("layernorm")
        return [output for node in self._graph.node if node.name.startswith(path) for output in node.output][-1]

    @cached_property
    def config(self) -> dict:
        """What config.json would say. Raises UserError where the graph does not tell."""
        layers = {int(found[1]) for name in self.names() if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
        mlp, dim = self.shape("encoder.layer.0.mlp.fc1.weight")
        grid = math.isqrt(self.shape(POSITIONS)[1] - 1)
        patch = self.shape("embeddings.patch_embeddings.projection.weight")[-1]
        return dict(
            architectures=["Dinov2Model"],
            model_type="dinov2",
            hidden_size=dim,
            num_hidden_layers=len(layers),
            num_attention_heads=dim // self._head_dim(dim),
            mlp_ratio=mlp // dim,
            hidden_act="gelu",
            layer_norm_eps=self._epsilon(),
            image_size=grid * patch,
            patch_size=patch,
        )

    def _constants(self, path: str) -> list[np.ndarray]:
        """Values of the constants at a module's path."""
        import onnx

        path = self._node(path)
        nodes = [node for node in self._graph.node if node.op_type == "Constant" and node.name.startswith(path)]
        return [onnx.numpy_helper.to_array(attribute.t) for node in nodes for attribute in node.attribute]

    def _head_dim(self, dim: int) -> int:
        """By the factor d^-1/2 of the scores, or d^-1/4 where queries and keys are each given one."""
        constants = self._constants("encoder.layer.0.attention")
        factors = [float(x) for x in constants if x.dtype == np.float32 and x.size == 1 and 0 < x < 1]
        size = round(factors[0] ** (-4 if len(factors) == 2 else -2)) if factors else 0
        if len(set(factors)) != 1 or len(factors) > 2 or size < 1 or dim % size:
            raise UserError(f"{self.path}: the size of its attention heads cannot be told")
        return size

    def _epsilon(self) -> float:
        small = [float(x) for x in self._constants("layernorm") if x.dtype == np.float32 and 0 < float(x) < 0.1]
        if len(small) != 1:
            raise UserError(f"{self.path}: the epsilon of its norms cannot be told")
        return float(str(np.float32(small[0])))
