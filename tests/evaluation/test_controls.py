"""Controls: every condition's documents and figures by hand, repeats by hand, and runs that are taken up again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from generator_llms.config import GeneratorConfig
from tests.generator_llms.fake_server import FakeServer, Reply, chat
from verl.config import build, compose
from verl.errors import ConfigError, DataError
from verl.evaluation.collect import RunConfig, collect
from verl.evaluation.collectors import Gathered
from verl.evaluation.control_contexts import (
    MEANINGS,
    Sources,
    build_condition,
    distinct_documents,
    gold_documents,
    random_documents,
)
from verl.evaluation.control_report import ControlsReport, controls_summary
from verl.evaluation.controls import ControlsConfig, RepeatConfig, main, run
from verl.evaluation.journal import Unfinished
from verl.evaluation.repeats import pair_agreement, summarise_repeats
from verl.evaluation.report import markdown
from verl.evaluation.summary import ScoredQuestion, ScoringConfig, summarise
from verl.types import Baseline, Document, Question, Stop, Trajectory

THINGS = [Document(f"t{i}", f"Thing {i}", f"Thing {i} is colour{i}.") for i in range(6)]
FILLERS = [Document(f"f{i}", f"Filler {i}", f"Nothing {i}.") for i in range(6)]
QUESTIONS = [
    Question(f"{source}/test/{i}", f"What is thing {i}?", (f"colour{i}",), source, gold_titles=(f"Thing {i}",))
    for i, source in enumerate(["alpha", "alpha", "alpha", "beta", "beta", "beta"])
]


def fillers(*numbers: int) -> list[Document]:
    return [FILLERS[number] for number in numbers]


def by_id(documents: Sequence[Sequence[Document]]) -> dict[str, tuple[Document, ...]]:
    return {question.id: tuple(several) for question, several in zip(QUESTIONS, documents, strict=True)}


# The method finds things 0, 1 (in third place) and 3; nothing at all for question 4. The generator knows thing 5.
METHOD = by_id(
    [
        [THINGS[0], *fillers(0, 1, 2)],
        [*fillers(0, 1), THINGS[1], *fillers(3)],
        fillers(0, 1, 2, 3),
        [THINGS[3]],
        [],
        fillers(0, 1),
    ]
)
# Naive RAG answers from the first two: things 0 and 3. Thing 2 is in third place.
RANKED = by_id(
    [
        [THINGS[0], *fillers(3, 4, 5)],
        fillers(0, 1, 2, 3),
        [*fillers(0, 1), THINGS[2], *fillers(3)],
        [FILLERS[0], THINGS[3], *fillers(1, 2)],
        fillers(0, 1, 2, 3),
        fillers(0, 1, 2, 3),
    ]
)
SEEN = distinct_documents((*METHOD.values(), *RANKED.values()))
KNOWN = {f"thing {i}": (THINGS[i],) for i in range(4)}
SOURCES = Sources(METHOD, RANKED, 2, SEEN, KNOWN, seed=0)


class Given:
    """A collector that has its documents from a table."""

    def __init__(self, documents: Mapping[str, tuple[Document, ...]]) -> None:
        self.documents = documents

    async def __call__(self, question: Question) -> Gathered:
        return Gathered(Trajectory(question, (), (), Stop.FINISHED, self.documents[question.id]))


def answer(request: dict[str, Any]) -> Reply:
    """Read the thing's colour off the documents; know thing 5; waver on thing 1 at odd seeds; babble about thing 2."""
    number = request["messages"][-1]["content"].split()[-1].strip("?")
    colour, seed = f"colour{number}", request.get("seed", 0)
    if number == "1" and seed % 2:
        return chat("no idea")
    if number == "5" or colour in request["messages"][0]["content"]:
        return chat(f"It is {colour}.")
    return chat(f"no idea {seed}" if number == "2" else "no idea")


async def folders(tmp_path: Path, questions: Sequence[Question] = QUESTIONS) -> dict[str, Path]:
    for name, documents in (("method", METHOD), ("ranked", RANKED)):
        await collect(questions, Given(documents), tmp_path / name, {}, name)
    return {"contexts": tmp_path / "method", "baseline": tmp_path / "ranked", "output": tmp_path / "controls"}


