"""Score collected contexts with one frozen generator, and write one report over all methods.

    python -m verl.evaluation.evaluate output=outputs/report contexts.naive_rag=outputs/contexts/naive_rag \\
        contexts.s3=outputs/contexts/s3 against=naive_rag generator.base_url=http://127.0.0.1:8000/v1

Written are `report.json` and `report.md`, one jsonl of scored questions a method (`scores/`), and the results in the
published layout (`results/`). With `answers=false` no generator is asked: the report is about the documents alone.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig, PromptName
from generator_llms.judge import open_judge
from verl.config import run_entry
from verl.errors import ConfigError
from verl.evaluation.collect import Context, collect_seconds, iter_contexts
from verl.evaluation.control_report import controls_summary
from verl.evaluation.footing import Footing, on_one_footing
from verl.evaluation.journal import write_whole
from verl.evaluation.published import write_results
from verl.evaluation.report import passage_table, plain, table, write_report
from verl.evaluation.score import check_questions, passage_row, score_contexts, with_trace
from verl.evaluation.summary import (
    ABOUT_ANSWERS,
    OF_ANSWERS,
    ScoredQuestion,
    ScoreReport,
    ScoringConfig,
    Summary,
    compare,
    summarise,
)
from verl.evaluation.variants import Ablation, ablated, cut, with_documents
from verl.records import read_questions
from verl.rewards.evidence import Answer, Judge
from verl.typed import nearest


@dataclass(frozen=True)
class EvaluateConfig:
    """What to score.

    Attributes:
        output: folder of the report, the scored questions and the published results.
        contexts: folders that `s3 collect` wrote, by the method's name in the report.
        questions: parquet of the questions that every method was to be asked; None takes all that any was asked.
        partial: where a folder is unfinished, score the questions that every method has, in place of an error.
        answers: let the generator answer; otherwise passages and costs are all that is scored.
        prompts: how the generator is asked for a method, where it is not `generator.prompt`; zero_shot and cot are
            asked without documents, whatever the method found.
        topk: the generator gets the first so many documents of every context; None gives it all.
        ablate: for every method with a trace of turns, further rows with its documents put together differently.
        against: the method that every other one is compared with, question by question.
        controls: folders that `s3 controls` wrote, by method; their tables go into the report.
        seed: written to the report; of the run that is evaluated.
        judge: let a model judge answers that match no gold literally.
        judge_generator: the model that judges; as published the generator itself if None.
    """

    output: Path
    contexts: Mapping[str, Path] = field(default_factory=dict)
    questions: Path | None = None
    partial: bool = False
    answers: bool = True
    prompts: Mapping[str, PromptName] = field(default_factory=dict)
    topk: int | None = None
    ablate: tuple[Ablation, ...] = ()
    against: str | None = None
    controls: Mapping[str, Path] = field(default_factory=dict)
    seed: int = 0
    judge: bool = False
    judge_generator: GeneratorConfig | None = None
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)

    def __post_init__(self) -> None:
        if not self.contexts:
            raise ValueError("contexts is empty; name a folder for each method, contexts.naive_rag=PATH")
        if self.topk is not None and self.topk < 1:
            raise ValueError(f"topk={self.topk}; expected at least 1, or null for all documents")
        if not self.answers and (self.against or self.judge):
            raise ValueError("answers=false scores no answer; leave out against and judge, or let the generator answer")
        asked = [*self.prompts, *self.controls, *([self.against] if self.against else [])]
        for name in asked:
            if name not in self.contexts:
                near = nearest(name, list(self.contexts))
                raise ValueError(f"{name!r} is no method of contexts; did you mean {near!r}?")


async def score_method(
    name: str,
    contexts: Sequence[Context],
    output: Path,
    answer: Answer,
    judge: Judge | None = None,
    config: ScoringConfig | None = None,
) -> ScoreReport:
    """Score the contexts of one method, with a progress bar.

    Writes the scored questions to `output/scores/{name}.jsonl` and the published layout to `output/results/`.

    Raises:
        DataError: no contexts.
        GeneratorError: more questions failed than `config` allows.
    """
    config = config or ScoringConfig()
    questions = [context.trajectory.question for context in contexts]
    documents = {context.trajectory.question.id: context.trajectory.documents for context in contexts}
    with tqdm(total=len(questions), desc=f"scoring {name}", unit="q") as bar:
        scored = await score_contexts(questions, documents, answer, judge, config, lambda done, total: bar.update())
    rows = [
        with_trace(row, context.trajectory, context.tokens, context.seconds)
        for row, context in zip(scored.rows, contexts, strict=True)
    ]
    write_rows(output / "scores" / f"{name}.jsonl", rows)
    write_results(output / "results", name, questions, rows)
    return summarise(rows, config)


def score_passages(
    name: str, contexts: Sequence[Context], output: Path, config: ScoringConfig | None = None
) -> ScoreReport:
    """Score what one method found, without asking a generator; write the scored questions as `score_method` does.

    Raises:
        DataError: no contexts.
    """
    questions = [context.trajectory.question for context in contexts]
    documents = {context.trajectory.question.id: context.trajectory.documents for context in contexts}
    check_questions(questions, documents)
    rows = [
        with_trace(passage_row(question, documents[question.id]), context.trajectory, context.tokens, context.seconds)
        for question, context in zip(questions, contexts, strict=True)
    ]
    write_rows(output / "scores" / f"{name}.jsonl", rows, left_out=ABOUT_ANSWERS)
    return summarise(rows, config or ScoringConfig())


async def score_folder(
    name: str,
    folder: Path,
    output: Path,
    answer: Answer,
    judge: Judge | None = None,
    config: ScoringConfig | None = None,
) -> dict[str, Any]:
    """Score what `s3 collect` wrote into `folder` and return the method's figures; raises as `score_method`."""
    contexts = list(iter_contexts(folder))
    started = time.perf_counter()
    report = await score_method(name, contexts, output, answer, judge, config)
    return figures(report, contexts, collect_seconds(folder) + time.perf_counter() - started)


