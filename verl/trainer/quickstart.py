"""The whole pipeline on the embedded world, on any machine and offline, ending in one table.

    python -m verl.trainer.quickstart                       # or: bash scripts/quickstart.sh, which installs first
    python -m verl.trainer.quickstart world.test=60 train.engine.kind=hf train.algorithm=ppo

Build a world and its index, start retriever and frozen generator, precompute naive RAG, train the searcher, gather
contexts by every method, score them. Each stage is kept and reused by the next run while its inputs stay the same.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from data_preprocess import rag_cache
from data_preprocess.rag_cache import BaselineConfig, RagCacheConfig, TrainFilter
from data_preprocess.world import build as world
from data_preprocess.world.build import WorldConfig, WorldFiles
from generator_llms.client import GeneratorClient
from verl.agent.grammar.registry import build_grammar
from verl.agent.protocols import Sampling
from verl.config import compose, run_entry
from verl.errors import CheckpointError, ConfigError
from verl.evaluation import collect
from verl.evaluation.collect import CollectConfig
from verl.evaluation.collectors import Searcher
from verl.evaluation.evaluate import score_folder
from verl.evaluation.identity import model_identity
from verl.evaluation.report import plain, stage_table, table, write_report
from verl.records import read_questions
from verl.retrieval.build import build_index
from verl.retrieval.client import RetrieverClient
from verl.retrieval.corpus import Corpus
from verl.single_controller.cluster import RayConfig
from verl.trainer import main_ppo, preflight
from verl.trainer.checkpoint import Checkpoints
from verl.trainer.config import TrainConfig
from verl.trainer.quickstart_services import Endpoints, QuickstartServices, Served
from verl.trainer.stages import Done, Stages
from verl.trainer.tracking import TrackingConfig
from verl.typed import encode
from verl.workers.engines import create_engine

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_NAIVE_RAG, _BASE, _TRAINED, _ORACLE = "naive_rag", "base_searcher", "trained_searcher", "oracle"
_CHECKPOINTS = Path(world.__file__).parent / "checkpoints"


@dataclass(frozen=True)
class QuickstartConfig:
    """What the quickstart runs.

    Attributes:
        output: folder of everything that it writes.
        generator_model: checkpoint of the frozen generator.
        sampled: also evaluate the untrained searcher sampled as in training, not only greedily.
        world: sizes; its seed is `seed`'s by default.
        documents: how many documents naive RAG and round 0 get.
        train: overrides of the training configuration (`configs/train.yaml`), which says which searcher plays which
            protocol on which engine, how long the generator's answers may be, and how to train.
    """

    seed: int = 0
    output: Path = Path("outputs/quickstart")
    generator_model: Path = _CHECKPOINTS / "generator"
    sampled: bool = True
    world: WorldConfig = field(default_factory=WorldConfig)
    documents: BaselineConfig = field(default_factory=BaselineConfig)
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training stage hands back.

    Attributes:
        model: the trained searcher in Hugging Face format.
        summary: the report's `training` entry.
    """

    model: Path
    summary: Mapping[str, Any]


Train = Callable[[TrainConfig], Trained]
"""Trains on prepared questions with running services, writing into `config.trainer.folder`; resumes if it can."""


@dataclass(frozen=True)
class Layout:
    """Where the quickstart's files are."""

    folder: Path

    @property
    def world(self) -> WorldFiles:
        """Corpus and bare questions."""
        return WorldFiles(self.folder / "world")

    @property
    def index(self) -> Path:
        """The BM25 index."""
        return self.folder / "index"

    @property
    def prepared(self) -> Path:
        """The folder of `questions`."""
        return self.folder / "questions"

    def questions(self, split: str) -> Path:
        """The questions of a split with round-0 documents and baseline."""
        return self.prepared / f"{split}.parquet"

    @property
    def training(self) -> Path:
        """The training run's folder."""
        return self.folder / "training"

    def contexts(self, method: str) -> Path:
        """What a method gathered for the test questions."""
        return self.folder / "contexts" / method

    @property
    def scores(self) -> Path:
        """Scored questions, one jsonl a method."""
        return self.folder / "scores"

    @property
    def results(self) -> Path:
        """Answers and scores in the published layout."""
        return self.folder / "results"


