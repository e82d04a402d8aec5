"""What is known of the chips that a plan can be made for: peak rates, memory, links. Numbers and their sources only.

TPUs: the cloud documentation's system pages, and "How to Scale Your Model" (Austin et al. 2025), chapter 2, for links.
GPUs: NVIDIA's data sheets (dense bfloat16) and OpenXLA's target configs (`xla/backends/gpu/target_config/specs`).
"""

from dataclasses import dataclass, field

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device as a program sees it. Rates are a second: operations, or bytes one way."""

    platform: str  # of JAX: "tpu", "cuda", "cpu"
    flops: float  # bfloat16 with float32 sums, dense; float32 on a CPU. 0: unknown
    hbm: int  # bytes of memory
    hbm_rate: float
    link_rate: float  # of one link to a neighbour; of all links together where `dims` is 0
    dims: int  # of the torus; 0: every device reaches every other through a switch
    dcn_rate: float  # a device's share of the network between slices or nodes
    wraps: int = 0  # an axis of the torus closes to a ring from so many chips on (in steps of as many)
    devices: int = 1  # of a chip
    gpu: dict = field(default_factory=dict)  # what a GPU's compiler has to know


def _hopper(memory: int, rate: float, name: str) -> dict:
    return dict(major=9, cores=132, fpus=128, clock=1.98, shared=233472, shared_optin=232448, l2=52428800, memory=memory,
                rate=rate, accelerated=True, name=name)  # fmt: skip


CHIPS = {
    "v4": Chip("tpu", 275e12, 32 * GIB, 1.228e12, 4.5e10, 3, 6.25e9, wraps=4),
    "v5e": Chip("tpu", 197e12, 16 * GIB, 8.19e11, 5e10, 2, 3.125e9, wraps=16),
    "v5p": Chip("tpu", 459e12, 95 * GIB, 2.765e12, 1e11, 3, 6.25e9, wraps=4),
    "v6e": Chip("tpu", 918e12, 32 * GIB, 1.64e12, 1e11, 2, 1.25e10, wraps=16),
    "tpu7x": Chip("tpu", 1153.5e12, 96 * GIB, 3.69e12, 1e11, 3, 6.25e9, wraps=4, devices=2),
    "a100": Chip("cuda", 312e12, 85100068864, 2.039e12, 3e11, 0, 2.5e10,
                 gpu=dict(major=8, cores=108, fpus=64, clock=1.41, shared=167936, shared_optin=166912, l2=41943040,
                          memory=85100068864, rate=2.03904e12, accelerated=False, name="NVIDIA A100-SXM4-80GB")),
    "h100": Chip("cuda", 989e12, 84942979072, 3.352e12, 4.5e11, 0, 5e10,
                 gpu=_hopper(84942979072, 3.35232e12, "NVIDIA H100 80GB HBM3")),
    "h200": Chip("cuda", 989e12, 151397597184, 4.8e12, 4.5e11, 0, 5e10,
                 gpu=_hopper(151397597184, 4.8e12, "NVIDIA H200 141GB HBM3e")),
    "b200": Chip("cuda", 2250e12, 191514411008, 7.672e12, 9e11, 0, 5e10,
                 gpu=dict(_hopper(191514411008, 7.67232e12, "NVIDIA B200"), major=10, cores=148, clock=1.965, l2=132644864)),
    "cpu": Chip("cpu", 0, 0, 0, 0, 0, 0),
}  # fmt: skip
NODE = 8  # GPUs that share a switch
