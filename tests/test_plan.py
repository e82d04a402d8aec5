"""Plans against programs whose figures are known: loops, products, traffic, collectives and buffers read from compiled text."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from g4v_jax import sharding
from g4v_jax.errors import UserError
from g4v_jax.plan import advice, buffers, cache, collectives, hlo, roofline, topology, work
from g4v_jax.plan.account import arithmetic, model_arithmetic
from g4v_jax.plan.chips import CHIPS
from g4v_jax.plan.compiled import DoesNotFit, _refused, compile_step, tower_of
from g4v_jax.plan.report import report
from g4v_jax.plan.table import table

ROOT = Path(__file__).parent.parent
MESH = {"replica": 1, "fsdp": 4, "context": 1, "tensor": 2}


def same(scope: str) -> str:
    return "all"


def compiled(function, *shapes, mesh=None, specs=None, out=None) -> hlo.Program:
    """A program of f32 arrays of `shapes`, on one device or on `mesh` with `specs`."""
    shardings = [NamedSharding(mesh, spec) for spec in specs] if mesh else [None] * len(shapes)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=one) for shape, one in zip(shapes, shardings)]
    options = {"out_shardings": NamedSharding(mesh, out)} if out is not None else {}
    return hlo.parse(jax.jit(function, **options).lower(*arrays).compile().as_text())


# Reading a program


def test_a_loop_runs_its_body_as_often_as_it_turns():
    def loop(x, w):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0], None), x, length=5)[0]

    program = compiled(loop, (8, 16), (16, 16))
    assert work.flops(program, same) == {"all": 5 * 3 * 2 * 8 * 16 * 16}
    assert 15 in program.times.values()


TPU_LOOP = """
HloModule step

%body.1 (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %t.1 = (s32[], f32[4]{0}) tuple(%p.1)
}

%condition.1 (p.2: (s32[], f32[4])) -> pred[] {
  %p.2 = (s32[], f32[4]{0}) parameter(0)
  %constant.7 = s32[]{:T(128)} constant(12)
  %get-tuple-element.3 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.3, %constant.7), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0:T(128)S(1)} parameter(0)
  %kernel = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="a
}}
b"}
  %while.1 = (s32[], f32[4]{0}) while(%kernel), condition=%condition.1, body=%body.1
  ROOT %out = f32[4]{0} get-tuple-element(%while.1), index=1
}
"""


def test_a_tpus_text_has_no_trip_counts_and_brackets_where_a_computation_does_not_end():
    program = hlo.parse(TPU_LOOP)
    assert program.times == {"main": 1, "condition.1": 12, "body.1": 12}
    lines = {one.name: one for one in program.computations["main"]}
    assert set(lines) == {"x", "kernel", "while.1", "out"}
    assert [array.in_hbm for array in lines["x"].arrays] == [False] and lines["kernel"].arrays[0].bytes == 16
    with pytest.raises(ValueError, match="turns of while.1 is not known"):
        hlo.parse(TPU_LOOP.replace("constant(12)", "parameter(1)")).times
    with pytest.raises(ValueError, match="no compiled program"):
        hlo.parse("HloModule nothing")


@pytest.mark.parametrize("dtype, size", [("pred", 1), ("s4", 0.5), ("bf16", 2), ("f32", 4), ("f8e4m3fn", 1), ("c64", 8), ("u64", 8)])
def test_bytes_of_arrays(dtype, size):
    one = hlo.Instruction("x", f"{dtype}[8,3]{{1,0}}", "add", "%a, %b)", False)
    assert one.arrays[0].bytes == 24 * size


# Arithmetic and traffic


def test_products_and_convolutions():
    once = 2 * 7 * 3 * 4 * 5
    assert work.flops(compiled(lambda a, b: jnp.einsum("nij,njk->nik", a, b), (7, 3, 4), (7, 4, 5)), same)["all"] == once
    for stride, padding in ((1, "VALID"), (2, "VALID")):
        convolve = partial(jax.lax.conv_general_dilated, window_strides=(stride, stride), padding=padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        out = (8 - 3) // stride + 1
        assert work.flops(compiled(convolve, (2, 8, 8, 6), (3, 3, 6, 4)), same)["all"] == 2 * 2 * out * out * 4 * 9 * 6


def test_a_convolutions_window_is_in_the_order_of_its_axes_whatever_the_layout():
    """A weight's gradient on a TPU: [4 2048 4096] with [4 2048 32 128], as a window of 32 by 4 that mostly meets zeros."""
    text = """ENTRY %main (x: f32[4]) -> f32[4] {
  %x = bf16[4,2048,4096,1]{2,1,3,0} parameter(0)
  %g = bf16[4,2048,32,128]{3,1,2,0} parameter(1)
  ROOT %k = bf16[4096,32,128,1]{2,0,1,3} convolution(%x, %g), window={size=32x4 pad=31_31x0_0 rhs_reversal=1x0}, dim_labels=1fb0_1i0o->b0f1
}
"""
    assert work.flops(hlo.parse(text), same)["all"] == 2 * 4 * 2048 * 4096 * 32 * 128


