import pytest

from verl.errors import ConfigError
from verl.single_controller.placement import HardwareConfig, bundles, by_node, check_resources, slots


def test_colocated_workers_share_each_device() -> None:
    config = HardwareConfig("cuda", devices_per_node=2, cpus_per_worker=3)
    assert bundles(config) == [{"CPU": 6, "GPU": 1.0}] * 2
    for role in ("train", "rollout"):
        assert [(slot.bundle, slot.cpus, slot.gpus) for slot in slots(config, role)] == [(0, 3, 0.5), (1, 3, 0.5)]
    assert config.cpus == 12


def test_disaggregated_workers_have_devices_of_their_own() -> None:
    config = HardwareConfig(
        "cuda", nodes=2, devices_per_node=4, colocate=False, rollout_devices=4, devices_per_engine=2
    )
    assert bundles(config) == [{"CPU": 1.0, "GPU": 1.0}] * 8
    assert [(slot.bundle, slot.gpus) for slot in slots(config, "train")] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    engines = slots(config, "rollout")
    assert [(slot.bundle, slot.gpus) for slot in engines] == [(4, 0.0), (6, 0.0)]
    assert engines[1].environment == {"VLLM_RAY_BUNDLE_INDICES": "6,7", "VLLM_RAY_PER_WORKER_GPUS": "1.0"}


def test_an_engine_stays_on_one_node_however_ray_spread_the_bundles() -> None:
    config = HardwareConfig("cuda", nodes=2, devices_per_node=2, devices_per_engine=2)
    order = by_node({0: "b", 1: "a", 2: "b", 3: "a"})
    assert order == [0, 2, 1, 3]
    engines = slots(config, "rollout", order)
    assert [slot.bundle for slot in engines] == [0, 1]
    assert [slot.environment["VLLM_RAY_BUNDLE_INDICES"] for slot in engines] == ["0,2", "1,3"]
    assert [slot.bundle for slot in slots(config, "train", order)] == order
    assert by_node({0: "a", 1: "a", 2: "b"}) == [0, 1, 2]


def test_cpu_workers_reserve_no_gpu() -> None:
    config = HardwareConfig(devices_per_node=2)
    assert bundles(config) == [{"CPU": 2.0}] * 2
    assert [slot.gpus for slot in slots(config, "rollout")] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"devices_per_node": 0}, "devices_per_node=0"),
        ({"rollout_devices": 1}, "colocate=true"),
        ({"colocate": False, "devices_per_node": 2}, "rollout_devices=0 of 2"),
        ({"colocate": False, "devices_per_node": 2, "rollout_devices": 2}, "choose 1 to 1"),
        ({"devices_per_node": 3, "devices_per_engine": 2}, "does not divide"),
        ({"cpus_per_worker": -1.0}, "cpus_per_worker"),
    ],
)
def test_contradictions_are_refused(changes: dict, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        HardwareConfig(**changes)


def test_more_than_there_is_is_refused_with_the_fix() -> None:
    config = HardwareConfig("cuda", devices_per_node=8)
    with pytest.raises(ConfigError, match=r"asks for 8 GPUs, but there are 4; lower hardware.devices_per_node"):
        check_resources(config, {"CPU": 64, "GPU": 4})
    with pytest.raises(ConfigError, match="asks for 16 CPUs, but there are 4"):
        check_resources(config, {"CPU": 4, "GPU": 8})
    check_resources(config, {"CPU": 16, "GPU": 8})
