"""The world's files, and the gate's way to use them."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_preprocess.world import gate, train_models
from data_preprocess.world.build import WorldConfig, WorldFiles, build, draw, main
from data_preprocess.world.language import names
from verl.records import read_questions
from verl.retrieval.corpus import Corpus
from verl.types import Question

SMALL = WorldConfig(seed=3, train=40, validation=10, test=30)
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    return build(SMALL, tmp_path_factory.mktemp("world"))


def mentioned(questions: list[Question]) -> set[str]:
    """All names that questions, answers and gold titles hold."""
    words = {word.strip("?") for question in questions for word in question.text.split()}
    golds = {name for question in questions for name in (*question.answers, *question.gold_titles)}
    return golds | (words & set(names()))


def test_what_was_drawn_is_what_the_files_hold(files: WorldFiles) -> None:
    documents, splits = draw(SMALL)
    assert list(Corpus.open(files.corpus).documents()) == documents
    for split in SPLITS:
        assert read_questions(files.questions(split)) == splits[split]
    assert {split: len(questions) for split, questions in splits.items()} == {"train": 40, "validation": 10, "test": 30}
    assert not list(files.folder.glob("*.partial"))


def test_building_again_gives_the_same_files_and_another_seed_others(files: WorldFiles, tmp_path: Path) -> None:
    again = build(SMALL, tmp_path / "again")
    assert again.corpus.read_bytes() == files.corpus.read_bytes()
    assert read_questions(again.questions("test")) == read_questions(files.questions("test"))
    other = build(WorldConfig(seed=4, train=40, validation=10, test=30), tmp_path / "other")
    assert other.corpus.read_bytes() != files.corpus.read_bytes()


@pytest.mark.parametrize("config", [SMALL, WorldConfig()])
def test_splits_share_no_question_and_test_shares_no_name_and_no_fact(config: WorldConfig) -> None:
    documents, splits = draw(config)
    everything = [question for questions in splits.values() for question in questions]
    assert max(Counter(question.id for question in everything).values()) == 1
    assert max(Counter(question.text for question in everything).values()) == 1
    seen, held_out = mentioned(splits["train"] + splits["validation"]), mentioned(splits["test"])
    assert not seen & held_out
    for document in documents:
        words = set(document.contents.replace(".", "").replace('"', "").split())
        assert not (words & seen and words & held_out), f"{document.title} tells of both worlds"


def test_worlds_of_neighbouring_seeds_are_all_different() -> None:
    corpora = [tuple(document.text for document in draw(WorldConfig(seed=seed))[0]) for seed in range(3)]
    halves = [corpus[:200] for corpus in corpora] + [corpus[200:] for corpus in corpora]
    assert len(set(halves)) == 6


def test_every_gold_passage_is_in_the_corpus_and_holds_the_answer(files: WorldFiles) -> None:
    by_title = {document.title: document for document in Corpus.open(files.corpus).documents()}
    for split in SPLITS:
        for question in read_questions(files.questions(split)):
            assert f"is {question.answers[0]}." in by_title[question.gold_titles[-1]].text


def test_the_command_line_builds_what_it_is_told(tmp_path: Path) -> None:
    words = ["--save_dir", str(tmp_path), "--seed", "3", "--train", "40", "--validation", "10", "--test", "30"]
    subprocess.run([sys.executable, "-m", "data_preprocess.world.build", *words], check=True, timeout=120)
    assert read_questions(tmp_path / "test.parquet") == draw(SMALL)[1]["test"]


@pytest.mark.parametrize("wrong", [{"train": 0}, {"validation": -1}, {"test": 0}, {"two_hop": 1.2}])
def test_sizes_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        WorldConfig(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> gate.HeldOut:
    return gate.HeldOut(tmp_path_factory.mktemp("gate"), WorldConfig(seed=1, train=4, validation=4, test=60))


def test_round_zero_holds_the_subject_but_almost_never_the_bridge(held_out: gate.HeldOut) -> None:
    subject = [q.gold_titles[0] in [d.title for d in q.initial_documents] for q in held_out.questions]
    two_hop = [q for q in held_out.questions if q.kind == "2-hop"]
    whole = [set(q.gold_titles) <= {d.title for d in q.initial_documents} for q in two_hop]
    assert sum(subject) / len(subject) > 0.7
    assert sum(whole) / len(whole) < 0.2
    assert {len(q.initial_documents) for q in held_out.questions} == {gate.BASELINE_DOCUMENTS}


def test_distracted_contexts_hold_the_gold_and_three_to_six_others(held_out: gate.HeldOut) -> None:
    rng = random.Random(0)
    sizes = set()
    for question in held_out.questions:
        context = held_out.distracted(question, rng)
        titles = [document.title for document in context]
        assert set(question.gold_titles) <= set(titles)
        assert len(set(titles)) == len(titles)
        sizes.add(len(titles) - len(question.gold_titles))
    assert sizes == {3, 4, 5, 6}
    assert [document.title for document in held_out.gold(question)] == list(question.gold_titles)


def test_a_check_passes_within_its_range_ends_included() -> None:
    inside = gate.Check("valid", 0.95, low=0.95)
    outside = gate.Check("success", 0.31, 0.10, 0.30)
    assert inside.passed and inside.line().startswith("pass  valid")
    assert not outside.passed and outside.line().startswith("FAIL  success")
    assert "0.310  in [0.10, 0.30]" in outside.line()


@pytest.mark.integration
async def test_the_committed_models_pass_the_gate_on_a_small_sample() -> None:
    """The whole gate takes 400 questions; here 48, with bounds wide enough for the noise of so few."""
    checkpoints = Path(gate.__file__).parent / "checkpoints"
    checks = await gate.measure(checkpoints / "generator", checkpoints / "searcher", test=48)
    found = {check.name: check.value for check in checks}
    assert found["generator, gold passages"] >= 0.85
    assert found["generator, gold + 3-6 distractors"] >= 0.70
    assert found["naive RAG, all"] <= 0.70
    assert found["naive RAG, 2-hop"] <= 0.20
    assert found["base searcher, valid (sampled)"] >= 0.90
    assert found["base searcher, sampled, 2-hop success"] <= 0.45
    assert found["base searcher, greedy, all: 0.20 below oracle"] <= found["generator, gold passages"] - 0.05


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train", "0"], "train=0; expected at least 1 question"),
        (["--two_hop", "1.5"], "two_hop=1.5; expected a share in [0, 1]"),
        (["--test", "100000"], "ask for fewer"),
    ],
)
def test_sizes_that_no_world_has_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--save_dir", str(tmp_path / "world"), *flags])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "world").exists()


@pytest.mark.parametrize("stage", ["searcher", "gate"])
def test_a_stage_without_its_generator_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        train_models.main(["--save_dir", str(tmp_path), "--only", stage])
    assert ended.value.code == 2
    assert "generator holds no checkpoint; train it first" in capsys.readouterr().err
