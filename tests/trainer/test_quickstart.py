"""The quickstart's configuration; the run itself is in tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl.config import compose
from verl.errors import ConfigError
from verl.trainer.quickstart import Layout, QuickstartConfig, main, overrides, training_config


def composed(tmp_path: Path, *words: str) -> QuickstartConfig:
    for name in ("generator", "searcher"):
        (tmp_path / name).mkdir(exist_ok=True)
    models = [f"generator_model={tmp_path / 'generator'}", f"train.model.path={tmp_path / 'searcher'}"]
    return compose("quickstart", [f"output={tmp_path / 'out put'}", *models, *words], QuickstartConfig)


def test_nested_settings_become_overrides() -> None:
    tree = {
        "recipe": "quickstart",
        "actor": {"optim": {"lr": 1e-4}},
        "engine": {"kind": "h f"},
        "x": [1, "a"],
        "y": None,
    }
    assert overrides(tree) == [
        'recipe="quickstart"',
        "actor.optim.lr=0.0001",
        'engine.kind="h f"',
        'x=[1, "a"]',
        "y=null",
    ]
    assert overrides({}) == []


def test_the_training_recipe_gets_this_runs_files_and_seed(tmp_path: Path) -> None:
    config = composed(tmp_path, "seed=3", "train.engine.kind=hf", "train.algorithm=rloo")
    recipe = training_config(config)
    files = Layout(tmp_path / "out put")
    assert config.world.seed == recipe.trainer.seed == recipe.data.seed == 3
    assert (recipe.data.train, recipe.data.validation) == (files.questions("train"), files.questions("validation"))
    assert recipe.trainer.folder == files.training
    assert recipe.engine.model == recipe.actor.model.path == str(tmp_path / "searcher")
    assert (recipe.engine.kind, recipe.algorithm.estimator) == ("hf", "rloo")


def test_the_recipe_fits_the_world(tmp_path: Path) -> None:
    config = composed(tmp_path)
    recipe = training_config(config)
    assert recipe.search.prompt == "compact"
    assert recipe.search.max_context_tokens <= recipe.engine.max_model_len
    assert config.documents.initial_k == config.documents.baseline_k == recipe.search.topk == 3
    assert config.world.test == 400


@pytest.mark.parametrize("key", ["generator_model", "train.model.path"])
def test_a_missing_checkpoint_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=r"=/no/such/model: no such folder; train the tiny models"):
        training_config(composed(tmp_path, f"{key}=/no/such/model"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("world.tset=3", "did you mean 'world.test'"),
        ("train.engine.knid=hf", "did you mean 'engine.kind'"),
        ("train.recipe=quickstrat", "did you mean 'quickstart'"),
        ("documents.baseline_k=20", "baseline_k=20; expected 0 to retrieve_k=12"),
        ("train.actor.update.mini_batch_size=50", "does not divide the 128 trajectories of a step"),
    ],
)
def test_a_wrong_key_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, message: str) -> None:
    assert main([f"output={tmp_path}", word]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
