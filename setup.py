"""Package metadata; dependencies are pinned in requirements.txt (GPU) and requirements-cpu.txt."""

from setuptools import find_packages, setup

setup(
    name="search-agents",
    version="0.1.0",
    description="Training search agents with reinforcement learning: s3, DeepRetrieval and ExSearch on one trainer",
    python_requires=">=3.11",
    packages=find_packages(include=["verl*", "generator_llms*", "data_preprocess*"]),
    package_data={"data_preprocess.world": ["checkpoints/*/*"]},
    extras_require={"flash-attn": ["flash-attn==2.8.3.post2"], "lucene": ["jpype1==1.7.1"]},
    entry_points={"console_scripts": ["s3=verl.cli:main"]},
)