def write_rows(path: Path, rows: Sequence[ScoredQuestion], left_out: Sequence[str] = ()) -> None:
    """Write scored questions, one JSON object a line."""
    fields = ({name: value for name, value in asdict(row).items() if name not in left_out} for row in rows)
    write_whole(path, "".join(json.dumps(found) + "\n" for found in fields))


def figures(report: ScoreReport, contexts: Sequence[Context], seconds: float, answered: bool = True) -> dict[str, Any]:
    """Return a method's row of the report.

    Args:
        seconds: wall-clock of collecting and scoring.
        answered: whether a generator was asked; what depends on its answers is None otherwise.
    """
    overall, n = report.overall, len(contexts)
    return {
        **_means(overall, answered),
        "accuracy_interval": [overall.accuracy_low, overall.accuracy_high] if answered else None,
        "accuracy_by_kind": {kind: found.accuracy for kind, found in report.by_kind.items()} if answered else {},
        "by_source": {source: _source_figures(summary, answered) for source, summary in report.by_source.items()},
        "macro_accuracy": report.macro_accuracy if answered else None,
        "seconds_per_question": overall.seconds,
        "seconds": round(seconds, 2),
        "valid": sum(context.trajectory.valid for context in contexts) / n,
    }


def _means(summary: Summary, answered: bool) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(summary).items() if name not in ("accuracy_low", "accuracy_high")}
    if answered:
        return kept
    shown = {name: value for name, value in summary.intervals.items() if name not in OF_ANSWERS}
    return kept | dict.fromkeys(OF_ANSWERS) | {"intervals": shown}


def _source_figures(summary: Summary, answered: bool) -> dict[str, Any]:
    kept = ("n", "accuracy", "em", "f1", "recall", "answer_in_context", "own_em", "intervals")
    means = _means(summary, answered)
    interval = [summary.accuracy_low, summary.accuracy_high] if answered else None
    return {name: means[name] for name in kept} | {"accuracy_interval": interval}