def configured(paths: Mapping[str, Path], server: FakeServer, **settings: Any) -> ControlsConfig:
    generator = GeneratorConfig(base_url=server.url, retry_window_s=0.0, malformed_retries=0)
    config = ControlsConfig(
        **paths,
        method="s3",
        baseline_documents=2,
        repeat=RepeatConfig(times=4),
        generator=generator,
        scoring=ScoringConfig(resamples=50),
        run=RunConfig(concurrency=3, max_failures=2),
    )
    return replace(config, **settings)


def accuracies(report: ControlsReport) -> dict[str, float]:
    return {figures.name: figures.accuracy for figures in report.conditions}


@pytest.mark.parametrize(
    ("name", "wanted", "short"),
    [
        ("method", METHOD, 0),
        ("baseline", {id: documents[:2] for id, documents in RANKED.items()}, 0),
        ("method_cut", {id: documents[:2] for id, documents in METHOD.items()}, 2),
        ("baseline_cut", {id: RANKED[id][: len(METHOD[id])] for id in METHOD}, 0),
        ("none", dict.fromkeys(METHOD, ()), 0),
        ("gold", {q.id: (THINGS[i],) for i, q in enumerate(QUESTIONS[:4])}, 0),
    ],
)
def test_documents_of_a_condition(name: Any, wanted: Mapping[str, tuple[Document, ...]], short: int) -> None:
    condition = build_condition(name, QUESTIONS, SOURCES)
    assert (condition.documents, condition.short) == (wanted, short)


def test_random_documents_are_others_and_as_many() -> None:
    condition = build_condition("random", QUESTIONS, SOURCES)
    for question, thing in zip(QUESTIONS, THINGS, strict=True):
        drawn = condition.documents[question.id]
        own = {*METHOD[question.id], *RANKED[question.id], thing}
        assert not own & set(drawn) and len(set(drawn)) == len(drawn)
    # Question 0 has seen all fillers, so only three things are left for it.
    assert [len(condition.documents[question.id]) for question in QUESTIONS] == [3, 4, 4, 1, 0, 2]
    assert condition.short == 1


def test_random_documents_depend_on_seed_and_question_alone() -> None:
    whole = build_condition("random", QUESTIONS, SOURCES).documents
    alone = build_condition("random", QUESTIONS[2:3], replace(SOURCES, pool=list(SEEN))).documents
    assert alone[QUESTIONS[2].id] == whole[QUESTIONS[2].id]
    pool = [Document(str(i), f"Page {i}", f"Text {i}") for i in range(5000)]
    drawn = [random_documents(QUESTIONS[2], 4, replace(SOURCES, pool=pool, seed=seed)) for seed in range(20)]
    assert len(set(drawn)) == 20
    assert random_documents(QUESTIONS[2], 4, replace(SOURCES, pool=pool)) == drawn[0]


def test_gold_passages_count_only_if_all_are_known() -> None:
    two = replace(QUESTIONS[0], gold_titles=("thing 1", "Thing 0", "thing 1"))
    assert gold_documents(two, KNOWN) == (THINGS[1], THINGS[0])
    assert gold_documents(replace(two, gold_titles=("Thing 0", "Thing 9")), KNOWN) == ()
    assert gold_documents(replace(two, gold_titles=()), KNOWN) == ()


def test_a_question_without_its_baseline_is_named() -> None:
    for name in ("baseline", "method_cut", "baseline_cut"):
        with pytest.raises(DataError, match="no documents for question 'alpha/test/0'"):
            build_condition(name, QUESTIONS, replace(SOURCES, ranked={}))
    assert build_condition("random", QUESTIONS[:1], replace(SOURCES, ranked={})).documents


