"""The run around the step: resume, validate only, restart; the learners are one number, and no process is started."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.fakes import question, sample
from tests.workers.tiny import tiny_model, tiny_tokenizer
from verl.agent.loop import derive_seed
from verl.agent.protocols import Sampling
from verl.batch import Batch, TrainBatch
from verl.config import compose
from verl.errors import CheckpointError, ConfigError, WorkerError
from verl.records import write_questions
from verl.trainer.config import TrainConfig
from verl.trainer.loop import Summary, Workers, train
from verl.trainer.sentinel import RunStopped
from verl.trainer.tracking import read_all
from verl.types import Baseline, Question
from verl.workers.rollout import Sample

AsMade = Callable[..., TrainConfig]


class Number:
    """A policy that is one number, moved by the advantages it is shown; it counts its updates like an optimizer."""

    def __init__(self) -> None:
        self.weight = 0.25
        self.updates = 0

    def actor_log_probs(self, batch: Batch) -> Tensor:
        """Depend on the weight."""
        return torch.where(batch.action_mask, -self.weight, 0.0)

    def ref_log_probs(self, batch: Batch) -> Tensor:
        """Where the weight began."""
        return torch.where(batch.action_mask, -0.25, 0.0)

    def values(self, batch: Batch) -> Tensor:
        """Depend on the weight."""
        return torch.where(batch.action_mask, self.weight, 0.0)

    def update_actor(self, batch: TrainBatch) -> Mapping[str, float]:
        """Move."""
        assert batch.advantages is not None
        self.updates += 1
        self.weight += 0.01 * self.updates * float(batch.advantages[0].sum())
        return {"actor/updates": 1.0, "actor/skipped_updates": 0.0, "actor/weight": self.weight}

    def update_critic(self, batch: TrainBatch) -> Mapping[str, float]:
        """Learn nothing."""
        return {"critic/updates": 1.0, "critic/skipped_updates": 0.0}

    def save(self, folder: Path) -> None:
        """Write everything."""
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps([self.weight, self.updates]))

    def load(self, folder: Path) -> None:
        """Read everything."""
        self.weight, self.updates = json.loads((folder / "state.json").read_text())

    def export(self, folder: Path) -> None:
        """Write the weight."""
        folder.mkdir()
        (folder / "weight").write_text(str(self.weight))


class Players:
    """Scores depend on the seed and the weights that were published last."""

    def __init__(self, policy: Number, dies_at: int = 0) -> None:
        self.policy, self.version, self.dies_at = policy, -1, dies_at
        self.weight = float("nan")

    def publish(self, version: int) -> None:
        """Take the weights, or die."""
        if self.dies_at and version == self.dies_at:
            raise WorkerError("worker 0 died during 'publish'")
        self.version, self.weight = version, self.policy.weight

    def collect(
        self, questions: Sequence[Question], samples: int, sampling: Sampling, progress: object = None
    ) -> list[list[Sample]]:
        """Play."""
        return [
            [self._one(asked, derive_seed(sampling.seed, index * samples + k)) for k in range(samples)]
            for index, asked in enumerate(questions)
        ]

    def _one(self, asked: Question, seed: int | None) -> Sample:
        return sample(float((seed or 0) % 5) + self.weight, asked)


class Office:
    """Hires workers, and remembers how often; `deaths[n]` is the version at which the n-th ones die."""

    def __init__(self, *deaths: int) -> None:
        self.deaths = deaths
        self.hired: list[Number] = []
        self.left = 0

    @contextmanager
    def __call__(self, config: TrainConfig) -> Iterator[tuple[Number, Players]]:
        """Serve as `Workers`."""
        policy = Number()
        dies_at = self.deaths[len(self.hired)] if len(self.hired) < len(self.deaths) else 0
        self.hired.append(policy)
        try:
            yield policy, Players(policy, dies_at)
        finally:
            self.left += 1


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> AsMade:
    """Return a function that composes a run's configuration over seven questions, four of them a step."""
    shared = tmp_path_factory.mktemp("shared")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).config.save_pretrained(shared / "model")
    tokenizer.save_pretrained(shared / "model")
    for split, count in (("train", 7), ("validation", 3), ("other", 7)):
        asked = [replace(question(f"{split}{n}"), baseline=Baseline((), "?", False)) for n in range(count)]
        write_questions(shared / f"{split}.parquet", asked, split)

    def made(folder: Path, *overrides: str) -> TrainConfig:
        own = [
            "recipe=quickstart_ppo",
            "engine.kind=hf",
            f"model.path={shared / 'model'}",
            f"data.train={shared / 'train.parquet'}",
            f"data.validation={shared / 'validation.parquet'}",
            "data.batch_size=4",
            "trainer.total_steps=5",
            "trainer.test_freq=2",
            "trainer.checkpoint.save_freq=2",
            "trainer.checkpoint.keep=10",
            "algorithm.kl_target=0.1",
            "algorithm.kl_horizon=100",
            f"trainer.folder={folder}",
        ]
        return compose("train", [*own, *overrides], TrainConfig)

    return made


