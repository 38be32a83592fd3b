"""FAISS on GPUs: one, or the index split over all visible ones; vectors in half precision."""

from __future__ import annotations

import logging

import faiss

from verl.errors import ConfigError
from verl.retrieval.dense_search import GpuSource
from verl.retrieval.index_file import reason

logger = logging.getLogger(__name__)

_KINDS = ("Flat", "IVF-Flat", "IVF-SQ8", "IVF-PQ")
"""What FAISS can copy to one GPU as well as split over several."""


def gpu_source(index: faiss.Index, kind: str) -> GpuSource:
    """Copy an index to all visible GPUs.

    Args:
        index: a mapped index, with its `nprobe` set.

    Raises:
        ConfigError: a kind that FAISS has no GPU search for, a FAISS without GPU support, no GPU, or FAISS cannot put
            the index there, for example for want of memory.
    """
    gpus = check_gpus(kind)
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    options.useFloat16 = True
    try:
        copy = faiss.index_cpu_to_all_gpus(index, co=options)
    except RuntimeError as error:
        raise ConfigError(
            f"faiss_gpu: the index cannot be put on {gpus} GPU(s) ({reason(error)}); free their memory, use more of "
            "them, or build another kind (`python -m verl.retrieval.build plan`)"
        ) from error
    logger.info("copied %d vectors to %d GPU(s) in half precision", index.ntotal, gpus)
    return GpuSource(index, copy)


def check_gpus(kind: str) -> int:
    """Return the number of GPUs that FAISS sees.

    Raises:
        ConfigError: none; this FAISS cannot use any; or it cannot search that kind of index on them.
    """
    if kind not in _KINDS:
        raise ConfigError(f"faiss_gpu was asked for an index of kind {kind}; expected one of {', '.join(_KINDS)}")
    if not hasattr(faiss, "StandardGpuResources"):
        raise ConfigError(
            f"faiss_gpu was asked for, but the installed FAISS {faiss.__version__} has no GPU support; install "
            "faiss-gpu in place of faiss-cpu, or leave --faiss_gpu out"
        )
    gpus = faiss.get_num_gpus()
    if gpus == 0:
        raise ConfigError("faiss_gpu was asked for, but FAISS sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return gpus
