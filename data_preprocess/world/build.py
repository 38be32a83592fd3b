"""Write the embedded world as the files that Wikipedia would come in: a `contents` corpus and question parquets.

    python -m data_preprocess.world.build --save_dir outputs/world

The corpus holds two worlds with no name in common: training and validation questions ask about the first, test
questions about the second, so a test question shares neither fact nor name with anything that RL has seen.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_preprocess.world.language import NAME_COUNT, World, names
from verl.errors import SearchAgentError
from verl.records import write_questions
from verl.types import Document, Question

logger = logging.getLogger(__name__)
SOURCE = "world"


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and seed of the embedded world.

    Attributes:
        two_hop: share of 2-hop questions in each split.
    """

    seed: int = 0
    train: int = 1280
    validation: int = 128
    test: int = 400
    two_hop: float = 0.6

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            if getattr(self, split) < 1:
                raise ValueError(f"{split}={getattr(self, split)}; expected at least 1 question")
        if not 0 <= self.two_hop <= 1:
            raise ValueError(f"two_hop={self.two_hop}; expected a share in [0, 1]")


@dataclass(frozen=True)
class WorldFiles:
    """Where the world's files are."""

    folder: Path

    @property
    def corpus(self) -> Path:
        """The `contents` jsonl corpus."""
        return self.folder / "corpus.jsonl"

    def questions(self, split: str) -> Path:
        """The parquet of `split`: train, validation or test."""
        return self.folder / f"{split}.parquet"


def draw(config: WorldConfig) -> tuple[list[Document], dict[str, list[Question]]]:
    """Return the corpus and the questions of each split; everything follows from `config.seed`."""
    pool = names()
    half = NAME_COUNT // 2
    seen = World.generate(2 * config.seed, pool[:half])
    held_out = World.generate(2 * config.seed + 1, pool[half:])
    asked = seen.questions(SOURCE, "train", config.train + config.validation, config.seed, config.two_hop)
    splits = {
        "train": asked[: config.train],
        "validation": _renumbered(asked[config.train :], "validation"),
        "test": held_out.questions(SOURCE, "test", config.test, config.seed, config.two_hop),
    }
    return seen.passages() + held_out.passages(), splits


def build(config: WorldConfig, folder: Path) -> WorldFiles:
    """Write the corpus and one parquet a split into `folder`; each file appears whole or not at all."""
    documents, splits = draw(config)
    files = WorldFiles(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(files.corpus, documents)
    for split, questions in splits.items():
        write_questions(files.questions(split), questions, split)
        logger.info("%s: %d questions", files.questions(split), len(questions))
    return files


def write_corpus(path: Path, documents: Iterable[Document]) -> None:
    """Write a `contents` jsonl corpus, whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(json.dumps({"id": document.id, "contents": document.contents}) + "\n")
    os.replace(partial, path)


def _renumbered(questions: Sequence[Question], split: str) -> list[Question]:
    return [replace(question, id=f"{SOURCE}/{split}/{index}") for index, question in enumerate(questions)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the embedded world's corpus and questions.")
    parser.add_argument("--save_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=WorldConfig.seed)
    parser.add_argument("--train", type=int, default=WorldConfig.train)
    parser.add_argument("--validation", type=int, default=WorldConfig.validation)
    parser.add_argument("--test", type=int, default=WorldConfig.test)
    parser.add_argument("--two_hop", type=float, default=WorldConfig.two_hop, help="share of 2-hop questions")
    options = vars(parser.parse_args(arguments))
    folder = options.pop("save_dir")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        build(WorldConfig(**options), folder)
    except (ValueError, SearchAgentError, OSError) as cause:
        parser.exit(1, f"error: {cause}\n")


if __name__ == "__main__":
    main()
