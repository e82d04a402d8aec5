"""`g4v import`, `export` and `forward` end to end: the reference loads what we write, and nothing half-written stays."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from g4v_jax import cli
from g4v_jax.errors import UserError
from g4v_jax.weights.folder import TowerFolder

SMALL = dict(
    hidden_size=48,
    intermediate_size=100,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_hidden_layers=3,
    head_dim=12,
    vocab_size=61,
)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A random LLaMA in bfloat16, in several shards, as transformers writes it."""
    folder = tmp_path_factory.mktemp("published") / "llama"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def tower(published, tmp_path_factory) -> Path:
    """The same, imported."""
    out = tmp_path_factory.mktemp("towers") / "llama"
    assert run("import", published, f"--out={out}") == 0
    return out


def run(*arguments) -> int:
    return cli.run([str(argument) for argument in arguments])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def test_import_tells_where_everything_went(tower):
    report = json.loads((tower / "report.json").read_text())
    assert len(report["rows"]) == 30 and not report["left"]
    assert report["compared"]["relative_error"] <= 2e-5
    text = (tower / "report.txt").read_text()
    line = next(line for line in text.splitlines() if line.startswith("model.layers.2.mlp.up_proj.weight"))
    assert line.split() == "model.layers.2.mlp.up_proj.weight bfloat16 [100, 48] -> layers/mlp/up/kernel[2]".split()
    assert (tower / "tokenizer.json").read_text() == "{}"


def test_round_trip_is_bit_equal_and_loads_without_a_word(published, tower, tmp_path):
    out = tmp_path / "out"
    assert run("export", tower, f"--out={out}", "--shard_gb=0.00005", f"--json={tmp_path / 'x.json'}") == 0
    assert json.loads((tmp_path / "x.json").read_text())["compared"]["relative_error"] <= 2e-5
    before, after = tensors(published), tensors(out)
    assert before.keys() == after.keys() and len(list(out.glob("*.safetensors"))) > 2
    for name, value in before.items():
        assert value.dtype == after[name].dtype and torch.equal(value, after[name])
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16 and model.config.head_dim == 12


def test_forward(published, tower, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
    np.savez(tmp_path / "in.npz", tokens=tokens)
    assert run("forward", tower, f"--inputs={tmp_path / 'in.npz'}", f"--out={tmp_path / 'out.npz'}") == 0
    logits = np.load(tmp_path / "out.npz")["logits"]
    model = transformers.AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()
    for name, arrays, message in (
        ("a", {"ids": tokens}, "tokens is missing; a llm takes tokens"),
        ("b", {"tokens": tokens[0]}, r"tokens is \[9\]; it must be like \[2, 16\]"),
        ("c", {"tokens": tokens + 60}, "tokens must be 0 to 60"),
        ("d", {"tokens": np.array([{}])}, "not an .npz of plain arrays"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(UserError, match=message):
            run("forward", tower, f"--inputs={tmp_path / name}.npz", f"--out={tmp_path / 'no.npz'}")
    assert not (tmp_path / "no.npz").exists()


def adapter(published: Path, folder: Path, **changes) -> peft.PeftModel:
    """A random PEFT adapter of a published model, saved."""
    base = transformers.AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    settings = dict(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "o_proj"]) | changes
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, 0.0, 0.2)
    model.save_pretrained(folder)
    return model


def test_adapters_both_ways(published, tower, tmp_path, capsys):
    model = adapter(published, tmp_path / "peft")
    assert run("import", tmp_path / "peft", f"--base={tower}", f"--out={tmp_path / 'lora'}") == 0
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
    np.savez(tmp_path / "in.npz", tokens=tokens)
    assert run("forward", tmp_path / "lora", f"--inputs={tmp_path / 'in.npz'}", f"--out={tmp_path / 'out.npz'}") == 0
    logits = np.load(tmp_path / "out.npz")["logits"]
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()

    assert run("export", tmp_path / "lora", f"--out={tmp_path / 'again'}", "--lora=adapter") == 0
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    base = transformers.AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(loaded(torch.from_numpy(tokens).long()).logits, torch.from_numpy(expected))

    assert run("export", tmp_path / "lora", f"--out={tmp_path / 'merged'}", "--dtype=float32") == 0
    assert "outputs within" in capsys.readouterr().out
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    kept = model.merge_and_unload().state_dict()
    for name, value in whole.state_dict().items():
        # the base is kept in bfloat16, so that the sum is rounded to it
        assert torch.allclose(value, kept[name], rtol=2**-7, atol=1e-4), name
    with pytest.raises(UserError, match="carries no LoRA"):
        run("export", tower, f"--out={tmp_path / 'none'}", "--lora=adapter")


def test_adapters_that_do_not_fit(published, tower, tmp_path):
    other = tmp_path / "other"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | {"head_dim": 8})).save_pretrained(other)
    adapter(other, tmp_path / "for_other")
    out = f"--out={tmp_path / 'out'}"
    with pytest.raises(UserError, match=r"an adapter for another base: .*q_proj.lora_B.weight is \[48, 4\].*\[72, 4\]"):
        run("import", tmp_path / "for_other", f"--base={tower}", out)
    with pytest.raises(UserError, match="say which imported tower it is for by --base"):
        run("import", tmp_path / "for_other", out)
    adapter(published, tmp_path / "part", target_modules=["up_proj"])
    with pytest.raises(UserError, match="or of part of a layer"):
        run("import", tmp_path / "part", f"--base={tower}", out)
    adapter(published, tmp_path / "dora", use_dora=True)
    with pytest.raises(UserError, match="use_dora is True, which is not supported"):
        run("import", tmp_path / "dora", f"--base={tower}", out)
    assert not (tmp_path / "out").exists()


