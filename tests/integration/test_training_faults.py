"""What goes wrong in long trainings, done to real ones: services and workers die, updates break, settings are wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray as ray_module
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.integration.training_world import (
    ROOT,
    SEARCHER,
    TRAJECTORIES,
    TrainingWorld,
    environment,
    history,
    outage,
    wait_for,
    workers,
)
from verl.records import read_questions, write_questions
from verl.trainer import main_ppo
from verl.trainer.checkpoint import CheckpointConfig, Checkpoints
from verl.trajectories import iter_trajectories

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

Training = Callable[[], int]
"""Waits for the end of a training and returns its exit code."""


@contextmanager
def training(world: TrainingWorld, folder: Path, *more: str) -> Iterator[Training]:
    """Train beside the block, in this process and its Ray."""
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(main_ppo.main, world.overrides(folder, *more))
        yield lambda: running.result(300)


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", CheckpointConfig())


def rolled_out(folder: Path, step: int) -> bool:
    """Whether the rollout of `step` is done, and the next service that dies is missed by a later one."""
    return (folder / "trajectories" / f"step_{step:06d}.jsonl").exists()


def saved(folder: Path, step: int) -> bool:
    """Whether the checkpoint of `step` is there."""
    return (folder / "checkpoints" / f"step_{step:06d}").exists()


def assert_none_lost(folder: Path, steps: int) -> None:
    """Every trajectory of every step was searched and scored as if nothing had happened."""
    rows = history(folder)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["env/failed"] for row in rows] == [0.0] * steps
    assert [row["env/trajectories"] for row in rows] == [float(TRAJECTORIES)] * steps
    for step in range(1, steps + 1):
        for trajectory, outcome in iter_trajectories(folder / "trajectories" / f"step_{step:06d}.jsonl"):
            assert outcome is not None and not outcome.failed
            assert outcome.answer
            assert all(turn.result and turn.result.documents for turn in trajectory.turns if turn.query)


class TestRefused:
    """An invalid configuration ends with 2 and the fix, before a process starts or a checkpoint is touched."""

    @pytest.fixture(autouse=True)
    def nothing_runs(self) -> Iterator[None]:
        assert not ray_module.is_initialized()
        yield
        assert not ray_module.is_initialized()

    @pytest.mark.parametrize(
        ("overrides", "came", "fix"),
        [
            (["actor.update.mini_batch_size=5"], "does not divide the 16 trajectories", "choose a divisor"),
            (["data.batch_size=25"], "leaves 24 training questions", "lower it"),
            (["engine.max_model_len=4096"], "exceeds the 2048 positions", "take a model with a longer context"),
            (["search.max_prompt_tokens=1000"], "max_prompt_tokens=1000", "raise the one or lower the other"),
            (["hardware.device=cuda", "hardware.devices_per_node=512"], "512 GPUs, but this machine has", "lower it"),
            (["rollout.sample=4"], "rollout.sample", "rollout.samples"),
        ],
    )
    def test_settings(
        self,
        prepared: TrainingWorld,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        overrides: list[str],
        came: str,
        fix: str,
    ) -> None:
        assert main_ppo.main(prepared.overrides(tmp_path, *overrides)) == 2
        message = capsys.readouterr().err
        assert came in message
        assert fix in message
        assert not (tmp_path / "checkpoints").exists()

    def test_a_missing_baseline_column(
        self, prepared: TrainingWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bare = [replace(question, baseline=None) for question in read_questions(prepared.files.questions("train"))]
        write_questions(tmp_path / "bare.parquet", bare, "train")
        assert main_ppo.main(prepared.overrides(tmp_path, f"data.train={tmp_path / 'bare.parquet'}")) == 2
        message = capsys.readouterr().err
        assert "24 of 32 questions have no naive-RAG baseline" in message
        assert "precompute" in message


@pytest.mark.usefixtures("ray")
class TestServices:
    """A retriever or generator that dies is waited for; the run stops with the cause when it does not come back."""

    def test_both_killed_and_restarted(self, world: TrainingWorld, tmp_path: Path) -> None:
        with training(world, tmp_path, "trainer.total_steps=3") as ended:
            wait_for(lambda: rolled_out(tmp_path, 1))
            outage(world.retriever)
            wait_for(lambda: rolled_out(tmp_path, 2))
            outage(world.generator)
            assert ended() == 0
        assert_none_lost(tmp_path, 3)

    def test_neither_comes_back(self, world: TrainingWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        impatient = ["trainer.total_steps=4", "retriever.retry_window_s=0.5", "generator.retry_window_s=0.5"]
        with training(world, tmp_path, *impatient) as ended:
            wait_for(lambda: rolled_out(tmp_path, 1))
            world.retriever.stop()
            assert ended() == 1
        message = capsys.readouterr().err
        assert f"retriever {world.retriever.url}/retrieve gave no answer: ConnectError" in message
        assert "trainer.resume=auto" in message
        stopped_at = self.assert_whole(tmp_path)

        world.mend()
        with training(world, tmp_path, *impatient) as ended:
            wait_for(lambda: saved(tmp_path, stopped_at + 1))
            world.generator.stop()
            assert ended() == 1
        message = capsys.readouterr().err
        assert f"generator at {world.generator.url}/v1 failed" in message
        assert "Connect" in message
        # The second run went on from the first one's checkpoint, through the step in which that had stopped.
        assert self.assert_whole(tmp_path) > stopped_at

    def assert_whole(self, folder: Path) -> int:
        """The last checkpoint is that of the last logged step, and its export loads; return the step."""
        latest = checkpoints(folder).latest()
        assert latest is not None
        assert latest.step == history(folder)[-1]["step"]
        AutoModelForCausalLM.from_pretrained(latest.export)
        return latest.step


class TestUpdates:
    """An update whose loss is not finite changes nothing and is counted; too many in a row stop the run."""

    @pytest.fixture
    def poisoned(self, tmp_path: Path) -> Path:
        """A reference policy with one infinite weight, whose log-probabilities are not numbers."""
        folder = tmp_path / "poisoned"
        shutil.copytree(SEARCHER, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.inf
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    def test_broken_updates(
        self, ray: None, world: TrainingWorld, tmp_path: Path, poisoned: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = [f"reference.model.path={poisoned}", "trainer.sentinel.max_skipped_updates=1"]
        with training(world, tmp_path, "trainer.total_steps=3", *settings) as ended:
            assert ended() == 1
        assert "2 updates of the actor in a row had a NaN or infinite loss or gradient" in capsys.readouterr().err
        (row,) = history(tmp_path)
        assert (row["actor/updates"], row["actor/skipped_updates"]) == (0.0, 1.0)
        latest = checkpoints(tmp_path).latest()
        assert latest is not None and latest.step == 1
        before = AutoModelForCausalLM.from_pretrained(SEARCHER).state_dict()
        after = AutoModelForCausalLM.from_pretrained(latest.export).state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)


class TestProcesses:
    """A worker that dies is replaced; a run that dies while it writes a checkpoint goes on from the one before."""

    @pytest.mark.parametrize("kind", ["_Host", pytest.param("_AsyncHost", marks=pytest.mark.slow)])
    def test_a_killed_worker(self, world: TrainingWorld, tmp_path: Path, kind: str) -> None:
        """`_Host` is the process of the training worker, `_AsyncHost` that of the rollout worker."""
        log = tmp_path / "log"
        with log.open("wb") as stream, self.started(world, tmp_path, stream, "trainer.max_restarts=1") as run:
            wait_for(lambda: saved(tmp_path, 1))
            (pid,) = workers(kind, run.pid)
            os.kill(pid, signal.SIGKILL)
            assert run.wait(300) == 0
        assert "restart 1 of 1" in log.read_text()
        assert_none_lost(tmp_path, 3)
        latest = checkpoints(tmp_path).latest()
        assert latest is not None and latest.step == 3

    def test_kill_9_while_a_checkpoint_is_written(self, ray: None, world: TrainingWorld, tmp_path: Path) -> None:
        partial = tmp_path / "checkpoints" / ".step_000002.partial"
        with (tmp_path / "log").open("wb") as stream, self.started(world, tmp_path, stream) as run:
            wait_for(partial.exists, every=0.005)
            orphans = [*workers("_Host", run.pid), *workers("_AsyncHost", run.pid)]
            run.kill()
        assert partial.exists()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), 60)
        latest = checkpoints(tmp_path).latest()
        assert latest is not None and latest.step == 1
        assert main_ppo.main(world.overrides(tmp_path, "trainer.total_steps=3")) == 0
        assert_none_lost(tmp_path, 3)

    @contextmanager
    def started(self, world: TrainingWorld, folder: Path, log: object, *more: str) -> Iterator[subprocess.Popen[bytes]]:
        """Train for three steps in a process of its own."""
        command = world.command(folder, "trainer.total_steps=3", *more)
        with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log) as run:  # type: ignore
            try:
                yield run
            finally:
                run.kill()