@pytest.mark.parametrize("length, kernel, out, pad, stride, dilation, expected", [
    (5, 3, 3, 0, 1, 1, 9),  # all inside
    (5, 3, 5, 1, 1, 1, 13),  # two taps of ten meet the padding
    (4, 4, 4, 0, 3, 4, 4),  # a batched product of a TPU: each output has one tap that meets an input
    (4, 4, 1, 0, 1, 1, 4),
])  # fmt: skip
def test_taps_that_meet_an_input(length, kernel, out, pad, stride, dilation, expected):
    assert work.met(length, kernel, out, pad, stride, dilation, 1) == expected


def test_the_step_does_what_its_jaxpr_says_and_no_more_on_eight_devices():
    one, eight = (compile_step(tiny.build(n)) for n in (1, 8))
    said = sum(arithmetic(tiny.build(1)).values())
    assert sum(one.flops.values()) <= 1.01 * said  # the compiler drops what nobody reads
    assert sum(one.flops.values()) >= sum(model_arithmetic(tiny.build(1)).values()) * 0.99
    assert 8 * sum(eight.flops.values()) <= 1.02 * sum(one.flops.values())


def test_traffic_of_kernels_slices_and_updates():
    size = 1000 * 4
    assert work.traffic(compiled(lambda x: x + 1, (1000,)), same)["all"] == 2 * size

    def sliced(x, i):
        return jax.lax.dynamic_slice(x, (i.astype(int)[0], 0), (1, 10)) * 2

    assert work.traffic(compiled(sliced, (1000, 10), (1,)), same)["all"] < 1000  # not the whole table

    def stacked(x):
        return jax.lax.scan(lambda c, _: (c + 1, c), x, length=50)[1]

    moved = work.traffic(compiled(stacked, (1000,)), same)["all"]
    assert 50 * 2 * size <= moved <= 50 * 8 * size  # each turn moves some rows of the stack, not all fifty


# Collectives


def found(function, *shapes, specs, out) -> list:
    mesh = sharding.make_mesh(MESH, jax.devices())
    mapped = jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=out, check_vma=False)
    return collectives.collectives(compiled(mapped, *shapes, mesh=mesh, specs=specs), mesh, same)


ROWS, WHOLE = PartitionSpec("fsdp"), PartitionSpec()


@pytest.mark.parametrize("function, out, kind, axis, sent", [
    (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), WHOLE, "all-gather", "fsdp", 64 * 4 * 3 // 4),
    (lambda x: jax.lax.psum(x, "fsdp"), WHOLE, "all-reduce", "fsdp", 2 * 16 * 4 * 3 // 4),
    (lambda x: jax.lax.psum(x, "tensor"), ROWS, "all-reduce", "tensor", 2 * 16 * 4 // 2),
    (lambda x: jax.lax.psum(x, ("fsdp", "tensor")), WHOLE, "all-reduce", "fsdp+tensor", 2 * 16 * 4 * 7 // 8),
    (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), ROWS, "reduce-scatter", "fsdp", 16 * 4 * 3 // 4),
    (lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)]), ROWS, "collective-permute", "fsdp", 16 * 4),
])  # fmt: skip
def test_each_kind_is_counted_with_its_axis_and_what_a_device_sends(function, out, kind, axis, sent):
    (one,) = found(function, (64,), specs=[ROWS], out=out)
    assert (one.kind, one.axis, one.count, one.bytes, one.slow) == (kind, axis, 1, sent, False)


