"""The two services of the quickstart, started when a stage first needs them and stopped whatever happens."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from generator_llms.config import GeneratorConfig
from verl.evaluation.identity import model_identity
from verl.retrieval.client import RetrieverClientConfig
from verl.services import Service, free_ports, generator_service, retriever_service, running
from verl.trainer.config import TrainConfig
from verl.trainer.stages import Stages

_SERVED_NAME = "generator"
_GPU_SHARE = 0.2  # the searcher's engine and the actor need the rest


@dataclass(frozen=True)
class Served:
    """What the services are started on.

    Attributes:
        generator: checkpoint of the frozen generator.
        index, corpus: of the retriever.
        folder: gets the services' logs and the cache of replies.
    """

    generator: Path
    index: Path
    corpus: Path
    folder: Path


@dataclass(frozen=True)
class Endpoints:
    """How clients reach the services."""

    retriever: RetrieverClientConfig
    generator: GeneratorConfig


class QuickstartServices:
    """A context manager around services that may never be needed.

    Args:
        recipe: device, and the settings that clients have but for the addresses.
        topk: documents per query when a request does not say.
    """

    def __init__(self, recipe: TrainConfig, served: Served, stages: Stages, topk: int) -> None:
        self._recipe = recipe
        self._served = served
        self._stages = stages
        self._topk = topk
        self._stack = ExitStack()
        self._endpoints: Endpoints | None = None

    def up(self) -> Endpoints:
        """Start both services, unless they run, and wait until they are healthy.

        Raises:
            ServiceError: one did not start; carries the end of its log.
        """
        if self._endpoints is None:
            retriever_port, generator_port = free_ports(2)
            services = self._retriever(retriever_port), self._generator(generator_port)
            with self._stages.aside("services"):
                self._stack.enter_context(running(*services))
            self._endpoints = self._reached(*services)
        return self._endpoints

    def __enter__(self) -> QuickstartServices:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _retriever(self, port: int) -> Service:
        log = self._served.folder / "logs" / "retriever.log"
        return retriever_service(self._served.index, self._served.corpus, "bm25", self._topk, port, log)

    def _generator(self, port: int) -> Service:
        limits = self._recipe.generator
        on_cpu = self._recipe.hardware.device == "cpu"
        service = generator_service(
            str(self._served.generator),
            port,
            self._served.folder / "logs" / "generator.log",
            max_model_len=limits.max_prompt_tokens + limits.max_tokens,
            device="cpu" if on_cpu else "gpu",
            dtype=self._recipe.engine.dtype,
            served_model_name=_SERVED_NAME,
        )
        share = () if on_cpu else ("--gpu-memory-utilization", str(_GPU_SHARE))
        return replace(service, command=(*service.command, *share))

    def _reached(self, retriever: Service, generator: Service) -> Endpoints:
        model = self._served.generator
        return Endpoints(
            replace(self._recipe.retriever, url=f"{retriever.url}/retrieve"),
            replace(
                self._recipe.generator,
                base_url=f"{generator.url}/v1",
                model=_SERVED_NAME,
                model_identity=model_identity(str(model)),
                tokenizer=model,
                cache_path=self._served.folder / "replies.sqlite",
            ),
        )
