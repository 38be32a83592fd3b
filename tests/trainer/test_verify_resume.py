"""The comparison of two runs finds what differs, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from verl.trainer import verify_resume
from verl.trainer.verify_resume import Plan, compare

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def learned(folder: Path, **changed: torch.Tensor) -> None:
    tensors = {"actor.model.head": torch.arange(6.0), "actor.shuffler": torch.arange(9, dtype=torch.uint8)}
    dcp.save(tensors | changed, checkpoint_id=folder, no_dist=True)


def run(plan: Plan, name: str, rows: list[dict], driver: dict, **changed: torch.Tensor) -> None:
    """Write the remains of a run of two steps."""
    folder = plan.checkpoint(name, 2)
    learned(folder / "learners", **changed)
    (folder / "driver.json").write_text(json.dumps(driver))
    (plan.folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


ROWS = [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 0.25, "critic/kl": None, "timing_s/step": 1.0}]
DRIVER = {"step": 2, "source": {"position": 8}, "totals": {"trajectories": 32, "seconds": 4.5}}


def test_only_the_clock_may_differ(tmp_path: Path) -> None:
    plan = Plan((), tmp_path, before=1, after=1)
    run(plan, "unbroken", ROWS, DRIVER)
    later = DRIVER | {"totals": {"trajectories": 32, "seconds": 9.0}}
    run(plan, "resumed", [ROWS[0], ROWS[1] | {"timing_s/step": 7.0}], later)
    assert compare(plan) == []


def test_each_difference_is_named(tmp_path: Path) -> None:
    plan = Plan((), tmp_path, before=1, after=1)
    run(plan, "unbroken", ROWS, DRIVER)
    one_ulp = torch.arange(6.0)
    one_ulp[3] = torch.nextafter(one_ulp[3], torch.tensor(9.0))
    other = DRIVER | {"source": {"position": 4}}
    rows = [ROWS[0], ROWS[1] | {"reward/mean": 0.75}]
    run(plan, "resumed", rows, other, **{"actor.model.head": one_ulp, "critic.model.head": torch.zeros(1)})
    assert compare(plan) == [
        "actor.model.head differs",
        "critic.model.head is in the resumed run only",
        "the driver's source is {'position': 8} against {'position': 4}",
        "step 2: reward/mean is 0.25 against 0.75",
    ]


def test_a_missing_row_is_named(tmp_path: Path) -> None:
    plan = Plan((), tmp_path, before=1, after=1)
    run(plan, "unbroken", ROWS, DRIVER)
    run(plan, "resumed", ROWS[1:], DRIVER)
    assert "2 rows of metrics against 1" in compare(plan)


def test_a_plan_needs_steps_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="before=0"):
        Plan((), tmp_path, before=0)


def test_a_wrong_override_is_told_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_resume.main([f"trainer.folder={tmp_path / 'run'}", "rollout.sample=2"]) == 2
    assert "rollout.samples" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
