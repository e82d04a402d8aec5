"""Attention kernels: the one that is chosen, what is said of it, and splash attention against the plain path on a mesh."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal

from g4v_jax import cli, sharding
from g4v_jax.errors import UserError
from g4v_jax.nn import kernels
from g4v_jax.nn.attention import attend, plain
from g4v_jax.nn.kernels import Packed, choose

MESH = {"fsdp": 2, "context": 2, "tensor": 2}


def heads(batch: int, length: int, count: int, seed: int, dim: int = 16, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(normal(batch, length, count, dim, seed=seed), dtype)


@pytest.fixture
def segments() -> jax.Array:
    """i32 [4 256]: three segments a row, then padding."""
    starts = np.sort(np.random.default_rng(0).integers(1, 256, (4, 3)), axis=1)
    ends = np.sum(np.arange(256)[None, :, None] >= starts[:, None], axis=-1)
    return jnp.asarray((ends + 1) % 4, jnp.int32)


@pytest.mark.parametrize("case", ["causal", "window", "both ways", "padded", "cross", "many blocks"])
def test_splash_gives_the_values_and_gradients_of_the_plain_path(case, segments):
    axes = ("rows", "sequence", "heads", "kv_heads")
    q, k, v, direction = heads(4, 256, 4, 0), heads(4, 256, 2, 1), heads(4, 256, 2, 2), heads(4, 256, 4, 3)
    mask = Packed(segments)
    if case == "window":
        mask = Packed(segments, window=40)
    elif case == "both ways":
        mask = Packed(segments, causal=False)
    elif case == "padded":  # no multiple of the kernel's blocks, nor of blocks on each device
        q, k, v, direction, mask = q[:, :202], k[:, :202], v[:, :202], direction[:, :202], Packed(segments[:, :202])
    elif case == "cross":
        q, k, v, direction, mask = q[:, :130], k[:, :70], v[:, :70], direction[:, :130], None
        axes = ("rows", "latents", "heads", "kv_heads")
    elif case == "many blocks":  # of keys, so that queries have a backward pass of their own
        q, direction, mask = heads(4, 256, 4, 0), heads(4, 256, 4, 3), None
        k, v = (heads(4, (kernels.COPIES + 1) * kernels.LANES, 2, seed) for seed in (1, 2))
        axes = ("rows", "latents", "heads", "kv_heads")

    def value(attention, q, k, v):
        return jnp.sum(attention(q, k, v) * direction)

    def by_splash(q, k, v):
        return kernels.splash(q, k, v, mask, axes, interpret=True)

    def by_plain(q, k, v):
        return plain(q, k, v, None if mask is None else mask.allowed())

    with jax.set_mesh(sharding.make_mesh(MESH)):
        found, wanted = (
            jax.jit(jax.value_and_grad(lambda *inputs: value(attention, *inputs), (0, 1, 2)))(q, k, v)
            for attention in (by_splash, by_plain)
        )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-3)
    for one, other in zip(found[1], wanted[1]):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("asked", "platform", "wanted"),
    [
        ("auto", "cpu", "plain"),
        ("auto", "none", "plain"),
        ("auto", "tpu", "splash"),
        ("plain", "tpu", "plain"),
        ("splash", "tpu", "splash"),
    ],
)
def test_the_platform_decides(asked, platform, wanted, segments):
    q = heads(4, 256, 2, 0)
    assert choose(asked, platform, q, q, Packed(segments)) == wanted


def test_few_queries_or_a_mask_of_their_own_are_plain(segments):
    q = heads(4, 256, 2, 0)
    assert choose("auto", "tpu", q[:, :65], q, None) == "plain"
    assert choose("splash", "tpu", q[:, :65], q, None) == "splash"
    many = heads(1, 2048, 2, 0)
    assert choose("auto", "tpu", q[:, :65], many, None) == "splash"  # few queries, many keys
    assert choose("auto", "tpu", q[:, :8], many, None) == "plain"
    assert choose("splash", "cpu", q[:, :1], q, jnp.ones((4, 1, 256), bool)) == "plain"  # decoding


@pytest.mark.parametrize(
    ("asked", "platform", "dtype", "dim", "words"),
    [
        ("splash", "cpu", jnp.float32, 16, "made for TPUs, and this is cpu"),
        ("cudnn", "tpu", jnp.bfloat16, 16, "made for NVIDIA GPUs, and this is tpu"),
        ("cudnn", "gpu", jnp.float32, 16, "not in float32"),
        ("cudnn", "gpu", jnp.bfloat16, 12, "heads are 12 wide"),
        ("cudnn", "gpu", jnp.bfloat16, 16, "cuDNN is not on this machine"),
        ("flash", "tpu", jnp.float32, 16, "attention 'flash' is not known"),
    ],
)
def test_a_kernel_that_cannot_run_is_an_error(asked, platform, dtype, dim, words):
    q = heads(1, 256, 2, 0, dim, dtype)
    with pytest.raises(UserError, match=words):
        choose(asked, platform, q, q, None)


def test_what_is_chosen_is_told_once_and_a_fall_back_warns(caplog):
    kernels._tell.cache_clear()
    q = heads(1, 256, 2, 0, dtype=jnp.bfloat16)
    with caplog.at_level(logging.INFO, "g4v_jax.nn.kernels"):
        for _ in range(2):
            choose("auto", "tpu", q, q, None)
            choose("auto", "gpu", q, q, None)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "attention: splash on tpu"),
        ("WARNING", "attention: plain instead of cudnn: cuDNN is not on this machine"),
    ]


def test_a_config_that_asks_for_what_is_not_here_is_one_line(capsys):
    with pytest.raises(UserError, match="attention 'splash' cannot run"), jax.set_mesh(sharding.make_mesh({"fsdp": -1})):
        attend(heads(1, 4, 2, 0), heads(1, 4, 2, 1), heads(1, 4, 2, 2), kernel="splash")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["check", "--config=configs/llama2_7b.py", "--devices=8", "--flops", "--config.model.llm.attention=splash"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "g4v: error: attention 'splash' cannot run: it is made for TPUs, and this is cpu; use auto or plain\n"
