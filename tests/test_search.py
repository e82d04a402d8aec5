"""The search for a mesh: candidates that divide, an estimate in the right order, and only finalists compiled."""

from types import SimpleNamespace

import jax
import pytest
import tiny

from g4v_jax.errors import UserError
from g4v_jax.plan import search, topology
from g4v_jax.plan.compiled import Compiled, DoesNotFit

TARGET = topology.parse("h100:8")


def compiled(memory: int) -> Compiled:
    sizes = dict(arguments=memory // 2, outputs=0, aliased=0, temporaries=memory - memory // 2, peak=memory, needed=memory)
    return Compiled(sizes, {"llm": 10**9}, {"llm": 10**6}, [], [], 1.0, "")


def run(finalists: int = 2, config=None, compile_=None, target=TARGET):
    tried, said = [], []

    def remember(build, memory_has):
        assert memory_has == target.chip.hbm
        tried.append(build)
        return compile_(build) if compile_ else compiled(10**6 + len(tried))

    ranked = search.search(config or tiny.config(), target, tuple(jax.devices()), finalists, remember, said.append)
    return ranked, tried, said


def test_candidates_are_meshes_of_all_devices_whose_rows_divide():
    found = list(search.candidates(tiny.config(rows__rows=8), TARGET))
    meshes = {one.mesh for one in found}
    assert {one.remat for one in found} == {"none", "dots", "attention", "full"}
    assert len(set(found)) == len(found) and len(meshes) > 8
    for one in found:
        sizes = dict(one.mesh)
        assert sizes["replica"] * sizes["fsdp"] * sizes["context"] * sizes["tensor"] == 8
        assert 8 % (sizes["replica"] * sizes["fsdp"] * one.micro_batches) == 0
    two = topology.parse("v5e:2x2", slices=2)
    assert {dict(one.mesh)["replica"] % 2 for one in search.candidates(tiny.config(), two)} == {0}


def test_a_candidate_sets_fields_of_a_copy():
    config = tiny.config()
    one = search.Candidate((("replica", 1), ("fsdp", 4), ("context", 1), ("tensor", 2)), 2, "full")
    changed = one.apply(config)
    assert changed.mesh.tensor == 2 and changed.step.micro_batches == 2 and changed.step.ema_decay == 0.9
    assert changed.model.llm.remat == changed.model.denoiser.remat == "full" and "remat" not in config.model.llm
    assert 'model.llm.remat = "full"' in one.fields(config) and "step.micro_batches = 2" in one.fields(config)


def estimates(**changes) -> dict[tuple, search.Estimate]:
    _, found = search._estimates(tiny.config(rows__rows=32, **changes), TARGET, tuple(jax.devices()))
    return {(one.candidate.mesh, one.candidate.micro_batches, one.candidate.remat): one for one in found}


def test_estimates_are_in_the_order_that_memory_and_time_have():
    found = estimates()
    mesh = (("replica", 1), ("fsdp", 8), ("context", 1), ("tensor", 1))
    memory = [found[mesh, 1, policy].memory for policy in ("none", "dots", "full")]
    assert memory == sorted(memory, reverse=True) and memory[0] > memory[2]
    assert found[mesh, 4, "none"].memory < found[mesh, 1, "none"].memory
    assert found[mesh, 1, "full"].bound.compute_s > found[mesh, 1, "none"].bound.compute_s
    assert found[mesh, 4, "none"].bound.ici_s > found[mesh, 1, "none"].bound.ici_s  # weights are gathered four times
    wider = (("replica", 4), ("fsdp", 2), ("context", 1), ("tensor", 1))
    assert found[wider, 1, "none"].memory > found[mesh, 1, "none"].memory


def test_finalists_alone_are_compiled_and_the_fastest_comes_first():
    def uneven(build):
        one = compiled(10**6)
        one.flops["llm"] = 10**13 * (4 - len(order))
        order.append(build)
        return one

    order = []
    ranked, tried, said = run(finalists=3, compile_=uneven)
    assert len(tried) == 3 == len(ranked)
    seconds = [row["bound"]["step_s"] for row in ranked]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
    assert "compiling the best 3" in said[0] and len(said) == 4
    text = search.table(ranked)
    assert text.count("\n") > 6 and f"config.{ranked[0]['fields'][0]}" in text


def test_what_the_compiler_refuses_makes_room_for_the_next():
    def refuse_first(build):
        if len(seen) < 2:
            seen.append(build)
            raise DoesNotFit("needs 2.00 of 1.00 GiB", None, None)
        return compiled(10**6)

    seen = []
    ranked, tried, said = run(finalists=2, compile_=refuse_first)
    assert len(ranked) == 2 and len(tried) == 4
    assert sum("does not fit (needs 2.00 of 1.00 GiB)" in line for line in said) == 2


def test_mistakes_are_named():
    with pytest.raises(UserError, match="nothing is known of its speed"):
        run(target=topology.parse("cpu:8"))

    def never(build):
        raise DoesNotFit("needs 2.00 of 1.00 GiB", None, None)

    with pytest.raises(UserError, match="none of the 2 best candidates fits"):
        run(finalists=1, compile_=never)
    small = SimpleNamespace(name="toy:8", slices=1, count=8, chip=SimpleNamespace(flops=1e9, hbm=1000, hbm_rate=1e9, link_rate=1e9, dims=0, dcn_rate=1e9, devices=1))
    with pytest.raises(UserError, match="toy:8: does not fit: the smallest of .* candidates needs about"):
        run(target=small)
    with pytest.raises(UserError, match="no mesh of 8 devices suits"):
        run(config=tiny.config(rows__rows=7, rows__tokens=49, model__llm__num_heads=3, model__llm__num_kv_heads=3))
