"""The world for query writing: what its questions say, what finds their answers, and what is held out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_preprocess.world import rewording
from data_preprocess.world.language import RELATIONS
from data_preprocess.world.rewording import RewordingConfig, build, draw
from verl.records import read_questions
from verl.retrieval.build import build_index
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import open_index

PASSAGE = re.compile(r"The (\w+) of (\w+) is (\w+)\.")
QUESTION = re.compile(r"Who is the (\w+) of (\w+)\?")
PASSAGE_WORD = {question: passage for passage, question in RELATIONS.items()}


def test_a_question_asks_for_one_fact_in_words_that_no_passage_has() -> None:
    documents, splits = draw(RewordingConfig(train=50, validation=20, test=50))
    text_of = {document.id: document.text for document in documents}
    assert len(text_of) == len(documents) == 400 * len(RELATIONS)
    for question in [question for split in splits.values() for question in split]:
        word, name = QUESTION.fullmatch(question.text).groups()
        relation, subject, _ = PASSAGE.fullmatch(text_of[question.answers[0]]).groups()
        assert (PASSAGE_WORD[word], name) == (relation, subject)
        assert not any(word in text for text in text_of.values())


def test_test_questions_share_no_name_with_the_others_and_ids_say_nothing() -> None:
    documents, splits = draw(RewordingConfig())
    named = {split: {QUESTION.fullmatch(q.text)[2] for q in questions} for split, questions in splits.items()}
    assert not named["test"] & (named["train"] | named["validation"])
    texts = [question.text for questions in splits.values() for question in questions]
    assert len(set(texts)) == len(texts)
    first = min(documents, key=lambda document: document.id)
    assert documents.index(first) != 0
    assert draw(RewordingConfig()) == (documents, splits)
    assert draw(RewordingConfig(seed=1))[1]["test"] != splits["test"]


def test_the_raw_question_finds_a_third_and_the_passages_words_find_all(tmp_path: Path) -> None:
    files = build(RewordingConfig(train=10, validation=10, test=200), tmp_path / "world")
    corpus = Corpus.open(files.corpus)
    build_index(corpus, "bm25", tmp_path / "index")
    engine = open_index(tmp_path / "index", corpus, "bm25")
    questions = read_questions(files.questions("test"))

    def recall(queries: list[str]) -> float:
        found = engine.search(queries, 5)
        hits = [q.answers[0] in {d.id for d in r.documents} for q, r in zip(questions, found, strict=True)]
        return sum(hits) / len(hits)

    rewritten = [QUESTION.sub(lambda m: f"{PASSAGE_WORD[m[1]]} of {m[2]}", question.text) for question in questions]
    assert recall([question.text for question in questions]) < 0.45
    assert recall(rewritten) == 1.0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"test": 0}, "test=0; expected from 1 to 1600"),
        ({"train": 1600, "validation": 1}, "train=1600 and validation=1 share a world of 1600 questions"),
    ],
)
def test_sizes_that_the_world_does_not_hold(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewordingConfig(**sizes)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewording.main(["--save_dir", str(tmp_path), "--train", "3", "--validation", "2", "--test", "2"])
    written = {split: len(read_questions(tmp_path / f"{split}.parquet")) for split in ("train", "validation", "test")}
    assert written == {"train": 3, "validation": 2, "test": 2}
    with pytest.raises(SystemExit):
        rewording.main(["--save_dir", str(tmp_path), "--test", "5000"])
    assert "error: test=5000; expected from 1 to 1600" in capsys.readouterr().err
