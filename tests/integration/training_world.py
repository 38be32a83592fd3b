"""A world small enough to train on within seconds, its two services, and ways to run and to break a training."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_preprocess.rag_cache import BaselineConfig
from data_preprocess.world.build import WorldConfig
from generator_llms.config import GeneratorConfig
from tests.integration.generator_server import MODEL
from verl.retrieval.client import RetrieverClientConfig
from verl.services import HOST, Service, free_ports, retriever_service, running
from verl.trainer import quickstart
from verl.trainer.quickstart import Layout
from verl.trainer.quickstart_services import Endpoints

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "data_preprocess" / "world" / "checkpoints"
SEARCHER = CHECKPOINTS / "searcher"
VALIDATION = 8
QUESTIONS = 4
SAMPLES = 4
TRAJECTORIES = QUESTIONS * SAMPLES
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class TrainingWorld:
    """Prepared questions, and the services that a training on them needs."""

    files: Layout
    retriever: Service
    generator: Service

    def overrides(self, folder: Path, *more: str) -> list[str]:
        """Return the quickstart's training, made as small as `sizes`; `more` wins."""
        return ["recipe=quickstart", *self.sizes(folder), *more]

    def sizes(self, folder: Path) -> list[str]:
        """Return what makes any recipe for the embedded world a training of a few seconds into `folder`."""
        return [
            f"data.train={self.files.questions('train')}",
            f"data.validation={self.files.questions('validation')}",
            "data.drop_rag_correct=false",
            f"data.batch_size={QUESTIONS}",
            f"model.path={SEARCHER}",
            f"rollout.samples={SAMPLES}",
            "engine.kind=hf",
            "hardware.threads_per_worker=1",
            "ray.object_store_gib=0.2",
            f"retriever.url={self.retriever.url}/retrieve",
            f"generator.base_url={self.generator.url}/v1",
            f"generator.model={MODEL}",
            f"generator.tokenizer={CHECKPOINTS / 'generator'}",
            f"trainer.folder={folder}",
            "trainer.total_steps=2",
            "trainer.val_before_train=false",
            "trainer.test_freq=0",
            "trainer.checkpoint.save_freq=1",
        ]

    def command(self, folder: Path, *more: str) -> list[str]:
        """Return the same as a command line."""
        return [sys.executable, "-m", "verl.trainer.main_ppo", *self.overrides(folder, *more)]

    def mend(self) -> None:
        """Start again what a test has left stopped."""
        stopped = [service for service in (self.retriever, self.generator) if not service.alive]
        for service in stopped:
            service.stop()
            service.start()
        for service in stopped:
            service.wait_ready()


@contextmanager
def training_world(folder: Path) -> Iterator[TrainingWorld]:
    """Build the world and its index, start the services, and answer the questions by naive RAG."""
    files = Layout(folder)
    quickstart.build_world(WorldConfig(train=24, validation=VALIDATION, test=1), files)
    quickstart.build_bm25(files)
    retriever_port, generator_port = free_ports(2)
    log = folder / "logs" / "retriever.log"
    retriever = retriever_service(files.index, files.world.corpus, "bm25", topk=3, port=retriever_port, log_path=log)
    # Without a grace, stopping a service is killing it.
    world = TrainingWorld(files, replace(retriever, grace=0.0), _generator_service(folder, generator_port))
    with running(world.retriever, world.generator):
        quickstart.precompute(files, BaselineConfig(), _endpoints(world))
        yield world


def _generator_service(folder: Path, port: int) -> Service:
    command = [sys.executable, "-m", "tests.integration.generator_server"]
    return Service(
        name="generator",
        command=[*command, "--model", str(CHECKPOINTS / "generator"), "--port", str(port)],
        health_url=f"http://{HOST}:{port}/health",
        log_path=folder / "logs" / "generator.log",
        env={**OFFLINE, "PYTHONPATH": str(ROOT)},
        grace=0.0,
    )


def _endpoints(world: TrainingWorld) -> Endpoints:
    return Endpoints(
        RetrieverClientConfig(f"{world.retriever.url}/retrieve"),
        GeneratorConfig(
            f"{world.generator.url}/v1",
            model=MODEL,
            max_tokens=48,
            max_prompt_tokens=900,
            tokenizer=CHECKPOINTS / "generator",
        ),
    )


def environment() -> dict[str, str]:
    """Return the variables of a training that is run as a process of its own."""
    return {**os.environ, **OFFLINE}


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for(condition: Callable[[], bool], seconds: float = 240.0, every: float = 0.05) -> None:
    """Wait until the condition holds, looking every so many seconds.

    Raises:
        TimeoutError: it does not.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing came of it within {seconds:g} s")
        time.sleep(every)


def outage(service: Service) -> None:
    """Kill the service, let one client find it dead with its request on the way, and start it again."""
    service.stop()
    port = int(service.url.rpartition(":")[2])
    with closing(socket.create_server((HOST, port))) as listener:
        listener.settimeout(120.0)
        connection, _ = listener.accept()
        with closing(connection):
            connection.settimeout(30.0)
            assert connection.recv(1)
    service.start()
    service.wait_ready()


def workers(kind: str, above: int) -> list[int]:
    """Return the process ids of the Ray workers that descend from process `above` and are titled `kind`."""
    return [pid for pid in _descendants(above) if _title(pid).partition(".")[0] == f"ray::{kind}"]


def _descendants(above: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, frontier = [], [above]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, [])]
        found += frontier
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def finished(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever that is."""
    env = environment() | variables
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
