"""A pool of passages in which each stands once, however often and in whatever spelling it comes."""

from __future__ import annotations

import hashlib
import json
from typing import TextIO

from data_preprocess.cutting import cut
from verl.rewards.recall import title_key
from verl.rewards.text import normalise
from verl.types import Document

_ID_BYTES = 10  # of 21 million passages, two have the same id with a chance of 2 in 10 billion


def passage_id(title: str, text: str) -> str:
    """Return the id of a passage: the same for spellings that differ in case, punctuation, articles or spaces only."""
    return _digest(title, text).hex()


class Pool:
    """Writes passages to a `contents` jsonl as they come; in memory are their ids and titles.

    Args:
        words: cut passages that are longer into some of about so many words; 0 leaves them whole.

    Attributes:
        titles: keys of all titles in the pool.
    """

    def __init__(self, file: TextIO, words: int = 0) -> None:
        self._file = file
        self._words = words
        self._ids: set[bytes] = set()
        self.titles: set[str] = set()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, document: Document) -> tuple[str, ...]:
        """Add a passage, unless it is there; returns its id, or those of the pieces that it was cut into."""
        texts = cut(document.text, self._words) if self._words else [document.text]
        ids = [self._add(document.title, text) for text in texts if text.strip() or document.title.strip()]
        return tuple(dict.fromkeys(ids))

    def _add(self, title: str, text: str) -> str:
        digest = _digest(title, text)
        if digest not in self._ids:
            self._ids.add(digest)
            self.titles.add(title_key(title))
            line = {"id": digest.hex(), "contents": Document("", " ".join(title.split()), text.strip()).contents}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return digest.hex()


def _digest(title: str, text: str) -> bytes:
    key = f"{title_key(title)}\n{normalise(text) or text.strip().lower()}"
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=_ID_BYTES).digest()