def test_steps_over_the_sides_of_a_torus_count_each_though_they_share_a_channel():
    near, far = ([[0, 1], [2, 3]], [[0, 2], [1, 3]])

    def steps(x):
        for groups in (far, near):
            x = jax.lax.psum_scatter(x, "fsdp", axis_index_groups=groups, tiled=True)
        return x

    total = sum(one.bytes for one in found(steps, (64,), specs=[ROWS], out=ROWS))
    assert total == 16 * 4 * 3 // 4  # as in one step over all four


FUSED = """%all-reduce-scatter.1 (p: bf16[64,128]) -> bf16[16,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  %all-reduce.1 = bf16[64,128]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %i = u32[] partition-id()
  ROOT %part = bf16[16,128]{1,0} dynamic-slice(%all-reduce.1, %i, %i), dynamic_slice_sizes={16,128}
}

ENTRY %main (x: bf16[64,128]) -> bf16[16,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  ROOT %f = bf16[16,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_reduction_fused_with_its_slice_sends_each_device_its_part_alone():
    (one,) = collectives.collectives(hlo.parse(FUSED), sharding.make_mesh(MESH, jax.devices()), same)
    assert (one.kind, one.axis, one.bytes) == ("reduce-scatter", "fsdp", 64 * 128 * 2 * 3 // 4)


def test_a_sum_that_is_done_again_before_a_loop_counts_there_too():
    line = "  %r.{n} = bf16[16,128]{{1,0}} reduce-scatter(%x), channel_id=1, replica_groups={{{{0,2,4,6}},{{1,3,5,7}}}}, dimensions={{0}}, to_apply=%add"
    body = "\n".join(line.format(n=n) for n in (1, 2))
    text = f"ENTRY %main (x: bf16[64,128]) -> bf16[16,128] {{\n  %x = bf16[64,128]{{1,0}} parameter(0)\n{body}\n}}\n"
    (one,) = collectives.collectives(hlo.parse(text), sharding.make_mesh(MESH, jax.devices()), same)
    assert (one.kind, one.count, one.bytes) == ("reduce-scatter", 2, 2 * 16 * 128 * 2 * 3)


def test_a_gather_that_is_done_once_more_before_its_loop_counts_there_too():
    gather = "  %g.{n} = f32[64]{{0}} all-gather(%p), channel_id=1, replica_groups={{{{0,2,4,6}},{{1,3,5,7}}}}, dimensions={{0}}"
    twice = gather.format(n=1) + "\n" + gather.format(n=2)  # repeated in the loop, as to overlap it
    text = TPU_LOOP.replace("  ROOT %t.1", twice + "\n  ROOT %t.1").replace("  ROOT %out", gather.format(n=3) + "\n  ROOT %out")
    (one,) = collectives.collectives(hlo.parse(text), sharding.make_mesh(MESH, jax.devices()), same)
    assert (one.count, one.bytes) == (12 + 1, 13 * 64 * 4 * 3 // 4)


def test_a_collective_in_a_loop_counts_every_turn():
    def loop(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "fsdp") * 0.1, None), x, length=9)[0]

    (one,) = found(loop, (64,), specs=[ROWS], out=ROWS)
    assert (one.kind, one.count, one.bytes) == ("all-reduce", 9, 9 * 2 * 64 * 3 // 4)


@pytest.mark.parametrize("spelling, group", [
    ("replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add", [0, 2, 4, 6]),
    ("replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true", [0, 2, 4, 6]),
    ("replica_groups=[2,4]<=[8], dimensions={0}", [0, 1, 2, 3]),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, use_global_device_ids=true", [0, 2, 4, 6]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_1','axis_2'}, to_apply=%add", [0, 1, 2, 3]),
    ("dimensions={0}", list(range(8))),
])  # fmt: skip
def test_four_spellings_of_groups(spelling, group):
    one = hlo.Instruction("g", "f32[8]", "all-gather", f"%x), channel_id=1, {spelling}", False)
    assert collectives._group(one, 8) == group


def test_what_the_compiler_repeats_under_one_channel_counts_once_and_as_rarely_as_it_may():
    body = TPU_LOOP.replace("  ROOT %t.1", "  %g.1 = f32[32]{0} all-gather(%x), channel_id=5, replica_groups=[1,8]<=[8]\n  ROOT %t.1")
    body = body.replace("  ROOT %out", "  %g.2 = f32[32]{0} all-gather(%x), channel_id=5, replica_groups=[1,8]<=[8]\n  ROOT %out")
    mesh = sharding.make_mesh({"fsdp": 8}, jax.devices())
    (one,) = collectives.collectives(hlo.parse(body), mesh, same)
    assert (one.count, one.bytes) == (1, 32 * 4 * 7 // 8)


# Buffers


def test_buffers_that_live_together_and_whose_they_are():
    def chain(x):
        with jax.named_scope("llm"):
            big = jnp.sin(x @ x.T)  # [1000 1000]
        with jax.named_scope("vision"):
            return jnp.sum(jnp.cos(big @ x), axis=1)

    largest = buffers.fullest(compiled(chain, (1000, 10)), tower_of)[0]
    assert (largest.bytes, largest.tower, largest.type) == (4_000_000, "llm", "f32[1000, 1000]")


# Machines


def test_topologies():
    target = topology.parse("v5p:4x4x8", 2)
    assert (target.kind, target.shape, target.count) == ("v5p", (4, 4, 8), 256)
    assert topology.parse("tpu7x:2x2x2").count == 16 and topology.parse("h100:8").count == 8
    for text, slices, message in (
        ("v5q:4x4", 1, "unknown 'v5q'; did you mean 'v5p'"), ("v5p", 1, "has no size"), ("v5p:4x4", 1, "3 dimension"),
        ("v5e:4x4x4", 1, "2 dimension"), ("h100:12", 1, "nearest: 8"), ("h100:8", 2, "ask for h100:16"), ("cpu:8", 2, "leave it out"),
        ("v5e:0x4", 1, "has no size"), ("v5p:64x64x64", 1, "more than 16,384"), ("v5e:4x4", 0, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            topology.parse(text, slices)


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    for text, extra in (("v5e:4x4", "tpu"), ("h100:8", "gpu")):
        with pytest.raises(UserError, match=rf"pip install 'g4v_jax\[{extra}\]'"):
            topology.prepare(topology.parse(text))


def test_a_gpus_description_says_what_its_compiler_asks_for():
    text = topology.gpu_config(CHIPS["h100"].gpu)
    assert "core_count: 132" in text and "major: 9" in text and text.count("{") == text.count("}")
    assert all(chip.gpu for chip in CHIPS.values() if chip.platform == "cuda")


def test_links_of_a_torus_close_to_rings_where_it_is_long_enough():
    line, plane = (collectives.along([SimpleNamespace(coords=[x, 0, z]) for x in range(4) for z in range(n)]) for n in (1, 4))
    assert (line, plane) == (((0, 4),), ((0, 4), (2, 4)))
    chip = CHIPS["v5p"]
    assert roofline.link_rate(chip, line) == 2 * chip.link_rate
    assert roofline.link_rate(chip, plane) == 4 * chip.link_rate
    assert roofline.link_rate(CHIPS["v5e"], line) == CHIPS["v5e"].link_rate  # 4 of 16: an open chain
    assert roofline.link_rate(CHIPS["h100"], ()) == CHIPS["h100"].link_rate
    assert roofline.link_rate(chip, ()) == float("inf")  # within a chip


def test_a_bound_is_what_takes_longest():
    def sent(kind, slow, *along):
        return collectives.Collective(kind, "fsdp", slow, "llm", along, 1, 10**9)

    x, y = (0, 4), (1, 4)
    both = [sent("all-gather", False, x), sent("all-gather", True, x)]
    one = roofline.bound(CHIPS["v5p"], 4.59e14, 2.765e12, both, 2.295e14)
    assert (one.compute_s, one.hbm_s, one.ici_s, one.dcn_s) == (1.0, 1.0, pytest.approx(0.005), pytest.approx(0.16))
    assert one.mfu == pytest.approx(0.5) and one.step_s == 1.0 and one.limit == "arithmetic"
    for links, seconds in (([x, y], 0.005), ([x, x], 0.01)):  # other sides have other links
        each = [sent("reduce-scatter", False, side) for side in links]
        assert roofline.bound(CHIPS["v5p"], 1.0, 1.0, each, 1.0).ici_s == pytest.approx(seconds)
    assert roofline.bound(CHIPS["v5p"], 1.0, 1.0, [sent("all-gather", False, x, y)], 1.0).ici_s == pytest.approx(0.0025)


def test_a_refusal_for_want_of_memory_becomes_a_sentence():
    text = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (21.02G) exceeds "
            "available HBM (15.75G).")  # fmt: skip
    error = _refused(text)
    assert isinstance(error, DoesNotFit) and (error.needs, error.has) == (21.02 * 2**30, 15.75 * 2**30)
    assert "needs 21.02 of 15.75 GiB" in str(error)
    assert not isinstance(_refused("INTERNAL: something else"), DoesNotFit)


def test_a_plan_of_the_tiny_model_adds_up():
    build, target = tiny.build(8), topology.parse("cpu:8")
    step = compile_step(build)
    plan = report(target, build, step)
    assert plan["bound"] is None and plan["devices"] == 8 and plan["mesh"]["fsdp"] == 8
    held = sum(one["memory"]["arguments"] for one in plan["towers"].values())
    assert held == plan["memory"]["arguments"] + plan["memory"]["idle"]
    memory = plan["memory"]
    assert memory["needed"] == memory["arguments"] + memory["temporaries"] + max(0, memory["outputs"] - memory["aliased"])
    assert 0 < plan["memory"]["idle"] < plan["towers"]["autoencoder"]["memory"]["arguments"]  # training decodes nothing
    for name in ("model", "compiled"):
        assert sum(one["flops"][name] for one in plan["towers"].values()) == pytest.approx(plan["flops"][name])
    sent = sum(one["bytes"] for one in plan["collectives"])
    assert sent == sum(line["bytes"] for one in plan["towers"].values() for line in one["collectives"]) > 0
    assert plan["towers"]["llm"]["parameters"]["trainable"] > 0 and "llm" in table(plan)
    json.dumps(plan)


def test_the_command_writes_a_table_and_json(tmp_path):
    command = [sys.executable, "-m", "g4v_jax", "plan", "--config=configs/quickstart.py:autoencoder", "--topology=cpu:2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([*command, f"--json={tmp_path / 'plan.json'}"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cpu:2: 2 devices, fsdp 2" in done.stdout and "autoencoder" in done.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["flops"]["compiled"] > 0
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert again.stdout == "the same plan was made before; --fresh makes it again\n\n" + done.stdout
    failed = subprocess.run([*command[:-1], "--topology=v9:2x2"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert failed.returncode == 2 and "unknown 'v9'" in failed.stderr and "Traceback" not in failed.stderr


def test_advice_names_what_is_large_and_fields_that_are_not_set_yet():
    build = tiny.build(8)
    assert advice.rows_a_device(build) == 1
    text = advice.advise(build)
    assert "GiB" in text and 'model.llm.remat="full"' in text and "losses.chunks=8" in text and "mesh.context=2" in text
    assert "micro_batches" not in text
    assert "step.micro_batches=8" in advice.advise(tiny.build(1))


def test_a_plan_is_kept_for_the_same_config_machine_and_code(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, target = tiny.config(), topology.parse("cpu:8")
    name = cache.key(config, target)
    assert cache.load(name) is None
    cache.save(name, {"devices": 8})
    assert cache.load(name) == {"devices": 8}
    others = [cache.key(tiny.config(rows__rows=16), target), cache.key(config, topology.parse("cpu:4"))]
    monkeypatch.setattr(cache, "COMPILERS", ("numpy",))
    assert len({name, cache.key(config, target), *others}) == 4
    file = cache.folder() / f"{name}.json"
    for damage in (file.read_text().replace("8", "9"), "not JSON", "[]"):
        file.write_text(damage)
        assert cache.load(name) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    cache.save(name, {"devices": 8})  # no place for it: made again next time


def test_more_than_a_device_has_does_not_fit_though_the_compiler_takes_it():
    build = tiny.build(8, fsdp=4, tensor=2)
    with pytest.raises(DoesNotFit, match=r"needs 0.00 of 0.00 GiB") as refused:
        compile_step(build, memory_has=1000)
    assert refused.value.needs > refused.value.has == 1000
