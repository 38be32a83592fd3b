"""DeepRetrieval on the embedded world, from nothing to a table: does the trained policy's query find what was asked?

    python -m verl.trainer.query_quickstart seed=0          # or: bash scripts/train/deepretrieval_world.sh seed=0

Build the world of `data_preprocess.world.rewording` and its BM25 index, serve it, train the agent to write queries, and
measure the recall of the first `search.topk` passages on held-out questions: of the raw question, of the untrained
agent (greedy and sampled) and of the trained one. Stages are kept and reused while their inputs stay the same.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from data_preprocess.world import rewording
from data_preprocess.world.build import WorldFiles
from data_preprocess.world.rewording import RewordingConfig
from verl.agent.grammar.registry import build_grammar
from verl.agent.protocols import Sampling
from verl.config import compose, run_entry
from verl.evaluation.collect import Context, collect, iter_contexts
from verl.evaluation.collectors import Collector, NaiveRag, Searcher
from verl.evaluation.identity import model_identity
from verl.evaluation.journal import write_whole
from verl.evaluation.report import markdown, plain, stage_table
from verl.evaluation.summary import bootstrap_interval
from verl.records import read_questions
from verl.retrieval.build import build_index
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.retrieval.corpus import Corpus
from verl.rewards.rank import id_recall
from verl.services import Service, free_ports, retriever_service, running
from verl.single_controller.cluster import RayConfig
from verl.trainer import preflight
from verl.trainer.config import TrainConfig
from verl.trainer.quickstart import overrides, train_searcher
from verl.trainer.stages import Done, Stages
from verl.trainer.tracking import TrackingConfig
from verl.workers.engines import create_engine

RAW, BASE, BASE_SAMPLED, TRAINED = "raw_question", "base_policy", "base_policy_sampled", "trained_policy"
_RESAMPLES = 2000


@dataclass(frozen=True)
class QueryQuickstartConfig:
    """What is run.

    Attributes:
        output: folder of everything that it writes.
        world: sizes; its seed is `seed`'s by default.
        train: overrides of the training configuration (`configs/train.yaml`).
    """

    seed: int = 0
    output: Path = Path("outputs/deepretrieval_world")
    world: RewordingConfig = field(default_factory=RewordingConfig)
    train: Mapping[str, Any] = field(default_factory=dict)


def query_quickstart(config: QueryQuickstartConfig) -> dict[str, Any]:
    """Run all stages and write `report.json`, `report.md` and `report.png`; return the report.

    Raises:
        ConfigError: the training could not run as configured; found before a service is started.
    """
    files = WorldFiles(config.output / "world")
    recipe, stages = training_config(config, files), Stages(config.output)
    preflight.check(recipe, ())
    built = stages.run("world", config.world, [files.folder], lambda: _build(config.world, files))
    index = config.output / "index"
    indexed = stages.run("index", built.fingerprint, [index], lambda: _index(files, index))
    with ExitStack() as stack:
        service = _service(index, files, recipe, config.output)
        with stages.aside("service"):
            stack.enter_context(running(service))
        recipe = replace(recipe, retriever=replace(recipe.retriever, url=f"{service.url}/retrieve"))
        run = _Run(config, recipe, files, stages)
        methods = run.untrained(indexed) | run.trained(indexed)
    report = {"methods": methods, "seed": config.seed, "topk": recipe.search.topk, "stages": stages.seconds}
    write_whole(config.output / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_whole(config.output / "report.md", f"{markdown(table(report))}\n{markdown(stage_table(stages.seconds))}")
    shutil.copyfile(recipe.trainer.folder / "report.png", config.output / "report.png")
    return report


def training_config(config: QueryQuickstartConfig, files: WorldFiles) -> TrainConfig:
    """Compose the training configuration, with this run's questions, folder and seed."""
    own = {
        "data.train": files.questions("train"),
        "data.validation": files.questions("validation"),
        "data.seed": config.seed,
        "trainer.folder": config.output / "training",
        "trainer.seed": config.seed,
    }
    return compose("train", [*overrides(own), *overrides(config.train)], TrainConfig)


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the figures as rows of cells."""
    rows = [["method", f"recall@{report['topk']}", "95 %", "valid", "n", "failed"]]
    for name, figures in report["methods"].items():
        low, high = figures["interval"]
        cells = (f"{100 * figures['recall']:.1f}", f"{100 * low:.1f}–{100 * high:.1f}", f"{100 * figures['valid']:.1f}")
        rows.append([name, *cells, str(figures["n"]), str(figures["failed"])])
    return rows


@dataclass(frozen=True)
class _Run:
    """The stages that need the service."""

    config: QueryQuickstartConfig
    recipe: TrainConfig
    files: WorldFiles
    stages: Stages

    def untrained(self, before: Done) -> dict[str, Any]:
        """Figures of the raw question and of the policy as it is."""
        ways = {BASE: self.recipe.rollout.evaluation(self.config.seed)}
        ways[BASE_SAMPLED] = self.recipe.rollout.training(self.config.seed)
        model = self.recipe.engine.model
        inputs = [before.fingerprint, model_identity(model), self.recipe.search, ways]
        folders = [self._contexts(name) for name in (RAW, *ways)]
        return self.stages.run("untrained", inputs, folders, lambda: self._measure(model, ways, raw=True)).value

    def trained(self, before: Done) -> dict[str, Any]:
        """Train, then figures of the trained policy, greedy."""
        # Where the service listens, and how the run is followed, changes nothing about the outcome.
        lasting = replace(self.recipe, retriever=RetrieverClientConfig(), tracking=TrackingConfig(), ray=RayConfig())
        inputs = [before.fingerprint, model_identity(self.recipe.engine.model), lasting]
        training = self.stages.run(
            "training", inputs, [self.recipe.trainer.folder], lambda: str(train_searcher(self.recipe).model)
        )
        ways = {TRAINED: self.recipe.rollout.evaluation(self.config.seed)}
        return self.stages.run(
            "trained",
            [training.fingerprint, ways],
            [self._contexts(TRAINED)],
            lambda: self._measure(training.value, ways, raw=False),
        ).value

    def _measure(self, model: str, ways: Mapping[str, Sampling], raw: bool) -> dict[str, Any]:
        return asyncio.run(self._play(model, ways, raw))

    async def _play(self, model: str, ways: Mapping[str, Sampling], raw: bool) -> dict[str, Any]:
        recipe, questions = self.recipe, read_questions(self.files.questions("test"))
        figures = {}
        async with AsyncExitStack() as stack:
            search = await stack.enter_async_context(RetrieverClient(recipe.retriever))
            collectors: dict[str, Collector] = {RAW: NaiveRag(search, recipe.search.topk)} if raw else {}
            engine = create_engine(replace(recipe.engine, model=model))
            stack.push_async_callback(engine.close)
            tokenizer, grammar = AutoTokenizer.from_pretrained(model), build_grammar(recipe.search)
            for name, sampling in ways.items():
                collectors[name] = Searcher(grammar, engine, search, tokenizer, sampling)
            for name, collector in collectors.items():
                parameters = {"model": model_identity(model), "search": recipe.search, "sampling": ways.get(name)}
                await collect(questions, collector, self._contexts(name), parameters, name)
                figures[name] = _figures(list(iter_contexts(self._contexts(name))))
        return figures

    def _contexts(self, name: str) -> Path:
        return self.config.output / "contexts" / name


def _figures(contexts: Sequence[Context]) -> dict[str, Any]:
    """Recall over all questions; a question whose answer could not be read found nothing."""
    recalls = [id_recall(c.trajectory.question.answers, c.trajectory.documents) for c in contexts]
    return {
        "recall": sum(recalls) / len(recalls),
        "interval": bootstrap_interval(recalls, _RESAMPLES, seed=0),
        "valid": sum(context.trajectory.valid for context in contexts) / len(contexts),
        "n": len(contexts),
        "failed": 0,  # `collect` raises where a question failed
    }


def _build(config: RewordingConfig, files: WorldFiles) -> None:
    rewording.build(config, files.folder)


def _index(files: WorldFiles, folder: Path) -> None:
    build_index(Corpus.open(files.corpus), "bm25", folder)


def _service(index: Path, files: WorldFiles, recipe: TrainConfig, folder: Path) -> Service:
    (port,) = free_ports(1)
    log = folder / "logs" / "retriever.log"
    return retriever_service(index, files.corpus, "bm25", recipe.search.topk, port, log)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("query_quickstart", QueryQuickstartConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: QueryQuickstartConfig) -> None:
    report = query_quickstart(config)
    sys.stdout.write(f"\n{plain(table(report))}\n{plain(stage_table(report['stages']))}\n")


if __name__ == "__main__":
    sys.exit(main())
