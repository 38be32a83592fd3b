"""The stages of self-training, each from files to files, so that any of them runs and can be looked at alone."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from verl.agent.grammar.exsearch import ExSearchGrammar
from verl.agent.loop import derive_seed
from verl.config import compose
from verl.errors import ConfigError, DataError
from verl.evaluation import collect
from verl.evaluation.collect import RunConfig
from verl.evaluation.collectors import Searcher
from verl.evaluation.identity import model_identity
from verl.evaluation.journal import write_whole
from verl.evaluation.own_answers import figures, own_answer
from verl.records import read_questions
from verl.trainer.exsearch.config import SelfTrainConfig
from verl.trainer.exsearch.files import (
    EpochFiles,
    Provenance,
    questions_identity,
    read_config,
    read_json,
    tokenizer_identity,
)
from verl.trainer.exsearch.policy import Player, tokenizer_of
from verl.trainer.exsearch.sample import Environment, ordered, sample, slice_of
from verl.trainer.exsearch.score import AnswerScorer, entropy_stage
from verl.trainer.exsearch.task import with_prefix
from verl.trainer.exsearch.weigh import Maker, format_stage, rows_path
from verl.trainer.quickstart import overrides
from verl.trainer.sft import SftSummary, run_sft
from verl.trainer.sft_config import SftConfig
from verl.typed import encode
from verl.types import Question

logger = logging.getLogger(__name__)
_PLACES = ("model", "align", "hf", "/", ".", "..")


@dataclass(frozen=True)
class Stage:
    """One iteration of a run and the model that it is about.

    Attributes:
        model: folder or hub name of the policy.
    """

    config: SelfTrainConfig
    player: Player
    epoch: int
    model: str

    def inference(self) -> dict[str, Any]:
        """Sample trajectories: `trajectories.jsonl` and the published inference file; return counts and scores.

        Raises:
            SamplingFailed: too many failed; run it again, it goes on.
        """
        began = time.perf_counter()
        questions, files = self.questions(), self.files()
        tokenizer = tokenizer_of(self.model)
        config = self.config

        async def work() -> dict[str, Any]:
            engine = await self.player.engine(self.model)
            around = Environment(config.search, engine, self.player.search, tokenizer)
            parameters = asdict(self.provenance()) | self._sampled_by() | {"retriever": await self.player.retriever()}
            seed = derive_seed(config.seed, self.epoch)
            assert seed is not None
            return dict(await sample(questions, around, config.sampling, seed, files, parameters))

        counts = self.player.run(work())
        return {**counts, "score": read_json(files.inference)["score"], "seconds": _since(began)}

    def entropy(self) -> dict[str, Any]:
        """Score the gold answer after each trajectory with the policy that sampled it: the published entropy file.

        Raises:
            DataError: the trajectories are of other questions, another tokenizer or another model.
        """
        began, files = time.perf_counter(), self.files()
        tokenizer, mine = tokenizer_of(self.model), self.provenance()
        mine.check(self._inference_config(), files.inference, ("questions", "tokenizer", "model"))
        self.player.release()
        scorer = AnswerScorer(self.model, self.config.scoring, self.config.engine.device)
        counts = entropy_stage(files, scorer, tokenizer, self.config.scoring, asdict(mine))
        return {**counts, "seconds": _since(began)}

    def format(self) -> dict[str, Any]:
        """Weigh the trajectories: the published training file and the token rows.

        Raises:
            DataError: inference and entropy file belong to different things, or nothing has a weight.
        """
        began, files, mine = time.perf_counter(), self.files(), self.provenance()
        mine.check(self._inference_config(), files.inference)
        mine.check(read_config(files.entropy), files.entropy)
        config = self.config
        maker = Maker(tokenizer_of(self.model), config.search, config.scoring, config.weights)
        belongs_to = asdict(mine) | {"weights": encode(config.weights)}
        found = format_stage(files, maker, belongs_to)
        write_whole(files.folder / "format.json", json.dumps({**found, "config": belongs_to}, indent=1) + "\n")
        return {**found, "seconds": _since(began)}

    def align(self, start: str) -> dict[str, Any]:
        """Learn from the token rows, beginning with the model `start`; return the new model and its figures.

        Raises:
            DataError: the rows are of another tokenizer or question set.
        """
        files = self.files()
        written = read_json(files.folder / "format.json")
        mine = replace(self.provenance(), tokenizer=tokenizer_identity(tokenizer_of(start)))
        mine.check(written.get("config", {}), files.rows)
        self.player.release()
        settings = {"data.train": rows_path(files), "trainer.seed": self.config.seed + self.epoch}
        summary = run_sft(sft_config(self.config.align, start, files.align, settings))
        return summary_of(summary)

    def evaluate(self, name: str, path: Path, questions_of: str) -> dict[str, Any]:
        """Play a question set once a question, by default greedily; return `own_answers.figures`.

        Raises:
            Unfinished: a service failed; run it again, it goes on.
        """
        began = time.perf_counter()
        config = self.config
        questions = read_questions(path, config.evaluation.limit)
        tokenizer, sampling = tokenizer_of(self.model), config.evaluation.sampling(config.seed)
        folder = config.output / "evaluation" / name / questions_of

        async def work() -> list[collect.Context]:
            engine = await self.player.engine(self.model)
            searcher = Searcher(ExSearchGrammar(config.search), engine, self.player.search, tokenizer, sampling)
            parameters = {
                "model": model_identity(self.model),
                "search": config.search,
                "sampling": sampling,
                "retriever": await self.player.retriever(),
            }
            limits = RunConfig(config.sampling.in_flight, config.evaluation.max_failures)
            return await collect.collect(questions, searcher, folder, parameters, f"{name} {questions_of}", limits)

        rows = [own_answer(context.trajectory) for context in self.player.run(work())]
        found = figures(rows, _since(began), seed=config.seed)
        write_whole(folder / "answers.json", json.dumps(encode(rows), indent=1) + "\n")
        return found

    def questions(self) -> list[Question]:
        """Return the iteration's training questions.

        Raises:
            ConfigError, DataError: there are none.
        """
        return self._all_questions()[slice(*self._bounds())]

    def files(self) -> EpochFiles:
        """Return where the iteration's files are."""
        left, right = self._bounds()
        assert self.config.train is not None
        folder = self.config.output / f"epo{self.epoch}"
        return EpochFiles(folder, self.epoch, self.config.train.stem, label_of(self.model), left, right)

    def provenance(self) -> Provenance:
        """Return what this iteration's files belong to."""
        tokenizer = tokenizer_identity(tokenizer_of(self.model))
        return Provenance(questions_identity(self.questions()), tokenizer, model_identity(self.model))

    def _bounds(self) -> tuple[int, int]:
        return slice_of(len(self._all_questions()), self.config.sampling.questions, self.epoch)

    def _all_questions(self) -> list[Question]:
        if self.config.train is None:
            raise ConfigError("train is not set; give the parquet of training questions")
        questions = read_questions(self.config.train)
        if not questions:
            raise DataError(f"{self.config.train} holds no question; expected at least one row")
        return ordered(questions, self.config.seed)

    def _sampled_by(self) -> dict[str, Any]:
        config = self.config
        how = config.sampling
        return {
            "search": encode(config.search),
            "samples": how.samples,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": how.top_k,
            "dtype": config.engine.dtype,
            "seed": config.seed,
            "epoch": self.epoch,
        }

    def _inference_config(self) -> Mapping[str, Any]:
        files = self.files()
        found = read_json(files.inference)
        if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
            raise DataError(f"{files.inference}: no config; expected the file that the stage `inference` writes")
        return found["config"]


