"""The outer loop: warm-up, then E-step, M-step and evaluation in turns, until the dev questions gain nothing more.

Every stage is kept and reused by the next run of the same command; one that was cut off goes on where it stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl.evaluation.identity import model_identity
from verl.trainer.exsearch.config import SelfTrainConfig
from verl.trainer.exsearch.policy import Player
from verl.trainer.exsearch.report import write_self_train_report
from verl.trainer.exsearch.stages import Stage, warm_up
from verl.trainer.exsearch.task import Task, prepared
from verl.trainer.stages import Done, Stages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """A model on its way through the run.

    Attributes:
        epoch: 0 is what self-training begins with.
        name: of its row in the report.
        done: the stage that made it; its fingerprint identifies the model.
    """

    epoch: int
    name: str
    model: str
    done: Done


@dataclass(frozen=True)
class Iteration:
    """What became of one policy.

    Attributes:
        dev, test: figures; test None without such questions.
        estep: counts and figures of the E-step and M-step that made it; empty for the first.
    """

    policy: Policy
    dev: dict[str, Any]
    test: dict[str, Any] | None
    estep: dict[str, Any] = field(default_factory=dict)


def self_train(config: SelfTrainConfig) -> dict[str, Any]:
    """Run everything and write the report; return it.

    Raises:
        ConfigError, DataError: an input is missing or wrong.
        SamplingFailed, Unfinished: a service failed; the same command goes on.
    """
    started, stages = time.perf_counter(), Stages(config.output)
    with (
        prepared(config, stages) as task,
        Player(task.config.engine, task.config.retriever, task.config.keep_engine) as player,
    ):
        run = _Run(task, stages, player)
        iterations = run.go()
        extra = {
            "stages": stages.seconds,
            "reused": [done.name for done in stages.done if done.reused],
            "wall_clock": round(time.perf_counter() - started, 1),
            "stopped_early": run.stopped_early,
            "engine": config.engine.kind,
        }
        return write_self_train_report(task.config, iterations, best_of(iterations, config), extra)


def best_of(iterations: Sequence[Iteration], config: SelfTrainConfig) -> Iteration:
    """Return the iteration with the best dev figure, the earliest of equal ones."""
    return max(iterations, key=lambda one: (one.dev[config.evaluation.metric], -one.policy.epoch))


def out_of_patience(values: Sequence[float], patience: int) -> bool:
    """Say whether the last `patience` values brought no new best; never with 0."""
    if not patience or len(values) <= patience:
        return False
    return max(values[-patience:]) <= max(values[:-patience])


class _Run:
    """The loop over one task."""

    def __init__(self, task: Task, stages: Stages, player: Player) -> None:
        self.config, self._task = task.config, task
        self._stages, self._player = stages, player
        self.stopped_early = False
        planned = 3 + 6 * self.config.loop.iterations
        self._bar = tqdm(total=planned, desc="self-training", unit="stage")

    def go(self) -> list[Iteration]:
        """Return the iterations, the first policy among them."""
        with self._bar:
            base = self._first()
            found = [self._judged(base, {})]
            for epoch in range(1, self.config.loop.iterations + 1):
                if out_of_patience(
                    [one.dev[self.config.evaluation.metric] for one in found], self.config.loop.patience
                ):
                    self.stopped_early = True
                    logger.info("stopped before iteration %d: no gain in %d", epoch, self.config.loop.patience)
                    break
                policy, estep = self._improved(found[-1].policy, base, epoch)
                found.append(self._judged(policy, estep))
            return found

    def _first(self) -> Policy:
        """Warm up, if there is something to warm up with."""
        config, warmup = self.config, self._task.config.warmup
        identity = model_identity(config.policy)
        if warmup is None:
            done = Done("base", identity, 0.0, {"model": config.policy})
            return Policy(0, "base", config.policy, done)
        folder = config.output / "sft"
        inputs = [self._task.inputs, identity, config.sft, config.scoring.answer_prefix, config.seed]
        done = self._stage("sft", inputs, [folder / "model"], lambda: warm_up(config, folder, warmup))
        return Policy(0, "warm_up", done.value["model"], done)

    def _improved(self, parent: Policy, base: Policy, epoch: int) -> tuple[Policy, dict[str, Any]]:
        """E-step on the parent and M-step; return the new policy and what there is to know of both."""
        config = self.config
        stage = Stage(config, self._player, epoch, parent.model)
        files = stage.files()
        lasting = replace(config.sampling, in_flight=1, max_failures=1)
        inputs = [parent.done.fingerprint, self._task.inputs, config.search, lasting, config.seed, epoch]
        kept = [files.journal, files.trajectories, files.inference]
        sampled = self._stage(f"inference_{epoch}", inputs, kept, stage.inference)
        scored = self._stage(f"entropy_{epoch}", [sampled.fingerprint, config.scoring], [files.entropy], stage.entropy)
        weighed = self._stage(
            f"format_{epoch}",
            [scored.fingerprint, config.weights],
            [files.rows, files.folder / "format.json"],
            stage.format,
        )
        start = base if config.loop.start_from == "base" else parent
        learned = self._stage(
            f"align_{epoch}",
            [weighed.fingerprint, start.done.fingerprint, config.align],
            [files.align / "model"],
            lambda: stage.align(start.model),
        )
        policy = Policy(epoch, f"iteration_{epoch}", learned.value["model"], learned)
        made = {"inference": sampled, "entropy": scored, "format": weighed, "align": learned}
        return policy, {name: done.value for name, done in made.items()}

    def _judged(self, policy: Policy, estep: dict[str, Any]) -> Iteration:
        config = self.config
        stage = Stage(config, self._player, max(policy.epoch, 1), policy.model)
        sets: dict[str, Path | None] = {"dev": config.dev, "test": config.test}
        found: dict[str, dict[str, Any] | None] = {"dev": None, "test": None}
        for name, path in sets.items():
            if path is not None:
                inputs = [policy.done.fingerprint, self._task.inputs, config.search, config.evaluation, config.seed]
                folder = config.output / "evaluation" / policy.name / name
                found[name] = self._stage(
                    f"{name}_{policy.epoch}",
                    inputs,
                    [folder],
                    lambda name=name, path=path: stage.evaluate(policy.name, path, name),
                ).value
        dev = found["dev"]
        assert dev is not None  # checked when the task was prepared
        metric = config.evaluation.metric
        self._bar.set_postfix_str(f"{policy.name}: dev {metric} {100 * dev[metric]:.1f}")
        logger.info("%s", headline(policy.name, dev, found["test"]))
        return Iteration(policy, dev, found["test"], estep)

    def _stage(self, name: str, inputs: Any, outputs: Sequence[Path], body: Callable[[], Any]) -> Done:
        self._bar.set_description(f"self-training: {name}")
        done = self._stages.run(name, inputs, outputs, body)
        self._bar.update()
        return done


def headline(name: str, dev: dict[str, Any], test: dict[str, Any] | None) -> str:
    """Return an iteration's figures in one line."""

    def one(label: str, found: dict[str, Any]) -> str:
        shown = f"{label} EM {100 * found['em']:.1f} F1 {100 * found['f1']:.1f} searches {found['searches']:.2f}"
        if found.get("under_search") is None:
            return shown
        return f"{shown} under {100 * found['under_search']:.1f} over {100 * found['over_search']:.1f}"

    return f"{name}: " + "; ".join(one(label, found) for label, found in (("dev", dev), ("test", test)) if found)
