"""The kinds of dense index: their names, how each is laid out, and what it takes; plain data, no FAISS import."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from verl.errors import ConfigError

Kind = Literal["Flat", "SQ8", "SQfp16", "IVF-Flat", "IVF-SQ8", "IVF-PQ", "HNSW"]
KINDS: tuple[str, ...] = get_args(Kind)
EXACT_KINDS: tuple[str, ...] = ("Flat", "SQ8", "SQfp16")
"""Kinds that score every vector of a search, so that nothing is to be tuned."""

_TRAINED: tuple[str, ...] = ("SQ8", "IVF-Flat", "IVF-SQ8", "IVF-PQ")

_ALIASES = {"fp16": "SQfp16", "flat-sq8": "SQ8", "flat-fp16": "SQfp16", "hnsw-flat": "HNSW", "hnsw,flat": "HNSW"}
_FACTORY_IVF = re.compile(r"IVF(\d+),(?:(Flat|SQ8)|PQ(\d+)(?:x8)?(?:np)?)", re.IGNORECASE)
_FACTORY_HNSW = re.compile(r"HNSW(\d+)(?:,Flat)?", re.IGNORECASE)

_LIST_POINTS = 40
"""Training vectors per inverted list; FAISS asks for 39 at least."""
_CODE_POINTS = 65_536
"""Training vectors of the codes: the range of each scalar dimension, 256 per product-quantiser centroid."""
_TRAINING_BYTES = 2 << 30
_PQ_CENTROIDS = 256
_PQ_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """What kind of index to build; None stands for a default that depends on the size of the corpus.

    Attributes:
        kind: `Flat` is exact. `SQ8` and `SQfp16` keep one byte or two per dimension. `IVF-*` searches only the nearest
            of `nlist` clusters. `IVF-PQ` keeps `pq_m` bytes per vector. `HNSW` walks a graph over whole vectors.
        nlist: clusters of an IVF index; the power of two nearest to 4 * sqrt(documents) when None.
        pq_m: bytes per vector of IVF-PQ; must divide the vectors' width; a quarter of it when None.
        hnsw_m: links per vector of the graph.
        ef_construction: candidates that are looked at when a vector is linked into the graph.
        train_size: vectors that clusters and codes are trained on; 40 per cluster, at most 2 GiB, when None.
        seed: of the training sample and of k-means.
    """

    kind: Kind = "Flat"
    nlist: int | None = None
    pq_m: int | None = None
    hnsw_m: int = 32
    ef_construction: int = 200
    train_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"index_kind={self.kind!r} is unknown; expected one of {', '.join(KINDS)}")
        for name in ("nlist", "pq_m", "hnsw_m", "ef_construction", "train_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; expected at least 1")
        if self.hnsw_m < 2:
            raise ConfigError(f"hnsw_m={self.hnsw_m}; expected at least 2")
        self._refuse("nlist", self.nlist, self.kind.startswith("IVF"))
        self._refuse("pq_m", self.pq_m, self.kind == "IVF-PQ")
        self._refuse("train_size", self.train_size, self.kind in _TRAINED)

    def _refuse(self, name: str, value: int | None, used: bool) -> None:
        if value is not None and not used:
            raise ConfigError(f"{name}={value} was given for index_kind={self.kind}, which has none; leave it out")

    def settings(self, documents: int) -> dict[str, str | int | float | bool]:
        """Return what decides how an index over `documents` vectors is built, for its `index.json`."""
        made: dict[str, str | int | float | bool] = {"kind": self.kind}
        if self.kind.startswith("IVF"):
            made["nlist"] = self.nlist or default_nlist(documents)
        if self.kind == "IVF-PQ":
            made["pq_m"] = self.pq_m or f"width/{_PQ_DIMENSIONS}"
        if self.kind == "HNSW":
            made |= {"hnsw_m": self.hnsw_m, "ef_construction": self.ef_construction}
        if self.train_size is not None:
            made["train_size"] = self.train_size
        if self.kind in _TRAINED:
            made["seed"] = self.seed
        return made


@dataclass(frozen=True, slots=True)
class IndexLayout:
    """An `IndexConfig` worked out for so many vectors of such a width; numbers that a kind does not have are 0.

    Attributes:
        rows: number of vectors.
        width: numbers per vector, D.
        train_rows: vectors that it is trained on.
    """

    kind: Kind
    rows: int
    width: int
    nlist: int
    pq_m: int
    hnsw_m: int
    ef_construction: int
    train_rows: int
    seed: int

    @property
    def factory(self) -> str:
        """The description that `faiss.index_factory` builds from."""
        if self.kind == "HNSW":
            return f"HNSW{self.hnsw_m},Flat"
        if self.kind == "IVF-PQ":
            return f"IVF{self.nlist},PQ{self.pq_m}x8np"  # np: no training for a use of the codes that is not ours
        return f"IVF{self.nlist},{self.kind[4:]}" if self.nlist else self.kind

    @property
    def code_bytes(self) -> int:
        """Bytes that one vector's numbers take."""
        per_number = {"SQ8": 1, "IVF-SQ8": 1, "SQfp16": 2}
        return self.pq_m or self.width * per_number.get(self.kind, 4)

    @property
    def index_bytes(self) -> int:
        """Size of the index, in a file as in memory: exact but for a few hundred bytes and the graph's upper levels."""
        if self.nlist:
            books = 4 * self.width * (self.nlist + (_PQ_CENTROIDS if self.pq_m else 0))
            return self.rows * (self.code_bytes + 8) + books
        graph = 8 * self.hnsw_m + 16 if self.kind == "HNSW" else 0
        return self.rows * (self.code_bytes + graph)


