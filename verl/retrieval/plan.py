"""What each kind of dense index would need on a machine, and which one to take; arithmetic, no index is touched."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from verl.errors import ConfigError
from verl.retrieval.calibrate import Rates
from verl.retrieval.index_kinds import KINDS, IndexConfig, IndexLayout, default_nprobe, lay_out
from verl.retrieval.search_config import DEFAULT_EF_SEARCH

_PROCESS_BYTES = 1.5e9
"""A serving process without its index: Python, torch, a small encoder, buffers."""
_CHUNK_BYTES = 0.3e9
_GPU_SHARE = 0.85
"""Of a GPU's memory; the rest is FAISS's scratch space and the encoder."""
_INTERACTIVE_S = 0.1
"""A flat index is taken only where one query is answered within this time."""
_KMEANS_ROUNDS = 10
_PQ_ROUNDS = 25
_PQ_POINTS = 65_536
_EF_SEARCH_SHARE = 0.5
"""Of the neighbours of all candidates, how many a search compares: many are neighbours of several."""
_SIZE = re.compile(r"(?:(\d+)x)?(\d+(?:\.\d+)?)\s*([KMGT]i?)B", re.IGNORECASE)
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one kind of index would take; sizes in bytes, times in seconds, None where a kind cannot do it.

    Attributes:
        serve_ram: memory that keeps a search from waiting for the disk: the index and the process.
        build_ram: memory of the build, at most.
        disk: size of the index.
        gpu: GPU memory of a search on GPUs.
        build_s: training and adding, without encoding.
        query_s: one query on one CPU core, untuned.
    """

    layout: IndexLayout
    serve_ram: float
    build_ram: float
    disk: float
    gpu: float | None
    build_s: float
    query_s: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The kind to take, on which device, and why."""

    kind: str
    device: str
    reason: str


def parse_size(text: str) -> float:
    """Return the bytes in `64GB`, `24GiB` or `4x24GB` (four times as much).

    Raises:
        ConfigError: no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"size {text!r}; expected for example 64GB, 24GiB or 4x24GB")
    return int(found[1] or 1) * float(found[2]) * _UNITS[found[3].lower()]


def estimate_all(config: IndexConfig, rows: int, width: int, rates: Rates) -> list[Estimate]:
    """Estimate every kind that `rows` vectors suffice for; `config` gives the numbers, its kind does not matter."""
    found = []
    for kind in KINDS:
        numbers = IndexConfig(kind, hnsw_m=config.hnsw_m, ef_construction=config.ef_construction)
        try:
            found.append(estimate(lay_out(numbers, rows, width), rates))
        except ConfigError:  # too few vectors for product quantisation
            continue
    return found


def estimate(layout: IndexLayout, rates: Rates) -> Estimate:
    """Work out what one layout takes."""
    size = float(layout.index_bytes)
    streamed = layout.kind in ("Flat", "SQ8", "SQfp16")
    training = 4.0 * layout.train_rows * layout.width
    gpu = {"Flat": size / 2, "SQfp16": None, "SQ8": None, "HNSW": None}.get(layout.kind, size)
    return Estimate(
        layout=layout,
        serve_ram=size + _PROCESS_BYTES,
        build_ram=_PROCESS_BYTES + _CHUNK_BYTES + training + (0.0 if streamed else size),
        disk=size,
        gpu=gpu,
        build_s=_build_s(layout, rates),
        query_s=_query_s(layout, rates),
    )


def _build_s(layout: IndexLayout, rates: Rates) -> float:
    rows, width = layout.rows, layout.width
    seconds = (4 * rows * width + layout.index_bytes) / rates.disk_bytes
    if layout.kind == "HNSW":
        compared = min(rows / 2, layout.ef_construction * 2 * layout.hnsw_m)
        seconds += rows * compared * width / rates.graph_numbers
    if layout.nlist:
        operations = 2 * layout.nlist * width * (_KMEANS_ROUNDS * layout.train_rows + rows)
        seconds += operations / rates.flops
    if layout.pq_m:
        points = _PQ_ROUNDS * min(layout.train_rows, _PQ_POINTS) + rows
        seconds += 2 * 256 * width * points / rates.flops
    return seconds


