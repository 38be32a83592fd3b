"""The whole pipeline on the embedded world, on any machine and offline, ending in one table.

    python -m verl.trainer.quickstart                       # or: bash scripts/quickstart.sh, which installs first
    python -m verl.trainer.quickstart world.test=60 "recipe=[recipe=quickstart,engine.kind=hf]"

Build a world and its index, start retriever and frozen generator, precompute naive RAG, train the searcher, gather
contexts by every method, score them. Each stage is kept and reused by the next run while its inputs stay the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_preprocess import rag_cache
from data_preprocess.rag_cache import BaselineConfig, RagCacheConfig, TrainFilter
from data_preprocess.world import build as world_build
from data_preprocess.world.build import WorldConfig, WorldFiles
from generator_llms.client import GeneratorClient
from verl.agent.protocols import Sampling
from verl.config import compose, run_entry
from verl.errors import ConfigError, SearchAgentError
from verl.evaluation import collect, report
from verl.evaluation.collectors import NaiveRag, Oracle, passages_of
from verl.evaluation.evaluate import score_method
from verl.evaluation.identity import model_identity
from verl.records import read_questions
from verl.retrieval.build import build_index
from verl.retrieval.client import RetrieverClient
from verl.retrieval.corpus import Corpus
from verl.trainer.config import TrainConfig
from verl.trainer.quickstart_services import QuickstartServices
from verl.trainer.stages import Done, Stages

logger = logging.getLogger(__name__)

CHECKPOINTS = Path(world_build.__file__).parent / "checkpoints"
SPLITS = ("train", "validation", "test")
