"""What the training tests share: a prepared world with running services, and one Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.training_world import OFFLINE, TrainingWorld, training_world
from verl.single_controller.cluster import RayConfig, cluster
from verl.single_controller.placement import HardwareConfig


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingWorld]:
    with training_world(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
def world(prepared: TrainingWorld) -> TrainingWorld:
    """The world with both services up, whatever the test before did to them."""
    prepared.mend()
    return prepared


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One Ray for the trainings that the tests run in their own process, which saves its start for each."""
    config = RayConfig(object_store_gib=0.2, log_to_driver=False, environment=OFFLINE)
    with cluster(config, HardwareConfig()):
        yield
