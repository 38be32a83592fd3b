"""Score collected contexts with one frozen generator, and write one report over all methods.

    python -m verl.evaluation.evaluate output=outputs/report contexts.naive_rag=outputs/contexts/naive_rag \\
        contexts.s3=outputs/contexts/s3 generator.base_url=http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.judge import LLMJudge
from verl.config import run_entry
from verl.errors import ConfigError
from verl.evaluation.collect import Context, collect_seconds, iter_contexts
from verl.evaluation.journal import write_whole
from verl.evaluation.report import plain, table, write_report
from verl.evaluation.score import ScoreReport, ScoringConfig, score_contexts
from verl.rewards.evidence import Answer, Judge


@dataclass(frozen=True)
class EvaluateConfig:
    """What to score.

    Attributes:
        output: folder of the report and of one jsonl of scored questions a method.
        contexts: folders that `s3 collect` wrote, by the method's name in the report.
        seed: written to the report; of the run that is evaluated.
        judge: let the generator judge answers that match no gold literally.
    """

    output: Path
    contexts: Mapping[str, Path] = field(default_factory=dict)
    seed: int = 0
    judge: bool = False
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)


async def score_method(
    name: str,
    folder: Path,
    output: Path,
    answer: Answer,
    judge: Judge | None = None,
    config: ScoringConfig | None = None,
) -> dict[str, Any]:
    """Score the contexts in `folder`, with a progress bar, and write the scored questions to `output/{name}.jsonl`.

    Returns:
        The method's figures, as `verl.evaluation.report` wants them.

    Raises:
        DataError: `folder` holds no contexts.
        GeneratorError: more questions failed than `config` allows.
    """
    contexts = list(iter_contexts(folder))
    questions = [context.trajectory.question for context in contexts]
    documents = {context.trajectory.question.id: context.trajectory.documents for context in contexts}
    started = time.perf_counter()
    with tqdm(total=len(questions), desc=f"scoring {name}", unit="q") as bar:
        report = await score_contexts(questions, documents, answer, judge, config, lambda done, total: bar.update())
    seconds = collect_seconds(folder) + time.perf_counter() - started
    write_whole(output / f"{name}.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in report.rows))
    return figures(report, contexts, seconds)


def figures(report: ScoreReport, contexts: Sequence[Context], seconds: float) -> dict[str, Any]:
    """Return a method's row of the report.

    Args:
        seconds: wall-clock of collecting and scoring.
    """
    overall, n = report.overall, len(contexts)
    trajectories = [context.trajectory for context in contexts]
    return {
        "accuracy": overall.accuracy,
        "accuracy_interval": [overall.accuracy_low, overall.accuracy_high],
        "accuracy_by_kind": {kind: summary.accuracy for kind, summary in report.by_kind.items()},
        "recall": overall.recall,
        "searches": sum(trajectory.searches for trajectory in trajectories) / n,
        "n": overall.n,
        "seconds": round(seconds, 2),
        "span": overall.span,
        "em": overall.em,
        "f1": overall.f1,
        "answer_in_context": overall.answer_in_context,
        "documents": overall.documents,
        "tokens": sum(context.tokens for context in contexts) / n,
        "valid": sum(trajectory.valid for trajectory in trajectories) / n,
        "failed": overall.failed,
    }


async def run(config: EvaluateConfig) -> dict[str, Any]:
    """Score as configured, write the report and return it; raises what `score_method` raises."""
    if not config.contexts:
        raise ConfigError("contexts is empty; name a folder for each method, contexts.naive_rag=PATH")
    methods: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        generator = await stack.enter_async_context(GeneratorClient(config.generator))
        judge = LLMJudge(generator.complete) if config.judge else None
        for name, folder in config.contexts.items():
            methods[name] = await score_method(
                name, folder, config.output / "scores", generator.answer, judge, config.scoring
            )
    return write_report(config.output, methods, config.seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("evaluate", EvaluateConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: EvaluateConfig) -> None:
    report = asyncio.run(run(config))
    sys.stdout.write("\n" + plain(table(report["methods"])))


if __name__ == "__main__":
    sys.exit(main())
