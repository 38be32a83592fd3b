"""The embedded world for query writing: one fact a passage, and questions in other words than the passages.

    python -m data_preprocess.world.rewording --save_dir outputs/rewording/world

Every person stands in all eight relations, so about sixteen passages name a person and only two of them hold the
relation that is asked for. A question names it by another word ("teacher" where the passage says "mentor"): as a query
it finds the person's passages in no useful order, and one in the passages' words finds the answer first. What must be
learned is which word stands for which; test questions are about persons that no training question names.

Answers are the ids of the passages, as in DeepRetrieval's literature sets, so `retrieval_recall` can pay for them.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_preprocess.world.build import WorldFiles, write_corpus
from data_preprocess.world.language import NAME_COUNT, RELATIONS, World, names, question_text, sentence
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.errors import SearchAgentError
from verl.records import write_questions
from verl.types import Document, Question

logger = logging.getLogger(__name__)
SOURCE = "rewording"
_QUESTIONS_PER_WORLD = NAME_COUNT // 2 * len(RELATIONS)


@dataclass(frozen=True)
class RewordingConfig:
    """Sizes and seed; training and validation questions share a world, test questions have one of their own."""

    seed: int = 0
    train: int = 1280
    validation: int = 100
    test: int = 400

    def __post_init__(self) -> None:
        for split, most in (("train", None), ("validation", None), ("test", _QUESTIONS_PER_WORLD)):
            asked = getattr(self, split)
            if asked < 1 or (most is not None and asked > most):
                raise ValueError(f"{split}={asked}; expected from 1 to {most or _QUESTIONS_PER_WORLD} questions")
        if self.train + self.validation > _QUESTIONS_PER_WORLD:
            raise ValueError(
                f"train={self.train} and validation={self.validation} share a world of {_QUESTIONS_PER_WORLD} "
                "questions; ask for fewer"
            )


def draw(config: RewordingConfig) -> tuple[list[Document], dict[str, list[Question]]]:
    """Return the corpus and the questions of each split; everything follows from `config.seed`."""
    rng = random.Random(f"rewording/{config.seed}")
    pool = names()
    half = NAME_COUNT // 2
    worlds = [
        World.generate(2 * config.seed + n, part, len(RELATIONS)) for n, part in enumerate((pool[:half], pool[half:]))
    ]
    facts = [[(s, r, o) for s, about in world.facts.items() for r, o in about.items()] for world in worlds]
    # Ids say nothing of a fact: equal scores are ordered by them.
    numbers = rng.sample(range(100_000, 1_000_000), sum(map(len, facts)))
    id_of = dict(zip([fact for part in facts for fact in part], map(str, numbers), strict=True))
    documents = [
        Document(id, "", sentence(relation, subject, value)) for (subject, relation, value), id in id_of.items()
    ]
    for part in facts:
        rng.shuffle(part)
    asked = {
        "train": facts[0][: config.train],
        "validation": facts[0][config.train : config.train + config.validation],
        "test": facts[1][: config.test],
    }
    splits = {split: [_question(split, n, f, id_of[f]) for n, f in enumerate(part)] for split, part in asked.items()}
    return documents, splits


def _question(split: str, index: int, fact: tuple[str, str, str], passage: str) -> Question:
    subject, relation, _ = fact
    text = question_text(subject, [RELATIONS[relation]])
    return Question(f"{SOURCE}/{split}/{index}", text, (passage,), SOURCE, kind="1-hop")


def build(config: RewordingConfig, folder: Path) -> WorldFiles:
    """Write the corpus and one parquet a split into `folder`; each file appears whole or not at all."""
    documents, splits = draw(config)
    files, grammar = WorldFiles(folder), DeepRetrievalGrammar(DeepRetrievalConfig())
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(files.corpus, documents)
    for split, questions in splits.items():
        write_questions(files.questions(split), questions, split, lambda q: grammar.prompt_messages(q)[0]["content"])
        logger.info("%s: %d questions", files.questions(split), len(questions))
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the embedded world for query writing.")
    parser.add_argument("--save_dir", type=Path, required=True)
    for name in ("seed", "train", "validation", "test"):
        parser.add_argument(f"--{name}", type=int, default=getattr(RewordingConfig, name))
    options = vars(parser.parse_args(arguments))
    folder = options.pop("save_dir")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        build(RewordingConfig(**options), folder)
    except (ValueError, SearchAgentError, OSError) as cause:
        parser.exit(1, f"error: {cause}\n")


if __name__ == "__main__":
    main()