def warm_up(config: SelfTrainConfig, folder: Path, warmup: Path) -> dict[str, Any]:
    """Fine-tune the first model on the warm-up's trajectories; return the new model and its figures."""
    rows = with_prefix(warmup, config.scoring.answer_prefix, folder / "rows.jsonl")
    settings = {"data.train": rows, "trainer.seed": config.seed}
    return summary_of(run_sft(sft_config(config.sft, config.policy, folder, settings)))


def sft_config(settings: Mapping[str, Any], model: str, folder: Path, own: Mapping[str, Any]) -> SftConfig:
    """Compose a fine-tuning's configuration out of `configs/sft.yaml`, the run's settings and what the stage says."""
    stated = {**own, "model.path": model, "trainer.folder": folder}
    return compose("sft", [*overrides(settings), *overrides(stated)], SftConfig)


def summary_of(summary: SftSummary) -> dict[str, Any]:
    """Return a fine-tuning's outcome as JSON."""
    kept = ("steps", "tokens", "seconds", "loss", "examples", "cut", "skipped_updates")
    figures_of = {name: getattr(summary, name) for name in kept}
    return {"model": str(summary.model), "dropped": dict(summary.dropped), **figures_of}


def label_of(model: str) -> str:
    """Return a short name of a model for file names: the folder that a run calls it by."""
    parts = [part for part in Path(model).parts if part not in _PLACES]
    return parts[-1] if parts else "model"


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 3)
