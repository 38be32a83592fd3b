"""What to build, besides which retriever over which corpus; plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from verl.errors import ConfigError
from verl.retrieval.encoder_spec import ENCODERS, EncoderConfig, Setting
from verl.retrieval.index_kinds import EXACT_KINDS, IndexConfig
from verl.retrieval.settings import BM25Config, LuceneConfig


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an index is built.

    Attributes:
        model: encoder in place of the retriever's own.
        encoder: how the encoder runs.
        encoder_overrides: what is different from the retriever's own `EncoderSpec`.
        bm25: the index of the retriever `bm25`.
        lucene: the index of the retriever `lucene`.
        index: the kind of dense index.
        embedding_path: vectors that were made before, raw float32 in corpus order; None to encode the corpus.
        save_embedding: keep the vectors beside the index, in `<save_dir>.vectors/`.
        target_recall: choose the search parameter that reaches this recall@10, once the index is built.
        overwrite: replace an index that is not the one asked for.
    """

    model: str | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encoder_overrides: Mapping[str, Setting] = field(default_factory=dict)
    bm25: BM25Config = field(default_factory=BM25Config)
    lucene: LuceneConfig = field(default_factory=LuceneConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    embedding_path: Path | None = None
    save_embedding: bool = False
    target_recall: float | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.target_recall is not None and not 0 < self.target_recall <= 1:
            raise ConfigError(f"target_recall={self.target_recall}; expected above 0 and at most 1")
        if self.target_recall is not None and self.index.kind in EXACT_KINDS:
            raise ConfigError(
                f"target_recall={self.target_recall} was given for index_kind={self.index.kind}, which has nothing to "
                "tune; leave it out"
            )
        if self.embedding_path is not None and self.save_embedding:
            raise ConfigError("save_embedding was given with embedding_path, where the vectors are; leave one out")

    def check(self, retriever_name: str) -> None:
        """Refuse options of an encoder for a retriever that has none.

        Raises:
            ConfigError: names them.
        """
        if retriever_name in ENCODERS:
            return
        given = {
            "retriever_model": self.model,
            "encoder_spec": dict(self.encoder_overrides) or None,
            "index_kind": None if self.index == IndexConfig() else self.index.kind,
            "embedding_path": self.embedding_path,
            "save_embedding": self.save_embedding or None,
            "target_recall": self.target_recall,
        }
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{name}={value!r} was given for {retriever_name}, which has no model; leave it out")