def quickstart(config: QuickstartConfig, train: Train | None = None) -> dict[str, Any]:
    """Run all stages and write `report.json` and `report.md`.

    Args:
        train: trains the searcher between the baseline and the evaluation; left out if None.

    Returns:
        The report.

    Raises:
        ConfigError: the training could not run as configured; found before a service is started.
    """
    started = time.perf_counter()
    recipe, files, stages = training_config(config), Layout(config.output), Stages(config.output)
    if train is not None:
        preflight.check(recipe, ())  # the training checks its questions too, which are not there yet
    served = Served(config.generator_model, files.index, files.world.corpus, config.output)
    with QuickstartServices(recipe, served, stages, config.documents.baseline_k) as services:
        run = _Pipeline(config, recipe, files, stages, services)
        world = run.world()
        index = run.index(world)
        baseline = run.baseline(index)
        methods = {_NAIVE_RAG: run.naive_rag(baseline)}
        methods |= run.base_searcher(baseline)
        trained = run.training(baseline, train) if train is not None else None
        if trained is not None:
            methods[_TRAINED] = run.trained_searcher(trained)
        methods[_ORACLE] = run.oracle(baseline)
        scores = run.scores(methods)
    extra = {
        **({"training": trained.value["summary"]} if trained is not None else {}),
        "stages": stages.seconds,
        "reused": [done.name for done in stages.done if done.reused],
        "wall_clock": round(time.perf_counter() - started, 1),
        "baseline": baseline.value,
        "documents": asdict(config.documents),
        "engine": recipe.engine.kind,
        "device": recipe.hardware.device,
    }
    if trained is not None:
        shutil.copyfile(files.training / "report.png", config.output / "report.png")
    return write_report(config.output, scores.value, config.seed, extra)


@dataclass(frozen=True)
class _Pipeline:
    """The stages: for each what it depends on, what it writes, and what it does."""

    config: QuickstartConfig
    recipe: TrainConfig
    files: Layout
    stages: Stages
    services: QuickstartServices

    def world(self) -> Done:
        """Corpus and bare questions."""
        files, config = self.files, self.config.world
        return self.stages.run("world", config, [files.world.folder], lambda: build_world(config, files))

    def index(self, world: Done) -> Done:
        """The BM25 index over the corpus."""
        files = self.files
        return self.stages.run("index", world.fingerprint, [files.index], lambda: build_bm25(files))

    def baseline(self, index: Done) -> Done:
        """Round-0 documents and the naive-RAG baseline of every question."""
        files, documents = self.files, self.config.documents
        inputs = [index.fingerprint, documents, self._generator()]
        return self.stages.run(
            "baseline", inputs, [files.prepared], lambda: precompute(files, documents, self.services.up())
        )

    def naive_rag(self, baseline: Done) -> Done:
        """Contexts of naive RAG."""
        files, topk = self.files, self.config.documents.baseline_k
        return self.stages.run(
            f"contexts_{_NAIVE_RAG}",
            baseline.fingerprint,
            [files.contexts(_NAIVE_RAG)],
            lambda: gather_naive_rag(files, topk, self.services.up()),
        )

    def base_searcher(self, baseline: Done) -> dict[str, Done]:
        """Contexts of the untrained searcher, greedy and, if configured, sampled as in training."""
        ways = {_BASE: self.recipe.rollout.evaluation(self.config.seed)}
        if self.config.sampled:
            ways[f"{_BASE}_sampled"] = self.recipe.rollout.training(self.config.seed)
        return dict.fromkeys(ways, self._play(_BASE, self.recipe.engine.model, ways, baseline))

    def training(self, baseline: Done, train: Train) -> Done:
        """The trained searcher; its value is the model's folder and the report's summary."""
        # Where the services listen, and how the run is followed, changes nothing about the outcome.
        lasting = replace(self.recipe, tracking=TrackingConfig(), ray=RayConfig())
        inputs = [baseline.fingerprint, model_identity(self.recipe.engine.model), self._generator(), lasting]
        return self.stages.run(
            "training", inputs, [self.files.training], lambda: run_training(train, self.recipe, self.services.up())
        )

    def trained_searcher(self, trained: Done) -> Done:
        """Contexts of the trained searcher, greedy."""
        ways = {_TRAINED: self.recipe.rollout.evaluation(self.config.seed)}
        return self._play(_TRAINED, trained.value["model"], ways, trained)

    def oracle(self, baseline: Done) -> Done:
        """The gold passages as contexts."""
        files = self.files
        return self.stages.run(
            f"contexts_{_ORACLE}", baseline.fingerprint, [files.contexts(_ORACLE)], lambda: gather_oracle(files)
        )

    def scores(self, methods: Mapping[str, Done]) -> Done:
        """Answers from every method's contexts and their figures."""
        inputs = [[(name, done.fingerprint) for name, done in methods.items()], self._generator()]
        return self.stages.run(
            "scores",
            inputs,
            [self.files.scores, self.files.results],
            lambda: score(self.files, list(methods), self.services.up()),
        )

    def _play(self, name: str, model: str, ways: Mapping[str, Sampling], before: Done) -> Done:
        engine = replace(self.recipe.engine, model=model_identity(model))
        return self.stages.run(
            f"contexts_{name}",
            [before.fingerprint, engine, self.recipe.search, ways],
            [self.files.contexts(way) for way in ways],
            lambda: play(self.files, self.recipe, model, ways, self.services.up()),
        )

    def _generator(self) -> list[Any]:
        """What the generator's answers depend on."""
        asked = replace(self.recipe.generator, base_url="http://", timeout_s=1.0, retry_window_s=0.0, concurrency=1)
        return [model_identity(str(self.config.generator_model)), self.recipe.engine.dtype, asked]


