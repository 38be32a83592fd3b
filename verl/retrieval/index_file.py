"""Index files of FAISS: written in bounded memory, checked, and mapped rather than read."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

from verl.errors import DataError
from verl.retrieval.index_kinds import IndexLayout

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 64 << 20
_STREAMED = ("Flat", "SQ8", "SQfp16")
"""Kinds whose file is a header and then one code after another, so that it is written without being in memory."""

_HEADER = struct.Struct("<4siqqqBi")
"""Four letters for the type, D, number of vectors, two unused numbers, trained or not, metric."""
_ROWS_AT = 8
_COUNT = struct.Struct("<Q")
_SIGNATURE = re.compile(r"^Error in .*? at \S+:\d+: (Error: )?")
_FLAT_TYPES = (b"IxFI", b"IxF2", b"IxFl")


def write_index_file(layout: IndexLayout, vectors: np.ndarray, path: Path) -> None:
    """Build the index of `vectors` and write it to `path`.

    Memory: a chunk of 64 MiB for the kinds without clusters or graph, else the index, the training sample and a chunk.
    The same vectors make the same file on one machine with the same number of threads, save for HNSW, whose links
    depend on the order in which threads add vectors.

    Args:
        vectors: (N, D) float32 or float16, as a rule memory-mapped.

    Raises:
        OSError: `path` cannot be written.
        DataError: what was written is not what was to be.
    """
    index = trained_index(layout, vectors)
    if layout.kind in _STREAMED:
        _stream(index, layout, vectors, path)
    else:
        _add(index, layout, vectors)
        try:
            faiss.write_index(index, str(path))
        except RuntimeError as error:
            raise OSError(reason(error)) from error
    try:
        found = read_index_file(path).ntotal
    except DataError as error:  # FAISS does not notice what fails when the file is closed
        raise OSError(f"{error}: the disk may be full") from error
    if found != len(vectors):
        raise DataError(f"index {path} was written with {found} vectors, expected {len(vectors)}; report this")


def _add(index: faiss.Index, layout: IndexLayout, vectors: np.ndarray) -> None:
    with tqdm(total=len(vectors), desc=f"adding to {layout.kind}", unit="vector", unit_scale=True, delay=2) as progress:
        for chunk in _chunks(vectors):
            index.add(chunk)
            progress.update(len(chunk))


def trained_index(layout: IndexLayout, vectors: np.ndarray) -> faiss.Index:
    """Return the empty index of a layout, trained on a seeded sample of `vectors`."""
    index = faiss.index_factory(layout.width, layout.factory, faiss.METRIC_INNER_PRODUCT)
    if layout.kind == "HNSW":
        index.hnsw.efConstruction = layout.ef_construction
    if layout.nlist:
        index.cp.seed = layout.seed
    if layout.train_rows:
        rows = np.random.default_rng(layout.seed).choice(len(vectors), layout.train_rows, replace=False, shuffle=False)
        logger.info("training %s on %d of %d vectors", layout.factory, layout.train_rows, len(vectors))
        index.train(np.asarray(vectors[np.sort(rows)], dtype=np.float32))
    return index


def _stream(index: faiss.Index, layout: IndexLayout, vectors: np.ndarray, path: Path) -> None:
    """Write what FAISS would write, code by code: the empty index ends with a count of 0, which codes may follow."""
    head = faiss.serialize_index(index).tobytes()
    items_per_row = layout.width if layout.kind == "Flat" else index.code_size
    with path.open("wb") as file:
        file.write(head)
        for chunk in _chunks(vectors):
            file.write(memoryview(chunk if layout.kind == "Flat" else index.sa_encode(chunk)).cast("B"))
        file.seek(_ROWS_AT)
        file.write(_COUNT.pack(len(vectors)))
        file.seek(len(head) - _COUNT.size)
        file.write(_COUNT.pack(len(vectors) * items_per_row))


def _chunks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK_BYTES // (4 * vectors.shape[1]))
    for start in range(0, len(vectors), step):
        yield np.ascontiguousarray(vectors[start : start + step], dtype=np.float32)


def read_index_file(path: Path) -> faiss.Index:
    """Memory-map an index: inverted lists, codes, whole vectors and graphs stay in the file.

    Raises:
        DataError: the file is missing, cut short or damaged, or searches by another metric than the inner product.
    """
    remedy = "fetch it again, or build it again with --overwrite"
    if not path.is_file():
        raise DataError(f"index {path} is damaged: the file is missing; {remedy}")
    _check_length(path, remedy)
    before = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(path.stat().st_size)  # a damaged length asks for any amount of memory
    try:
        index = faiss.read_index(str(path), _mapping_flags(path))
    except (RuntimeError, MemoryError) as error:
        raise DataError(f"index {path} is damaged ({reason(error)}); {remedy}") from error
    finally:
        faiss.set_deserialization_vector_byte_limit(before)
    if isinstance(index, faiss.IndexIVF):
        # Threads that read ahead, started for every search, cost more than they gain where the lists are in memory.
        faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise DataError(
            f"index {path} has FAISS metric {index.metric_type}, expected {faiss.METRIC_INNER_PRODUCT} (inner product);"
            " build it again with that metric"
        )
    return index


def _mapping_flags(path: Path) -> int:
    """Inverted lists are mapped by one flag of FAISS, everything else by another; no table serves inner products."""
    with path.open("rb") as file:
        is_ivf = file.read(2) == b"Iw"
    return faiss.IO_FLAG_MMAP | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE if is_ivf else faiss.IO_FLAG_MMAP_IFC


def _check_length(path: Path, remedy: str) -> None:
    """Say in plain words that a flat index is cut short, as when one part of a download is missing."""
    found = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise DataError(f"index {path} is damaged: it ends after {found} bytes, inside its header; {remedy}")
    name, width, rows, *_ = _HEADER.unpack(head)
    if name not in _FLAT_TYPES:
        return
    expected = _HEADER.size + _COUNT.size + 4 * width * rows
    if found != expected:
        raise DataError(
            f"index {path} is damaged: its header says {rows} vectors of {width} numbers, which take {expected} bytes, "
            f"but it has {found}; {remedy} (is every part of the download there?)"
        )


def kind_of(index: faiss.Index, path: Path) -> str:
    """Return which of `verl.retrieval.index_kinds.KINDS` a loaded index is.

    Raises:
        DataError: none of them.
    """
    codes = {faiss.ScalarQuantizer.QT_8bit: "SQ8", faiss.ScalarQuantizer.QT_fp16: "SQfp16"}
    kind = None
    if isinstance(index, faiss.IndexFlat):
        kind = "Flat"
    elif isinstance(index, faiss.IndexScalarQuantizer):
        kind = codes.get(index.sq.qtype)
    elif isinstance(index, faiss.IndexHNSWFlat):
        kind = "HNSW"
    elif isinstance(index, faiss.IndexIVFFlat):
        kind = "IVF-Flat"
    elif isinstance(index, faiss.IndexIVFScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_8bit:
        kind = "IVF-SQ8"
    elif isinstance(index, faiss.IndexIVFPQ):
        kind = "IVF-PQ"
    if kind is None:
        raise DataError(
            f"index {path} is a FAISS {type(index).__name__} of a sort that is not served; build one of the kinds that "
            "`python -m verl.retrieval.build --help` lists"
        )
    return kind


def reason(error: Exception) -> str:
    """Return the sentence of a FAISS error, without its C++ signature and source line."""
    return _SIGNATURE.sub("", " ".join(str(error).split()))
