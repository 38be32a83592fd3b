"""Training and validation questions."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_preprocess.rag_cache import TrainFilter, select
from verl.errors import ConfigError
from verl.evaluation.journal import fingerprint
from verl.records import read_questions
from verl.types import Question

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Which questions to train and validate on.

    Attributes:
        train, validation: parquet files in the published column layout.
        batch_size: questions of one step.
        validation_limit: validate on the first so many; null is all of them.
        drop_yes_no: leave out training questions with a yes/no/true/false gold, as published.
        drop_rag_correct: leave out training questions that naive RAG answers, as published.
        shuffle: order the training questions anew in each epoch.
    """

    train: Path
    validation: Path
    batch_size: int = 120
    validation_limit: int | None = None
    drop_yes_no: bool = True
    drop_rag_correct: bool = True
    shuffle: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; expected at least 1 question")
        if self.validation_limit is not None and self.validation_limit < 1:
            raise ValueError(f"validation_limit={self.validation_limit}; expected at least 1, or null for all")


def training_questions(config: DataConfig) -> list[Question]:
    """Read and filter the training questions; the counts are logged.

    Raises:
        DataError: the file is missing or malformed.
        ConfigError: fewer questions than one step needs are left.
    """
    questions = read_questions(config.train)
    kept, dropped = select(questions, TrainFilter(config.drop_yes_no, config.drop_rag_correct))
    counts = ", ".join(f"{count} dropped ({reason})" for reason, count in dropped.items()) or "none dropped"
    logger.info("%s: %d questions, %s, %d left", config.train, len(questions), counts, len(kept))
    if len(kept) < config.batch_size:
        raise ConfigError(
            f"{config.train} leaves {len(kept)} training questions, fewer than data.batch_size={config.batch_size}; "
            "lower it, or switch off data.drop_rag_correct or data.drop_yes_no"
        )
    return kept


def validation_questions(config: DataConfig) -> list[Question]:
    """Read the validation questions, all or the first `validation_limit`.

    Raises:
        DataError: the file is missing or malformed.
        ConfigError: it holds no question, so there is nothing to validate on.
    """
    questions = read_questions(config.validation, config.validation_limit)
    if not questions:
        raise ConfigError(f"data.validation={config.validation} holds no question; give a file with at least one row")
    return questions


class Shuffled:
    """An endless source of questions: epoch after epoch, each in its own order, and a position that can be saved."""

    def __init__(self, questions: Sequence[Question], seed: int, shuffle: bool = True) -> None:
        self._questions = questions
        self._seed = seed
        self._shuffle = shuffle
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._order_of = fingerprint([seed if shuffle else None, [question.id for question in questions]])
        self.position = 0

    def take(self, count: int) -> list[Question]:
        """Return the next `count` questions; a call that goes beyond the end of an epoch may return one twice."""
        taken = [self._at(index) for index in range(self.position, self.position + count)]
        self.position += count
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it is a position in."""
        return {"position": self.position, "questions": len(self._questions), "order": self._order_of}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            ConfigError: the questions or their order are others than when it was saved.
        """
        if state["order"] != self._order_of:
            raise ConfigError(
                f"the checkpoint was trained on {state['questions']} questions in another order or selection than the "
                f"{len(self._questions)} that data.train yields now; give it the same file, filters, data.seed and "
                "data.shuffle, or start with trainer.resume=never"
            )
        self.position = state["position"]

    def _at(self, index: int) -> Question:
        epoch, offset = divmod(index, len(self._questions))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._questions[self._epoch[1][offset]]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._questions)))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order
