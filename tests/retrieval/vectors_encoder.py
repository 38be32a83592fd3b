"""An encoder without a model for the tests of vectors; as a program, it encodes a corpus and can be killed.

python -m tests.retrieval.vectors_encoder CORPUS FOLDER SECONDS_PER_CHUNK
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np

from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder_spec import EncoderSpec
from verl.retrieval.vectors import encode_corpus

WIDTH = 24


@dataclass(frozen=True)
class FakeTokens:
    """See `verl.retrieval.encoder.Tokens`."""

    ids: tuple[Sequence[int], ...]
    truncated: int


@dataclass
class FakeEncoder:
    """Makes a vector of a text's hash; a text of more than 60 characters counts as cut.

    Attributes:
        encoded: how many passages so far.
        fails_after: raise once so many chunks are done.
    """

    spec: EncoderSpec = field(default_factory=lambda: EncoderSpec("fake", max_length=60))
    seed: int = 0
    scale: float = 1.0
    width: int = WIDTH
    precision: str = "float32"
    chunk_documents: int = 16
    seconds_per_chunk: float = 0.0
    fails_after: int | None = None
    encoded: int = 0
    chunks: int = 0

    def tokenize_passages(self, passages: Sequence[str]) -> FakeTokens:
        ids = tuple(tuple(sha256(f"{self.seed}{text}".encode()).digest()) for text in passages)
        return FakeTokens(ids, sum(len(text) > 60 for text in passages))

    def encode_tokens(self, tokens: FakeTokens) -> np.ndarray:
        if self.chunks == self.fails_after:
            raise KeyboardInterrupt
        time.sleep(self.seconds_per_chunk)
        self.chunks += 1
        self.encoded += len(tokens.ids)
        rows = [np.frombuffer(bytes(ids), np.uint8)[: self.width] for ids in tokens.ids]
        return np.stack(rows).astype(np.float32) / np.float32(7) * np.float32(self.scale)


if __name__ == "__main__":
    encoder = FakeEncoder(seconds_per_chunk=float(sys.argv[3]))
    encode_corpus(Corpus.open(sys.argv[1]), encoder, Path(sys.argv[2]), checkpoint_s=0.0)