def lay_out(config: IndexConfig, rows: int, width: int) -> IndexLayout:
    """Work out a configuration for `rows` vectors of `width` numbers.

    Raises:
        ConfigError: there are too few vectors for the kind, or the width does not fit it.
    """
    nlist = (config.nlist or default_nlist(rows)) if config.kind.startswith("IVF") else 0
    if nlist > rows:
        raise ConfigError(f"nlist={nlist} exceeds the {rows} vectors; leave it out for {default_nlist(rows)}")
    pq_m = _pq_m(config, rows, width) if config.kind == "IVF-PQ" else 0
    graph = (config.hnsw_m, config.ef_construction) if config.kind == "HNSW" else (0, 0)
    train_rows = _train_rows(config, nlist, rows, width)
    if train_rows < max(nlist, _PQ_CENTROIDS if pq_m else 0):
        raise ConfigError(
            f"train_size={train_rows} is too small for {config.kind} with nlist={nlist}; expected at least "
            f"{max(nlist, _PQ_CENTROIDS if pq_m else 0)}"
        )
    return IndexLayout(config.kind, rows, width, nlist, pq_m, *graph, train_rows, config.seed)


def _pq_m(config: IndexConfig, rows: int, width: int) -> int:
    if rows < _PQ_CENTROIDS:
        raise ConfigError(f"IVF-PQ needs at least {_PQ_CENTROIDS} documents, there are {rows}; build Flat")
    pq_m = config.pq_m or max(1, width // _PQ_DIMENSIONS)
    if width % pq_m:
        near = max(m for m in range(1, pq_m + 1) if width % m == 0)
        raise ConfigError(f"pq_m={pq_m} does not divide the vectors' width {width}; pass for example --pq_m {near}")
    return pq_m


def _train_rows(config: IndexConfig, nlist: int, rows: int, width: int) -> int:
    if config.kind not in _TRAINED:
        return 0
    wanted = config.train_size or max(_LIST_POINTS * nlist, _CODE_POINTS)
    if config.train_size is None:
        wanted = min(wanted, max(nlist, _TRAINING_BYTES // (4 * width)))
    return min(rows, wanted)


def default_nlist(rows: int) -> int:
    """Return the power of two nearest to 4 * sqrt(rows), less where the clusters would hold under 40 vectors."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(rows)))
    most = 2 ** int(math.log2(max(1, rows // _LIST_POINTS)))
    return min(wanted, most)


def default_nprobe(nlist: int) -> int:
    """Return how many clusters are searched as long as nobody has measured it: 1 in 64, and 32 at least."""
    return min(nlist, max(32, nlist // 64))


def parse_kind(text: str) -> IndexConfig:
    """Return the configuration that `text` names: one of `KINDS`, or FAISS's own `IVF4096,SQ8` or `HNSW32`.

    Raises:
        ConfigError: an unknown name.
    """
    names = {name.lower(): name for name in KINDS} | _ALIASES
    if text.lower() in names:
        return IndexConfig(names[text.lower()])
    if ivf := _FACTORY_IVF.fullmatch(text):
        kind = names[f"ivf-{(ivf[2] or 'PQ').lower()}"]
        return IndexConfig(kind, nlist=int(ivf[1]), pq_m=int(ivf[3]) if ivf[3] else None)
    if hnsw := _FACTORY_HNSW.fullmatch(text):
        return IndexConfig("HNSW", hnsw_m=int(hnsw[1]))
    raise ConfigError(
        f"index_kind={text!r} is unknown; expected one of {', '.join(KINDS)}, or a FAISS description such as "
        "IVF4096,SQ8, IVF4096,PQ96 or HNSW32"
    )


def adjusted(config: IndexConfig, **given: int | None) -> IndexConfig:
    """Return `config` with the fields that are given, None standing for none.

    Raises:
        ConfigError: a field was named already, in a FAISS description, with another value.
    """
    changed = {name: value for name, value in given.items() if value is not None}
    defaults = IndexConfig()
    for name, value in changed.items():
        said = getattr(config, name)
        if said not in (getattr(defaults, name), value):
            raise ConfigError(f"{name}={value} was given, but the index_kind says {said}; leave one of them out")
    return replace(config, **changed)