def run(config: TrainConfig, office: Office | None = None) -> tuple[Summary, Office]:
    office = office or Office()
    workers: Workers = office
    return train(config, workers), office


def figures(folder: Path) -> list[dict[str, float]]:
    """The metrics, without what the clock says."""
    timed = ("timing_", "rollout/tokens_per_second", "rollout/seconds", "val/seconds")
    return [
        {key: value for key, value in row.items() if not key.startswith(timed)}
        for row in read_all(folder / "metrics.jsonl")
    ]


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def test_a_run_trains_validates_saves_and_sums_up(make: AsMade, tmp_path: Path) -> None:
    summary, office = run(make(tmp_path))
    assert (summary.algorithm, summary.steps, summary.questions, summary.trajectories) == ("gae", 5, 20, 40)
    assert summary.seconds == pytest.approx(
        sum(row.get("timing_s/step", 0) for row in read_all(tmp_path / "metrics.jsonl"))
    )
    rows = figures(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "val/accuracy" in row] == [0, 2, 4, 5], "before, every second, and the last"
    assert steps(tmp_path / "checkpoints") == [2, 4, 5]
    assert len(list((tmp_path / "trajectories").iterdir())) == 5
    assert office.left == 1


def test_epochs_end_a_run_by_its_number_of_questions(make: AsMade, tmp_path: Path) -> None:
    epochs = ["trainer.epochs=3", "trainer.total_steps=null", "trainer.checkpoint.keep_steps=[1]"]
    summary, _ = run(make(tmp_path / "epochs", *epochs))
    assert summary.steps == 5, "3 x 7 questions are 5 whole steps of 4"
    assert steps(tmp_path / "epochs" / "checkpoints") == [1, 2, 4, 5]
    assert run(make(tmp_path / "steps", "trainer.epochs=9", "trainer.total_steps=2"))[0].steps == 2, "the first bound"
    config = make(tmp_path / "none", *epochs, "critic.optim.total_steps=99")
    counted = config.over(7)
    assert counted.trainer.total_steps == counted.actor.optim.total_steps == 5
    assert counted.critic.optim.total_steps == 99
    assert config.over(1).trainer.last_step == 1
    with pytest.raises(ValueError, match=r"TrainConfig.over"):
        _ = config.trainer.last_step


def test_n_plus_m_steps_are_n_steps_and_then_m(make: AsMade, tmp_path: Path) -> None:
    run(make(tmp_path / "unbroken"))
    run(make(tmp_path / "broken", "trainer.total_steps=2", "trainer.val_before_train=true"))
    _, office = run(make(tmp_path / "broken"))
    assert office.hired[0].updates == 5
    unbroken, broken = figures(tmp_path / "unbroken"), figures(tmp_path / "broken")
    assert broken == unbroken
    last = "checkpoints/step_000005/hf/weight"
    assert (tmp_path / "broken" / last).read_text() == (tmp_path / "unbroken" / last).read_text()
    assert len({row.get("critic/kl_coeff") for row in unbroken[1:]}) == 5, "the adaptive coefficient was on the move"


def test_a_run_whose_worker_dies_goes_on_from_the_last_checkpoint(make: AsMade, tmp_path: Path) -> None:
    run(make(tmp_path / "unbroken"))
    summary, office = run(make(tmp_path / "died"), Office(4, 5))
    assert len(office.hired) == office.left == 3
    assert summary.trajectories == 40, "what was lost is not counted twice"
    assert figures(tmp_path / "died") == figures(tmp_path / "unbroken")


def test_a_worker_that_keeps_dying_ends_the_run(make: AsMade, tmp_path: Path) -> None:
    office = Office(1, 1, 1)
    with pytest.raises(WorkerError, match="died"):
        run(make(tmp_path, "trainer.max_restarts=1"), office)
    assert len(office.hired) == office.left == 2


def test_a_restart_before_the_first_checkpoint_goes_back_to_where_the_run_was_told_to_start(
    make: AsMade, tmp_path: Path
) -> None:
    run(make(tmp_path / "first", "trainer.total_steps=2"))
    start = tmp_path / "first" / "checkpoints" / "step_000002"
    config = make(tmp_path / "second", f"trainer.resume={start}", "trainer.total_steps=3")
    _, office = run(config, Office(3))
    assert [policy.updates for policy in office.hired] == [3, 3]