def broken(published: Path, folder: Path, change) -> Path:
    shutil.copytree(published, folder)
    change(folder)
    return folder


def rewrite_config(**changes):
    def change(folder: Path):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def truncate(folder: Path):
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def only_pickles(folder: Path):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def integers(folder: Path):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({name: np.zeros(value.shape, np.int32) for name, value in load_shapes.items()}, folder / "model.safetensors")


load_shapes: dict = {}


@pytest.mark.parametrize(
    "change, message",
    [
        (truncate, "model-00001-of-00003.safetensors: .* truncated or damaged"),
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "this shard of .* is missing"),
        (only_pickles, "a pickle runs whatever code it holds"),
        (lambda f: (f / "config.json").unlink(), "neither config.json nor adapter_config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no object"),
        (lambda f: (f / "model_index.json").write_text("{}"), "a whole pipeline; import its parts"),
        (rewrite_config(architectures=["GPTX"]), "unknown architecture 'GPTX'; known: .*LlamaForCausalLM.*Qwen3"),
        (rewrite_config(intermediate_size=99), r"mlp.*weight is \[.*100.*\], but config.json makes it \[.*99.*\]"),
        (rewrite_config(num_hidden_layers=2), "9 tensors have no place, the first 'model.layers.2"),
        (rewrite_config(num_hidden_layers=4), "9 tensors are missing, the first 'model.layers.3"),
        (rewrite_config(hidden_size=-48), "config.json does not describe a llama"),
        (rewrite_config(intermediate_size="big"), "config.json.* is 'big'; expected int"),
        (integers, "is int32; weights can be float64, float32"),
    ],
)
def test_sources_that_are_refused(published, tmp_path, change, message):
    load_shapes.update(tensors(published))
    source = broken(published, tmp_path / "source", change)
    with pytest.raises(UserError, match=message):
        run("import", source, f"--out={tmp_path / 'out'}", "--compare=no")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_files_that_are_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"\x80\x04K\x01.")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    (tmp_path / "x.txt").write_text("hello")
    for name, message in (("x.pt", "a pickle"), ("x.gguf", "not a whole GGUF"), ("x.txt", "neither a GGUF nor an ONNX"), ("y", "no such")):
        with pytest.raises(UserError, match=message):
            run("import", tmp_path / name, f"--out={tmp_path / 'out'}")


def test_what_stands_there_is_kept(published, tower, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    for command, source in (("import", published), ("export", tower)):
        with pytest.raises(UserError, match="already holds something; choose another --out, or say --overwrite"):
            run(command, source, f"--out={tmp_path / 'out'}")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert run("import", published, f"--out={tmp_path / 'out'}", "--overwrite", "--compare=no") == 0
    assert not (tmp_path / "out" / "mine").exists() and (tmp_path / "out" / "tower.json").exists()


def test_a_full_disk_leaves_nothing(published, tower, tmp_path, monkeypatch):
    import errno

    from g4v_jax.weights import tensors

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors.os, "fsync", full)
    for command, source in (("import", published), ("export", tower)):
        with pytest.raises(UserError, match="no space left for"):
            run(command, source, f"--out={tmp_path / 'out'}", "--compare=no")
    assert not list(tmp_path.iterdir())


def test_a_flipped_byte_is_seen(tower, tmp_path):
    copy = tmp_path / "tower"
    shutil.copytree(tower, copy)
    data = bytearray((copy / "weights.safetensors").read_bytes())
    data[-100] ^= 1
    (copy / "weights.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="is damaged .another SHA-256.; import it again"):
        TowerFolder(copy).verify()
