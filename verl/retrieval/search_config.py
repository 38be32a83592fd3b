"""How a dense index is searched: what was asked for, what `build tune` measured, and what holds in the end."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from verl.errors import ConfigError, DataError
from verl.retrieval.index_kinds import default_nprobe
from verl.typed import Decoder

logger = logging.getLogger(__name__)

TUNING_NAME = "tune.json"
DEFAULT_EF_SEARCH = 128


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """What is asked for; None stands for what `build tune` chose, or else for a default.

    Attributes:
        nprobe: clusters of an IVF index that are searched.
        ef_search: candidates that an HNSW search keeps; also the largest `topk` that it can serve.
        faiss_gpu: search on all visible GPUs, in half precision, split over them.
    """

    nprobe: int | None = None
    ef_search: int | None = None
    faiss_gpu: bool = False

    def __post_init__(self) -> None:
        for name in ("nprobe", "ef_search"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; expected at least 1")


@dataclass(frozen=True, slots=True)
class Tuning:
    """The `tune.json` of an index: the parameter that was chosen, and what was measured for it.

    Attributes:
        index: `verl.retrieval.file_mark.file_mark` of the index file.
        parameter: `nprobe` or `ef_search`.
        recall: share of the true best `k` documents that were found.
        exact: what they were found among: the vectors of the `encoder`, or the `codes` of the index itself.
    """

    index: str
    parameter: str
    value: int
    k: int
    recall: float
    target_recall: float
    queries: int
    queries_per_s: float
    exact: str

    def save(self, folder: Path) -> None:
        """Write `tune.json` into the folder of the index, whole or not at all.

        Raises:
            DataError: the folder cannot be written.
        """
        path = folder / TUNING_NAME
        temporary = path.with_name(f".{TUNING_NAME}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"cannot write {path} ({error}); make room or the folder writable") from error

    @classmethod
    def load(cls, folder: Path, index: str) -> Tuning | None:
        """Read the `tune.json` beside an index; None where there is none.

        Raises:
            DataError: it is malformed, or was measured on another index.
        """
        path = folder / TUNING_NAME
        remedy = "delete it, or run `python -m verl.retrieval.build tune` again"
        try:
            tuning = Decoder(error=DataError).decode(cls, json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, DataError) as error:
            raise DataError(f"{path} cannot be read ({error}); {remedy}") from error
        if tuning.index != index or tuning.value < 1:
            raise DataError(f"{path} belongs to another index than the one beside it; {remedy}")
        return tuning


def settle(kind: str, nlist: int, config: SearchConfig, tuning: Tuning | None) -> dict[str, int]:
    """Return the search parameters of a kind of index that hold: as asked for, else as tuned, else a default.

    Raises:
        ConfigError: a parameter that the kind does not have, or an `nprobe` above `nlist`.
    """
    asked = {"nprobe": config.nprobe, "ef_search": config.ef_search}
    name = "ef_search" if kind == "HNSW" else "nprobe" if nlist else ""
    for other, value in asked.items():
        if other != name and value is not None:
            raise ConfigError(f"{other}={value} was given for an index of kind {kind}, which has none; leave it out")
    if not name:
        return {}
    value = asked[name]
    if value is None and tuning is not None and tuning.parameter == name:
        value = tuning.value
    if value is None:
        value = default_nprobe(nlist) if nlist else DEFAULT_EF_SEARCH
        logger.warning("%s=%d is a guess; `python -m verl.retrieval.build tune` measures it", name, value)
    if nlist and value > nlist:
        raise ConfigError(f"nprobe={value} exceeds the index's {nlist} clusters; pass at most that many")
    return {name: value}