def test_going_back_leaves_the_abandoned_branch_aside(make: AsMade, tmp_path: Path) -> None:
    run(make(tmp_path))
    start = tmp_path / "checkpoints" / "step_000002"
    run(make(tmp_path, f"trainer.resume={start}", "trainer.total_steps=3", "trainer.checkpoint.keep=1"))
    assert 3 in steps(tmp_path / "checkpoints")
    assert steps(tmp_path / "checkpoints.1") == [4, 5]
    assert [row["step"] for row in figures(tmp_path)] == [0, 1, 2, 3]


def test_starting_anew_loses_nothing_of_the_earlier_run(make: AsMade, tmp_path: Path) -> None:
    run(make(tmp_path, "trainer.total_steps=2"))
    before = (tmp_path / "metrics.jsonl").read_text()
    run(make(tmp_path, "trainer.total_steps=1", "trainer.resume=never"))
    assert steps(tmp_path / "checkpoints") == [1]
    assert steps(tmp_path / "checkpoints.1") == [2]
    assert (tmp_path / "metrics.1.jsonl").read_text() == before


def test_a_finished_run_that_is_started_again_has_nothing_to_do(make: AsMade, tmp_path: Path) -> None:
    first, _ = run(make(tmp_path))
    before = figures(tmp_path)
    again, office = run(make(tmp_path))
    assert again == first
    assert office.hired[0].updates == 5
    assert figures(tmp_path) == before


def test_validating_only_changes_nothing_of_the_run(make: AsMade, tmp_path: Path) -> None:
    run(make(tmp_path, "trainer.total_steps=4"))
    (tmp_path / "checkpoints" / "step_000004" / "driver.json").write_text("{")
    before = (tmp_path / "metrics.jsonl").read_text()
    missing = "data.train=nowhere.parquet"
    summary, office = run(make(tmp_path, "trainer.val_only=true", missing))
    assert summary.steps == 2
    assert office.hired[0].updates == 2, "the checkpoint's weights were validated"
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert steps(tmp_path / "checkpoints") == [2, 4]
    (row,) = read_all(tmp_path / "validation" / "metrics.jsonl")
    assert row["step"] == 2 and row["val/n"] == 3
    run(make(tmp_path, "trainer.val_only=true", "trainer.resume=never", missing))
    assert steps(tmp_path / "checkpoints") == [2, 4]
    assert [row["step"] for row in read_all(tmp_path / "validation" / "metrics.jsonl")] == [2, 0]


@pytest.mark.parametrize(
    ("override", "error", "cause"),
    [
        ("data.train={shared}/other.parquet", ConfigError, "in another order or selection"),
        ("data.seed=9", ConfigError, "in another order or selection"),
        ("trainer.resume=nowhere", CheckpointError, "nowhere is no complete checkpoint"),
        ("data.batch_size=8", ConfigError, "fewer than data.batch_size=8"),
        ("actor.update.mini_batch_size=3", ConfigError, "choose a divisor"),
    ],
)
def test_what_cannot_be_continued_fails_before_any_worker_is_started(
    make: AsMade, tmp_path: Path, override: str, error: type[Exception], cause: str
) -> None:
    config = make(tmp_path, "trainer.total_steps=2")
    run(config)
    office = Office()
    with pytest.raises(error, match=cause):
        run(make(tmp_path, override.format(shared=config.data.train.parent)), office)
    assert office.hired == []
    assert steps(tmp_path / "checkpoints") == [2]


def test_a_stopped_run_releases_its_workers_and_keeps_its_checkpoint(make: AsMade, tmp_path: Path) -> None:
    class Away(Players):
        """The generator is away from version 2 on."""

        def _one(self, asked: Question, seed: int | None) -> Sample:
            return sample(asked=asked, failed="generator away") if self.version >= 2 else super()._one(asked, seed)

    left: list[bool] = []

    @contextmanager
    def workers(config: TrainConfig) -> Iterator[tuple[Number, Players]]:
        policy = Number()
        try:
            yield policy, Away(policy)
        finally:
            left.append(True)

    with pytest.raises(RunStopped, match="generator away"):
        train(make(tmp_path, "trainer.test_freq=0"), workers)
    assert left == [True]
    assert steps(tmp_path / "checkpoints") == [2]
    assert [row["step"] for row in figures(tmp_path)] == [0, 1, 2]