async def test_figures_by_hand(tmp_path: Path) -> None:
    paths = await folders(tmp_path)
    async with FakeServer(default=answer) as server:
        report = await run(configured(paths, server))
        asked = len(server.requests)
        # All of it is in the journals: nothing is asked again, and the report is the same.
        assert await run(configured(paths, server)) == report
        assert len(server.requests) == asked == 6 * 6 + 4 + 4 * 6
    assert accuracies(report) == pytest.approx(
        {
            "method": 4 / 6,  # 0, 1, 3 and 5
            "baseline": 3 / 6,  # 0, 3 and 5
            "method_cut": 3 / 6,  # 1 is in third place
            "baseline_cut": 3 / 6,  # 0, 5 and, in third place, 2; 3 had one document only
            "random": 1 / 6,
            "gold": 1.0,
            "none": 1 / 6,
        },
        abs=1e-12,
    )
    shown = {figures.name: (figures.n, figures.documents, figures.short) for figures in report.conditions}
    assert shown["method"] == (6, pytest.approx(15 / 6), 0)
    assert shown["method_cut"] == (6, pytest.approx(9 / 6), 2)
    assert (shown["gold"], shown["none"]) == ((4, 1.0, 0), (6, 0.0, 0))
    assert {item.name: (item.left, item.value.n, round(6 * item.value.value, 9)) for item in report.differences} == {
        "gain over the baseline": ("method", 6, 1.0),
        "gain with as many documents as the baseline": ("method_cut", 6, 0.0),
        "gain over the baseline with as many documents as the method": ("method", 6, 1.0),
        "gain over random documents": ("method", 6, 3.0),
        "gain over no documents": ("method", 6, 3.0),
        "what the gold passages would add": ("gold", 4, 1.5),  # question 2 of 4
    }
    (gain, *_) = report.differences
    assert {source: (rate.value, rate.n) for source, rate in gain.by_source.items()} == {
        "alpha": (pytest.approx(1 / 3), 3),
        "beta": (0.0, 3),
    }
    assert gain.value.low <= gain.value.value <= gain.value.high
    beta = report.conditions[0].by_source["beta"]
    assert (beta.n, beta.accuracy, beta.documents) == (3, pytest.approx(2 / 3), 1.0)


async def test_repeats_by_hand(tmp_path: Path) -> None:
    paths = await folders(tmp_path)
    async with FakeServer(default=answer) as server:
        found = (await run(configured(paths, server, conditions=()))).repeatability
        assert sorted({request["seed"] for request in server.requests}) == [0, 1, 2, 3]
    assert found is not None
    # Verdicts on question 1 alternate; the answers to question 2 all differ.
    assert (found.repeats, found.seeds, found.failed, found.temperature) == (4, (0, 1, 2, 3), 0, 0.0)
    assert (found.same_verdict.value, found.same_answer.value) == (pytest.approx(5 / 6), pytest.approx(4 / 6))
    assert found.pair_verdict.value == pytest.approx((5 + 1 / 3) / 6)
    assert found.pair_answer.value == pytest.approx((4 + 1 / 3 + 0) / 6)
    assert found.accuracies == pytest.approx((4 / 6, 3 / 6, 4 / 6, 3 / 6))
    assert {source: rate.value for source, rate in found.by_source.items()} == pytest.approx(
        {"alpha": (2 + 1 / 3) / 3, "beta": 1.0}
    )
    assert found.same_verdict.low <= 5 / 6 <= found.same_verdict.high == 1.0


async def test_repeats_bypass_the_cache_and_take_their_settings(tmp_path: Path) -> None:
    paths = await folders(tmp_path)
    async with FakeServer(default=answer) as server:
        cached = GeneratorConfig(server.url, cache_path=tmp_path / "cache.sqlite", seed=None, retry_window_s=0.0)
        settings = {"conditions": ("method",), "generator": cached}
        repeat = RepeatConfig(times=3, questions=2, temperature=0.7)
        await run(configured(paths, server, repeat=RepeatConfig(times=0), **settings))
        assert len(server.requests) == 6
        other = {**paths, "output": tmp_path / "again"}
        found = (await run(configured(other, server, repeat=repeat, **settings))).repeatability
        # The condition came from the cache, the repeats did not.
        assert len(server.requests) == 6 + 3 * 2
        assert all(request["temperature"] == 0.7 and "seed" not in request for request in server.requests[6:])
    assert found is not None and found.seeds == (None, None, None)
    assert (found.same_answer.n, found.same_answer.value) == (2, 1.0)


async def test_the_report_says_it_all(tmp_path: Path) -> None:
    paths = await folders(tmp_path)
    async with FakeServer(default=answer) as server:
        report = await run(configured(paths, server))
    written = json.loads((paths["output"] / "controls.json").read_text())
    assert written["conditions"][0]["accuracy"] == pytest.approx(4 / 6)
    assert written["repeatability"]["same_verdict"]["value"] == pytest.approx(5 / 6)
    text = (paths["output"] / "controls.md").read_text()
    assert text.startswith("# Controls of s3\n")
    for figures in report.conditions:
        assert f"- **{figures.name}**: {MEANINGS[figures.name]}." in text
    assert "| method_cut | 50.0 | " in text
    assert "| gain over the baseline | method - baseline | +16.7 | " in text
    assert "| two verdicts alike | 88.9 | " in text
    assert "asked 4 times each without a cache, at temperature 0 (seeds 0, 1, 2, 3)" in text
    assert "Accuracy of one repeat was 50.0 to 66.7 %" in text
    assert "| condition | alpha | beta |" in text
    summary = controls_summary(paths["output"])
    assert markdown(summary["differences"]) in text and markdown(summary["repeatability"]) in text
    assert summary["details"] == str(paths["output"] / "controls.md")