async def run(config: EvaluateConfig) -> dict[str, Any]:
    """Score as configured, write the report and return it.

    Raises:
        DataError: a folder holds no contexts, is unfinished, or is about other questions than the others.
        GeneratorError: more questions failed than `scoring.max_failed_fraction` allows.
    """
    asked = read_questions(config.questions) if config.questions else None
    found = {name: list(iter_contexts(folder)) for name, folder in config.contexts.items()}
    _check_any(config, found)
    footing = on_one_footing(config.contexts, found, asked, config.partial)
    methods, rows = await (_answered(config, footing) if config.answers else _passages(config, footing))
    if config.against:
        for name in methods.keys() - {config.against}:
            compared = compare(rows[name], rows[config.against], config.scoring)
            methods[name]["against_baseline"] = asdict(compared)
    extra: dict[str, Any] = {"baseline": config.against} if config.against else {}
    if config.controls:
        extra["controls"] = {name: controls_summary(folder) for name, folder in config.controls.items()}
    if footing.missing:
        extra["partial"] = {"asked": footing.asked, "missing": footing.missing}
    return write_report(config.output, methods, config.seed, extra)


Scored = tuple[dict[str, dict[str, Any]], dict[str, Sequence[ScoredQuestion]]]
"""Figures and scored questions, both by method."""


async def _answered(config: EvaluateConfig, footing: Footing) -> Scored:
    methods: dict[str, dict[str, Any]] = {}
    rows: dict[str, Sequence[ScoredQuestion]] = {}
    async with AsyncExitStack() as stack:
        generators = await _generators(config, stack)
        usual = generators[config.generator.prompt]
        judge = await open_judge(config.judge_generator, usual, stack) if config.judge else None
        for name, contexts, seconds in _rows_of_the_report(config, footing):
            answer = generators[config.prompts.get(name, config.generator.prompt)].answer
            started = time.perf_counter()
            report = await score_method(name, contexts, config.output, answer, judge, config.scoring)
            methods[name] = figures(report, contexts, seconds + time.perf_counter() - started)
            rows[name] = report.rows
    return methods, rows


async def _passages(config: EvaluateConfig, footing: Footing) -> Scored:
    methods: dict[str, dict[str, Any]] = {}
    rows: dict[str, Sequence[ScoredQuestion]] = {}
    for name, contexts, seconds in _rows_of_the_report(config, footing):
        report = score_passages(name, contexts, config.output, config.scoring)
        methods[name] = figures(report, contexts, seconds, answered=False)
        rows[name] = report.rows
    return methods, rows


async def _generators(config: EvaluateConfig, stack: AsyncExitStack) -> dict[str, GeneratorClient]:
    """Return one client for each way of asking; all are the same model."""
    prompts = dict.fromkeys((config.generator.prompt, *config.prompts.values()))
    return {
        prompt: await stack.enter_async_context(GeneratorClient(replace(config.generator, prompt=prompt)))
        for prompt in prompts
    }


def _check_any(config: EvaluateConfig, found: Mapping[str, Sequence[Context]]) -> None:
    for name, contexts in found.items():
        if not contexts:
            folder = config.contexts[name]
            raise ConfigError(f"contexts.{name}={folder} holds no finished question; run `s3 collect` again")


def _rows_of_the_report(config: EvaluateConfig, footing: Footing) -> list[tuple[str, list[Context], float]]:
    """Return name, contexts and seconds of collecting of every row: each method, then its ablations."""
    found: list[tuple[str, list[Context], float]] = []
    for name, contexts in footing.contexts.items():
        seconds = collect_seconds(config.contexts[name])
        found.append((name, [_cut(context, config.topk) for context in contexts], seconds))
        if not any(context.trajectory.turns for context in contexts) or all(c.tokens == 0 for c in contexts):
            continue  # naive RAG and the like have nothing to ablate
        for ablation in config.ablate:
            changed = [_with(context, ablated(context.trajectory, ablation)) for context in contexts]
            found.append((f"{name}_{ablation}", [_cut(context, config.topk) for context in changed], seconds))
    return found


def _cut(context: Context, topk: int | None) -> Context:
    return _with(context, cut(context.trajectory.documents, topk))


def _with(context: Context, documents: Sequence[Any]) -> Context:
    return replace(context, trajectory=with_documents(context.trajectory, documents))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("evaluate", EvaluateConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: EvaluateConfig) -> None:
    report = asyncio.run(run(config))
    shown = table(report["methods"]) if config.answers else passage_table(report["methods"])
    sys.stdout.write("\n" + plain(shown))


if __name__ == "__main__":
    sys.exit(main())
