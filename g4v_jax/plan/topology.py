"""Machines that are not here: from "v5p:4x4x8" to devices that a program can be compiled for, without one of them.

May hold the names of topologies, what the compilers ask for, and the devices. TPU programs are compiled by libtpu, GPU programs
by JAX's CUDA plugin; neither needs the hardware. Call `prepare` before JAX is used for anything.
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass

from g4v_jax.errors import UserError, nearest
from g4v_jax.plan.chips import CHIPS, NODE, Chip

EXAMPLES = "v5p:4x4x8, v5e:16x16, v4:4x4x8, v6e:16x16, tpu7x:4x4x4, h100:8, h200:16, a100:8, b200:64, cpu:8"


@dataclass(frozen=True)
class Target:
    """A topology that was asked for: `slices` times a torus of `shape`, or nodes of GPUs."""

    name: str  # as asked for, such as "v5p:4x4x8"
    kind: str  # key of CHIPS
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def count(self) -> int:
        """Devices of all slices."""
        return math.prod(self.shape) * self.slices * self.chip.devices


def parse(text: str, slices: int = 1) -> Target:
    """Read "KIND:SHAPE". Raises UserError, which lists what there is, for anything else."""
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology: unknown {kind!r}{nearest(kind, CHIPS)}; such as {EXAMPLES}")
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", shape):
        raise UserError(f"--topology: {text!r} has no size; such as {EXAMPLES}")
    sizes = tuple(map(int, shape.split("x")))
    wanted = chip.dims or 1
    if len(sizes) != wanted:
        raise UserError(f"--topology: {kind} has {wanted} dimension(s), {text!r} has {len(sizes)}; such as {EXAMPLES}")
    if slices < 1:
        raise UserError(f"--slices is {slices}; it must be at least 1")
    if chip.platform == "cpu" and slices > 1:
        raise UserError("--slices: CPUs have none; leave it out")
    if chip.platform == "cuda":
        if sizes[0] > NODE and sizes[0] % NODE:
            raise UserError(f"--topology: {sizes[0]} GPUs are no whole nodes of {NODE}; nearest: {sizes[0] // NODE * NODE}")
        if slices > 1:
            raise UserError(f"--slices: nodes of {NODE} GPUs are counted by themselves; ask for {kind}:{sizes[0] * slices}")
    if math.prod(sizes) * slices > 16384:
        raise UserError(f"--topology: {text!r} with {slices} slice(s) is more than 16,384 chips")
    return Target(text, kind, sizes, slices)


def prepare(target: Target) -> None:
    """Set what the compilers read from the environment. Raises UserError where the compiler is not installed."""
    platform = target.chip.platform
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(f"{target.name}: compiling for a TPU needs its compiler: pip install 'g4v_jax[tpu]' (libtpu, 200 MB)")
    if platform == "cuda" and importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise UserError(f"{target.name}: compiling for a GPU needs its compiler: pip install 'g4v_jax[gpu]' (500 MB)")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: it names no topology of ours, but libtpu asks for one
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    if platform == "cpu":
        import jax

        jax.config.update("jax_num_cpu_devices", target.count)


def devices(target: Target) -> list:
    """The devices of a target, in JAX's order. Raises UserError where the compiler knows no such topology."""
    import jax
    from jax.experimental import topologies

    chip = target.chip
    if chip.platform == "cpu":
        return jax.devices()[: target.count]
    if chip.platform == "cuda":
        nodes, gpus = max(1, target.shape[0] // NODE), min(target.shape[0], NODE)
        options = dict(topology_name="", topology=f"1x{nodes}x{gpus}", target_config=gpu_config(chip.gpu))
    else:
        options = dict(topology_name=target.name, **({"num_slices": target.slices} if target.slices > 1 else {}))
    try:
        return list(topologies.get_topology_desc(platform=chip.platform, **options).devices)
    except Exception as error:  # whatever the plugin raises: its types are not public
        text = str(error).strip().split("\n")[0]
        if "lock" in text.lower():
            raise UserError(f"{target.name}: another process is using libtpu ({text}); wait until it has ended") from error
        raise UserError(f"{target.name}: the compiler knows no such topology ({text}); such as {EXAMPLES}") from error


def gpu_config(gpu: dict) -> str:
    """XLA's description of a GPU as text (stream_executor.GpuTargetConfigProto)."""
    extension = "ACCELERATED_FEATURES" if gpu["accelerated"] else "NONE"
    info = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu["shared"], "threads_per_core_limit": 2048, "core_count": gpu["cores"],
        "fpus_per_core": gpu["fpus"], "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535, "memory_bandwidth": int(gpu["rate"]), "l2_cache_size": gpu["l2"],
        "clock_rate_ghz": gpu["clock"], "device_memory_size": gpu["memory"],
        "shared_memory_per_block_optin": gpu["shared_optin"], "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536, "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
    }  # fmt: skip
    lines = [f"  {name}: {value}" for name, value in info.items()]
    lines.append(f"  cuda_compute_capability {{ major: {gpu['major']} feature_extension: {extension} }}")
    lines.append('  device_vendor: "NVIDIA Corporation"\n  runtime_version: "12.8.0"\n  dnn_version: "9.10.0"')
    version = "dnn_version_info { major: 9 minor: 10 patch: 0 }"
    name = gpu["name"]
    return "\n".join(["gpu_device_info {", *lines, "}", 'platform_name: "CUDA"', version, f'device_description_str: "{name}"'])