async def test_the_baseline_column_serves_and_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    bare = [
        replace(q, gold_titles=(), baseline=Baseline(RANKED[q.id][:2], "?", False), answers=("colour9",))
        for q in QUESTIONS
    ]
    paths = await folders(tmp_path, bare)
    async with FakeServer(default=answer) as server:
        conditions = ("baseline", "gold", "method_cut")
        settings = {"baseline": None, "baseline_documents": None, "repeat": RepeatConfig(times=0)}
        report = await run(configured(paths, server, conditions=conditions, **settings))
    assert accuracies(report) == {"baseline": 0.0, "method_cut": 0.0}
    assert (report.left_out, report.repeatability) == (("gold",), None)
    text = (paths["output"] / "controls.md").read_text()
    assert "Left out, because no question has what it takes: gold." in text and "Repeatability" not in text
    assert controls_summary(paths["output"])["repeatability"] is None


async def test_gold_passages_and_random_documents_come_from_the_corpus(tmp_path: Path) -> None:
    paths = await folders(tmp_path)
    corpus = tmp_path / "corpus.jsonl"
    pages = [*THINGS, *(Document(f"p{i}", f"Page {i}", f"Text {i}.") for i in range(50))]
    rows = [{"id": page.id, "title": page.title, "text": page.text} for page in pages]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    async with FakeServer(default=answer) as server:
        settings = {"corpus": corpus, "random_from": "corpus", "repeat": RepeatConfig(times=0)}
        report = await run(configured(paths, server, conditions=("random", "gold"), **settings))
    random, gold = report.conditions
    assert (gold.n, gold.accuracy) == (6, 1.0)
    assert (random.documents, random.short, random.answer_in_context) == (pytest.approx(15 / 6), 0, 0.0)


