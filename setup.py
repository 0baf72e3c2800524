"""Metadata and layout: kernels/ installs as swinfast.kernels, reference/ as swinfast.reference."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
PARQUET, RAY = ["pyarrow"], ["ray[data]>=2.50"]
TEST = [
    "hypothesis",
    "matplotlib",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "ruff",
    "setuptools>=64",
    "timm==1.0.31",
]

setup(
    name="swinfast",
    version=re.search(r'__version__ = "(.+)"', (HERE / "swinfast/__init__.py").read_text(encoding="utf-8"))[1],
    description="Fast Swin Transformer V2 inference with unchanged answers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["swinfast", "swinfast.batch", "swinfast.kernels", "swinfast.reference"],
    package_dir={"swinfast": "swinfast", "swinfast.kernels": "kernels", "swinfast.reference": "reference"},
    package_data={"swinfast": ["imagenet_classes.*"], "swinfast.kernels": ["configs/*.json"]},
    entry_points={"console_scripts": ["swinfast = swinfast.cli:main"]},
    install_requires=[
        "numpy",
        "pillow",
        "safetensors",
        "tabulate",
        "torch>=2.11",
        "tqdm",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "hub": ["huggingface_hub"],
        "train": ["scikit-learn"],
        "peers": ["onnxruntime", "onnxscript", "openvino"],
        "bench": ["matplotlib", "timm==1.0.31"],
        "parquet": PARQUET,
        "ray": RAY,
        "test": [*TEST, "webdataset", *PARQUET, *RAY],
    },
)