def _query_s(layout: IndexLayout, rates: Rates) -> float:
    if layout.kind == "HNSW":
        compared = _EF_SEARCH_SHARE * min(layout.rows, DEFAULT_EF_SEARCH * 2 * layout.hnsw_m)
        return compared * layout.width / rates.graph_numbers
    speed = {"SQ8": rates.byte_numbers, "IVF-SQ8": rates.byte_numbers, "SQfp16": rates.half_numbers}
    numbers = layout.rows * layout.width / speed.get(layout.kind, rates.flat_numbers)
    if not layout.nlist:
        return numbers
    if layout.pq_m:
        # One look-up per byte of code, about as long as eight numbers take.
        numbers = 8 * layout.rows * layout.pq_m / rates.flat_numbers
    share = default_nprobe(layout.nlist) / layout.nlist
    return layout.nlist * layout.width / rates.flat_numbers + share * numbers


def choose(estimates: Sequence[Estimate], ram: float, gpu: float, threads: int) -> Choice:
    """Pick a kind: exact search where it is fast enough, else the best codes that fit the memory.

    Args:
        ram: bytes of memory for the service.
        gpu: bytes of memory on all GPUs together, 0 for none.
    """
    by_kind = {item.layout.kind: item for item in estimates}
    flat = by_kind["Flat"]
    if flat.gpu is not None and flat.gpu <= _GPU_SHARE * gpu:
        return Choice("Flat", "gpu", f"exact search, and {_size(flat.gpu)} in half precision fit {_size(gpu)} of GPU")
    wait = flat.query_s / threads
    if flat.serve_ram <= ram and wait <= _INTERACTIVE_S:
        return Choice("Flat", "cpu", f"exact search, fits {_size(ram)}, and one query takes about {format_time(wait)}")
    why_not_flat = (
        f"Flat takes {_size(flat.serve_ram)}" if flat.serve_ram > ram else f"Flat takes {format_time(wait)} per query"
    )
    for kind, merit in (("IVF-SQ8", "byte codes lose little"), ("IVF-PQ", "IVF-SQ8 does not fit")):
        if kind in by_kind and by_kind[kind].serve_ram <= ram:
            return Choice(
                kind, "cpu", f"{why_not_flat}; {merit}, and {_size(by_kind[kind].serve_ram)} fit {_size(ram)}"
            )
    smallest = min(estimates, key=lambda item: item.serve_ram)
    return Choice(
        smallest.layout.kind,
        "cpu",
        f"nothing fits {_size(ram)}; this is the smallest, it stays mapped from the disk, and cold clusters are slow",
    )


def table(estimates: Sequence[Estimate]) -> str:
    """Lay the estimates out for reading."""
    head = ("kind", "parameters", "RAM serve", "RAM build", "disk", "GPU", "build", "queries/s")
    widths = (9, 22, 10, 10, 10, 10, 9, 10)
    lines = ["".join(f"{name:>{width}}" for name, width in zip(head, widths, strict=True))]
    for item in estimates:
        cells = (
            item.layout.kind,
            _parameters(item.layout),
            _size(item.serve_ram),
            _size(item.build_ram),
            _size(item.disk),
            "-" if item.gpu is None else _size(item.gpu),
            format_time(item.build_s),
            _rounded(1 / item.query_s),
        )
        lines.append("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def _parameters(layout: IndexLayout) -> str:
    if layout.kind == "HNSW":
        return f"M={layout.hnsw_m}"
    pq = f" m={layout.pq_m}" if layout.pq_m else ""
    return f"nlist={layout.nlist}{pq}" if layout.nlist else "-"


def _size(count: float) -> str:
    """Return bytes as decimal GB, or MB below one."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def format_time(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for limit, divisor, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _rounded(number: float) -> str:
    """Return one digit and zeros: more would claim to be known."""
    if number < 1:
        return f"{number:.1g}"
    magnitude = 10 ** int(math.log10(number))
    return f"{round(number / magnitude) * magnitude:,}"