async def test_a_run_that_met_failures_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    paths = await folders(tmp_path)
    broken = {"2", "4"}

    def sometimes(request: dict[str, Any]) -> Reply:
        if request["messages"][-1]["content"].split()[-1].strip("?") in broken:
            return Reply(b"{}", status=400)
        return answer(request)

    settings = {"conditions": ("method", "none"), "repeat": RepeatConfig(times=2)}
    async with FakeServer(default=sometimes) as server:
        config = configured(paths, server, **settings)
        with pytest.raises(Unfinished, match=r"method: 2 of 6 questions failed, listed in .*method\.errors\.jsonl"):
            await run(config)
        errors = (paths["output"] / "answers" / "method.errors.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in errors] == ["alpha/test/2", "beta/test/4"]
        assert not (paths["output"] / "controls.json").exists()
        broken.clear()
        before = len(server.requests)
        report = await run(config)
        assert len(server.requests) == before + 2 + 6 + 2 * 6
        assert not (paths["output"] / "answers" / "method.errors.jsonl").exists()
    assert accuracies(report) == pytest.approx({"method": 4 / 6, "none": 1 / 6})


async def test_allowed_failures_are_counted_and_no_success(tmp_path: Path) -> None:
    paths = await folders(tmp_path)

    def refuse(request: dict[str, Any]) -> Reply:
        broken = request["messages"][-1]["content"].endswith("0?")
        return Reply(b"{}", status=400) if broken else answer(request)

    async with FakeServer(default=refuse) as server:
        scoring = ScoringConfig(resamples=20, max_failed_fraction=0.2)
        settings = {"conditions": ("method",), "repeat": RepeatConfig(times=2), "scoring": scoring}
        report = await run(configured(paths, server, **settings))
    (method,) = report.conditions
    assert (method.n, method.failed, method.accuracy) == (6, 1, pytest.approx(3 / 6))
    assert method.documents_read == pytest.approx(11 / 5)
    assert report.repeatability is not None
    assert (report.repeatability.failed, report.repeatability.same_verdict.n) == (1, 5)


async def test_answers_of_another_generator_or_other_documents_are_not_taken_up(tmp_path: Path) -> None:
    paths = await folders(tmp_path)
    settings = {"conditions": ("random",), "repeat": RepeatConfig(times=0)}
    async with FakeServer(default=answer) as server:
        config = configured(paths, server, **settings)
        await run(config)
        with pytest.raises(DataError, match=r"holds results of other parameters: .*judge=False"):
            await run(replace(config, judge=True))
        before = len(server.requests)
        await run(replace(config, seed=1))
        # Question 4 has no documents to draw, and question 0 all there are, in another order.
        assert 0 < len(server.requests) - before <= 5


async def test_contexts_of_other_questions_are_refused(tmp_path: Path) -> None:
    paths = await folders(tmp_path)
    others = [replace(question, text=f"Another {question.text}") for question in QUESTIONS]
    await collect(others, Given(RANKED), tmp_path / "other", {}, "other")
    async with FakeServer(default=answer) as server:
        with pytest.raises(DataError, match="'alpha/test/0' is 'Another What is thing 0"):
            await run(configured({**paths, "baseline": tmp_path / "other"}, server))
        await collect(QUESTIONS[1:], Given(RANKED), tmp_path / "part", {}, "part")
        with pytest.raises(DataError, match="no documents for question 'alpha/test/0'"):
            await run(configured({**paths, "baseline": tmp_path / "part"}, server))
        assert server.requests == []


async def test_a_limit_takes_the_first_ids(tmp_path: Path) -> None:
    paths = await folders(tmp_path, [QUESTIONS[i] for i in (4, 0, 5, 2, 1, 3)])
    async with FakeServer(default=answer) as server:
        report = await run(configured(paths, server, limit=2, conditions=("method",), repeat=RepeatConfig(times=0)))
    assert (report.conditions[0].n, list(report.conditions[0].by_source)) == (2, ["alpha"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conditions": ["method", "rndom"]}, "expected one of 'method'.*did you mean 'random'"),
        ({"conditions": ["none", "none"]}, "names one twice"),
        ({"conditions": [], "repeat": {"times": 0}}, "nothing to do"),
        ({"random_from": "corpus"}, "needs a corpus"),
        ({"baseline_documents": 0}, "baseline_documents=0"),
        ({"limit": 0}, "limit=0"),
        ({"repeat": {"times": 1}}, "times=1; expected at least 2"),
        ({"repeat": {"questions": 0}}, "questions=0"),
        ({"generator": {"prompt": "zero_shot"}}, "shows no document"),
        ({"generator": {"cache_mode": "replay", "cache_path": "x"}}, r"cannot ask anything again; set repeat\.times=0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ControlsConfig, {"output": "o", "contexts": "c", **settings})


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"output={tmp_path}", f"contexts={tmp_path / 'nothing'}"]) == 1
    assert "holds no contexts.jsonl" in capsys.readouterr().err
    assert main(["output=o"]) == 2
    assert "missing required key 'contexts'" in capsys.readouterr().err
    overrides = ["output=o", "contexts=c", "conditions=[method,none]", "repeat.times=2", "generator.seed=7"]
    config = compose("controls", overrides, ControlsConfig)
    assert (config.conditions, config.repeat.times, config.generator.seed) == (("method", "none"), 2, 7)
    assert compose("controls", ["output=o", "contexts=c"], ControlsConfig).conditions == tuple(MEANINGS)


def test_a_folder_without_controls_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no controls\.json"):
        controls_summary(tmp_path)
    (tmp_path / "controls.json").write_text('{"method": "s3"}')
    with pytest.raises(
        DataError, match=r"controls\.json: missing required key 'seed'.* run verl\.evaluation\.controls"
    ):
        controls_summary(tmp_path)


@pytest.mark.parametrize(
    ("values", "share"), [("aaaa", 1.0), ("ab", 0.0), ("aab", 1 / 3), ("aabb", 1 / 3), ("abcd", 0.0)]
)
def test_pair_agreement(values: str, share: float) -> None:
    assert pair_agreement(values) == pytest.approx(share, abs=1e-12)


def test_nothing_answered_every_time_is_no_repeatability() -> None:
    row = ScoredQuestion("q/1", "toy", "", None, False, 0)
    config = ScoringConfig(resamples=10)
    repeats = [summarise([row], config), summarise([replace(row, failed="down")], config)]
    assert summarise_repeats(repeats, 0.0, [0, 1], config) is None
