"""What a policy's SQL may take, and where its databases are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SqlConfig:
    """Databases and limits of `verl.retrieval.engines.sql`.

    Attributes:
        databases: folder of the databases, or of the set that has them.
        timeout_s: seconds that a statement may take.
        max_rows: rows that a result may have.
        max_mb: MiB that a result, or any one value, may have.
        memory_mb: MiB of SQLite's memory, for each worker.
        max_chars: characters that a statement may have.
        workers: statements that run at once, each in its own process.
        cache_mb: MiB of gold results that are kept.
    """

    databases: Path
    timeout_s: float = 30.0
    max_rows: int = 100_000
    max_mb: int = 32
    memory_mb: int = 512
    max_chars: int = 50_000
    workers: int = 2
    cache_mb: int = 64

    def __post_init__(self) -> None:
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ValueError(f"timeout_s={self.timeout_s}; expected a positive number of seconds")
        for name in ("max_rows", "max_mb", "memory_mb", "max_chars", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.cache_mb < 0:
            raise ValueError(f"cache_mb={self.cache_mb}; expected 0 or more")
        if self.max_mb > 512:
            raise ValueError(f"max_mb={self.max_mb}; expected at most 512, SQLite's own bound is not far")