def training_config(config: QuickstartConfig) -> TrainConfig:
    """Compose the training configuration, with this run's questions, folder and seed.

    Raises:
        ConfigError: an override is wrong, or a checkpoint is not there.
    """
    files = Layout(config.output)
    own = {
        "data.train": files.questions("train"),
        "data.validation": files.questions("validation"),
        "data.seed": config.seed,
        "trainer.folder": files.training,
        "trainer.seed": config.seed,
    }
    recipe = compose("train", [*overrides(own), *overrides(config.train)], TrainConfig)
    for name, model in (("generator_model", str(config.generator_model)), ("train.model.path", recipe.engine.model)):
        if not Path(model).is_dir():
            raise ConfigError(f"{name}={model}: no such folder; train the tiny models or name another checkpoint")
    return recipe


def overrides(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return nested settings as Hydra overrides: {"a": {"b": 1}} is `a.b=1`."""
    lines = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            lines += overrides(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name}={json.dumps(encode(value))}")
    return lines


def build_world(config: WorldConfig, files: Layout) -> dict[str, int]:
    """Write corpus and questions; return how many."""
    built = world.build(config, files.world.folder)
    counts = {split: len(read_questions(built.questions(split))) for split in SPLITS}
    return {"documents": len(Corpus.open(built.corpus)), **counts}


def build_bm25(files: Layout) -> None:
    """Index the corpus."""
    build_index(Corpus.open(files.world.corpus), "bm25", files.index)


def precompute(files: Layout, documents: BaselineConfig, at: Endpoints) -> dict[str, Any]:
    """Answer all splits by naive RAG; return the counts of each.

    Training questions are all kept, because the training configuration has the published filter itself.
    """
    everything = TrainFilter(drop_bare_golds=False, drop_rag_correct=False)
    summaries = {}
    for split in SPLITS:
        source, output = files.world.questions(split), files.questions(split)
        config = RagCacheConfig(
            source,
            output,
            split,
            documents=documents,
            filter=everything,
            retriever=at.retriever,
            generator=at.generator,
        )
        summaries[split] = asdict(asyncio.run(rag_cache.run(config)))
    return summaries


def gather_naive_rag(files: Layout, topk: int, at: Endpoints) -> None:
    """Gather the contexts of naive RAG."""
    config = CollectConfig(
        files.questions("test"), files.contexts("naive_rag"), "naive_rag", topk=topk, retriever=at.retriever
    )
    asyncio.run(collect.run(config))


def gather_oracle(files: Layout) -> None:
    """Gather the gold passages."""
    config = CollectConfig(files.questions("test"), files.contexts("oracle"), "oracle", corpus=files.world.corpus)
    asyncio.run(collect.run(config))


def play(files: Layout, recipe: TrainConfig, model: str, ways: Mapping[str, Sampling], at: Endpoints) -> None:
    """Let a searcher play the test questions, once for each way of sampling, on one engine."""
    asyncio.run(_play(files, recipe, model, ways, at))


async def _play(files: Layout, recipe: TrainConfig, model: str, ways: Mapping[str, Sampling], at: Endpoints) -> None:
    questions = read_questions(files.questions("test"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    async with AsyncExitStack() as stack:
        search = await stack.enter_async_context(RetrieverClient(at.retriever))
        engine = create_engine(replace(recipe.engine, model=model))
        stack.push_async_callback(engine.close)
        for name, sampling in ways.items():
            searcher = Searcher(build_grammar(recipe.search), engine, search, tokenizer, sampling)
            parameters = {"model": model_identity(model), "search": recipe.search, "sampling": sampling}
            await collect.collect(questions, searcher, files.contexts(name), parameters, name)


def score(files: Layout, methods: Sequence[str], at: Endpoints) -> dict[str, Any]:
    """Score every method's contexts; return their figures."""

    async def run() -> dict[str, Any]:
        async with GeneratorClient(at.generator) as generator:
            return {
                name: await score_folder(name, files.contexts(name), files.folder, generator.answer) for name in methods
            }

    return asyncio.run(run())


def run_training(train: Train, recipe: TrainConfig, at: Endpoints) -> dict[str, Any]:
    """Train with running services; return model and summary as JSON."""
    trained = train(replace(recipe, retriever=at.retriever, generator=at.generator))
    return {"model": str(trained.model), "summary": dict(trained.summary)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("quickstart", QuickstartConfig, sys.argv[1:] if arguments is None else arguments, _main)


def train_searcher(config: TrainConfig) -> Trained:
    """Train as `verl.trainer.main_ppo` does; the searcher is the last checkpoint's export."""
    summary = main_ppo.run(config)
    last = Checkpoints(config.trainer.folder / "checkpoints", config.trainer.checkpoint).latest()
    if last is None:
        raise CheckpointError(f"the training left no checkpoint in {config.trainer.folder}; its log says why")
    return Trained(last.export, asdict(summary))


def _main(config: QuickstartConfig) -> None:
    report = quickstart(config, train_searcher)
    sys.stdout.write(f"\n{plain(table(report['methods']))}\n{plain(stage_table(report['stages']))}\n")
    sys.stdout.write(f"{config.output / 'report.json'} and report.md hold these figures.\n")


if __name__ == "__main__":
    sys.exit(main())
