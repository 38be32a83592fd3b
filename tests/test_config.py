"""Configuration: strict building, Hydra composition, and what a user sees when a key or value is wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.config import build, compose, run_entry, to_dict, to_yaml
from verl.errors import ConfigError, ServiceError
from verl.typed import leaves


class Kind(str, Enum):
    FIXED = "fixed"
    ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Actor:
    path: str
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    dtype: Literal["float32", "bfloat16"] = "float32"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} is not positive; raise it")


@dataclass(frozen=True)
class Controller:
    kind: Kind = Kind.FIXED
    target: float | None = None


@dataclass(frozen=True)
class Root:
    actor: Actor
    steps: int
    seed: int = 42
    shuffle: bool = True
    sources: tuple[str, ...] = ("nq",)
    weights: Mapping[str, float] = field(default_factory=dict)
    sampling: Sampling = Sampling(temperature=0.6)
    kl: Controller | None = None
    out: Path = Path("outputs")
    named: dict[str, Controller] = field(default_factory=dict)


MINIMAL = {"actor": {"path": "model"}, "steps": 3}


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    (tmp_path / "train.yaml").write_text(
        "defaults:\n  - algorithm: gae\n  - recipe: null\n  - _self_\n\nactor:\n  path: tiny\nsteps: 3\n"
    )
    (tmp_path / "algorithm").mkdir()
    (tmp_path / "algorithm" / "gae.yaml").write_text("# @package _global_\nweights: {gae: 1}\n")
    (tmp_path / "algorithm" / "grpo.yaml").write_text("# @package _global_\nkl:\n  kind: adaptive\n")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "s3.yaml").write_text("# @package _global_\nseed: 7\nactor:\n  lr: 2e-6\n")
    return tmp_path


def test_build_fills_defaults_and_nests() -> None:
    config = build(Root, MINIMAL | {"kl": {"kind": "adaptive", "target": 6}, "out": "runs"})
    assert config == Root(
        actor=Actor(path="model"), steps=3, kl=Controller(kind=Kind.ADAPTIVE, target=6.0), out=Path("runs")
    )
    assert isinstance(config.kl.target, float)


def test_partial_mapping_keeps_the_fields_own_default() -> None:
    assert build(Root, MINIMAL | {"sampling": {"top_p": 0.9}}).sampling == Sampling(temperature=0.6, top_p=0.9)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"sed": 1}, "unknown key 'sed'; did you mean 'seed'? Keys: actor, steps, seed"),
        ({"lr": 1.0}, "unknown key 'lr'; did you mean 'actor.lr'?"),
        ({"sampling": {"temprature": 1.0}}, "unknown key 'sampling.temprature'; did you mean 'sampling.temperature'?"),
        ({"named": {"a": {"knd": "x"}}}, "unknown key 'named.a.knd'; did you mean 'named.a.kind'?"),
        ({"kl": {"knd": "x"}}, "unknown key 'kl.knd'; did you mean 'kl.kind'? Keys of 'kl': kind, target"),
        ({"steps": "many"}, "steps='many' (str): expected int"),
        ({"steps": 1.5}, "steps=1.5 (float): expected int"),
        ({"steps": True}, "steps=True (bool): expected int"),
        ({"seed": None}, "seed=null: expected int"),
        ({"shuffle": 1}, "shuffle=1 (int): expected true or false"),
        ({"sources": "nq"}, "sources='nq' (str): expected a list of str"),
        ({"sources": ["nq", 7]}, "sources[1]=7 (int): expected str; quote it"),
        ({"weights": {"a": "x"}}, "weights.a='x' (str): expected float"),
        ({"weights": {1: 2.0}}, "weights has the key 1 (int); expected a str"),
        (
            {"actor": {"path": "m", "betas": [0.9]}},
            "actor.betas=[0.9] (list): expected a list of exactly [float, float]",
        ),
        (
            {"actor": {"path": "m", "dtype": "float23"}},
            "actor.dtype='float23' (str): expected one of 'float32', 'bfloat16'; did you mean 'float32'?",
        ),
        ({"kl": {"kind": "adaptiv"}}, "expected one of 'fixed', 'adaptive'; did you mean 'adaptive'?"),
        ({"actor": {}}, "missing required key 'actor.path'; expected str"),
        ({"actor": 3}, "actor=3 (int): expected a mapping with the keys path, lr"),
        ({"actor": {"path": "m", "lr": -1}}, "actor: lr=-1.0 is not positive; raise it"),
        ({"actor": {"path": "m", "clip": "x"}}, "actor.clip='x' (str): expected float"),
    ],
)
def test_wrong_mapping_says_what_came_and_what_was_expected(extra: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Root, MINIMAL | extra)
    assert message in str(caught.value)


def test_missing_required_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"missing required key 'actor\.path'"):
        build(Root, {"steps": 1})
    with pytest.raises(ConfigError, match="missing required key 'steps'"):
        build(Root, {"actor": {"path": "m"}})


def test_an_unsupported_field_type_is_the_schemas_mistake() -> None:
    @dataclass(frozen=True)
    class Odd:
        value: complex

    with pytest.raises(TypeError, match="complex"):
        build(Odd, {"value": 1})


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=12)
ROOTS = st.builds(
    Root,
    actor=st.builds(
        Actor,
        path=NAMES,
        lr=st.floats(min_value=1e-12, max_value=1, exclude_min=True),
        clip=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    ),
    steps=st.integers(-(2**53), 2**53),
    shuffle=st.booleans(),
    sources=st.lists(NAMES).map(tuple),
    weights=st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False)),
    kl=st.none() | st.builds(Controller, kind=st.sampled_from(Kind), target=st.none() | st.just(6.0)),
    out=st.just(Path("a/b")),
    named=st.dictionaries(NAMES, st.builds(Controller, kind=st.sampled_from(Kind))),
)


@given(ROOTS)
def test_to_dict_is_inverted_by_build(config: Root) -> None:
    assert build(Root, to_dict(config)) == config


def test_yaml_composes_back_to_the_same_config(configs: Path) -> None:
    config = compose("train", ["recipe=s3", "actor.path='1e-6'", "kl.kind=adaptive", "seed=8"], Root, configs)
    (configs / "again.yaml").write_text(to_yaml(config))
    assert compose("again", [], Root, configs) == config
    assert config.actor == Actor(path="1e-6", lr=2e-6)


def test_groups_recipes_and_overrides_are_applied_in_order(configs: Path) -> None:
    assert compose("train", [], Root, configs).weights == {"gae": 1.0}
    config = compose("train", ["algorithm=grpo", "recipe=s3", "actor.lr=1e-5", "sources=[nq,hotpotqa]"], Root, configs)
    assert (config.weights, config.kl, config.seed) == ({}, Controller(kind=Kind.ADAPTIVE), 7)
    assert (config.actor.lr, config.sources) == (1e-5, ("nq", "hotpotqa"))


def test_an_override_may_set_a_key_the_yaml_does_not_mention(configs: Path) -> None:
    for prefix in ("", "+", "++"):
        assert compose("train", [f"{prefix}sampling.top_p=0.5"], Root, configs).sampling.top_p == 0.5


def test_interpolation_sees_dataclass_defaults_and_stays_out_of_unstated_keys(configs: Path) -> None:
    (configs / "inter.yaml").write_text("actor: {path: 'run-${seed}'}\nsteps: ${seed}\n")
    config = compose("inter", ["sampling.top_p=0.2"], Root, configs)
    assert (config.actor.path, config.steps) == ("run-42", 42)
    assert config.sampling == Sampling(temperature=0.6, top_p=0.2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["actor.lrr=1"], "unknown key 'actor.lrr'; did you mean 'actor.lr'? Keys of 'actor': path, lr, betas"),
        (["algorithm=grop"], "unknown algorithm 'grop'; did you mean 'grpo'? Choices: gae, grpo"),
        (["seed=1,2"], "override 'seed=1,2' lists several values"),
        (["seed"], "override 'seed' is malformed; expected key=value"),
        (["seed=[1"], "override 'seed=[1' is malformed"),
        (["hydra.run.dir=x"], "Hydra's own settings are not used here"),
        (["~sead"], "Could not delete from config. 'sead' does not exist."),
        (["~steps"], "missing required key 'steps'"),
        (["steps=???"], "missing required key 'steps'"),
        (["actor.path=${nowhere}"], "nowhere"),
        (["seed=x"], "seed='x' (str): expected int"),
    ],
)
def test_wrong_overrides_fail_in_one_line(configs: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("train", overrides, Root, configs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_key_in_a_file_and_broken_files_fail(configs: Path) -> None:
    (configs / "typo.yaml").write_text("actor: {path: m}\nsteps: 1\nshufle: false\n")
    with pytest.raises(ConfigError, match="unknown key 'shufle'; did you mean 'shuffle'"):
        compose("typo", [], Root, configs)
    (configs / "broken.yaml").write_text("actor: [\n")
    with pytest.raises(ConfigError, match="config 'broken'"):
        compose("broken", [], Root, configs)
    with pytest.raises(ConfigError, match="unknown config 'trian'; did you mean 'train'"):
        compose("trian", [], Root, configs)


def test_run_entry_runs_with_the_composed_config(configs: Path) -> None:
    seen: list[Root] = []
    assert run_entry("train", Root, ["seed=9"], seen.append, configs) == 0
    assert [config.seed for config in seen] == [9]


def test_dry_run_prints_yaml_that_builds_and_runs_nothing(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Root] = []
    assert run_entry("train", Root, ["--cfg", "job", "seed=9"], seen.append, configs) == 0
    (configs / "printed.yaml").write_text(capsys.readouterr().out)
    assert compose("printed", [], Root, configs).seed == 9
    assert seen == []


def test_help_lists_every_key_with_type_and_default(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry("train", Root, ["--help"], lambda _: None, configs) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "actor.path: str; required" in lines
    assert "sampling.temperature: float; default 0.6" in lines
    assert "kl: a mapping with the keys kind, target or null; default null" in lines
    assert "algorithm = gae | grpo" in lines


@pytest.mark.parametrize("argv", [["sed=1"], ["--verbose"], ["--cfg", "hydra"], ["--cfg"]])
def test_config_errors_are_one_line_on_stderr_and_exit_code_2(
    configs: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert run_entry("train", Root, argv, lambda _: None, configs) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_errors_of_the_run_itself_propagate(configs: Path) -> None:
    def crash(_: Root) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run_entry("train", Root, [], crash, configs)


def test_errors_on_purpose_are_told_without_a_traceback(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Root) -> None:
        error = ServiceError("the generator ended")
        error.add_note("its log ends with: out of memory")
        raise error

    assert run_entry("train", Root, [], fail, configs) == 1
    assert capsys.readouterr().err == "error: the generator ended\nits log ends with: out of memory\n"


@dataclass(frozen=True)
class Cat:
    lives: int = 9
    kind: Literal["cat"] = "cat"


@dataclass(frozen=True)
class Dog:
    tricks: int = 0
    kind: Literal["dog"] = "dog"


@dataclass(frozen=True)
class Home:
    pet: Cat | Dog = field(default_factory=lambda: Cat(lives=7))


def test_a_union_of_dataclasses_is_told_apart_by_its_tag() -> None:
    assert build(Home, {}) == Home(Cat(7))
    assert build(Home, {"pet": {}}) == Home(Cat(7)), "without a tag the default's class, and its values"
    assert build(Home, {"pet": {"kind": "dog", "tricks": 2}}) == Home(Dog(2))
    assert build(Home, to_dict(Home(Dog(3)))) == Home(Dog(3))
    assert [leaf.key for leaf in leaves(Home)] == ["pet.lives", "pet.kind"]


@pytest.mark.parametrize(
    ("pet", "message"),
    [
        ({"kind": "dgo"}, "pet.kind='dgo' .*expected one of 'cat', 'dog'; did you mean 'dog'"),
        ({"kind": "dog", "lives": 3}, "unknown key 'pet.lives'; did you mean 'pet.tricks'"),
        (3, "pet=3"),
    ],
)
def test_a_wrong_tag_or_a_key_of_another_member_is_refused(pet: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Home, {"pet": pet})


def test_a_group_set_to_nothing_is_refused_with_its_choices(tmp_path: Path) -> None:
    (tmp_path / "main.yaml").write_text("{}")
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "cat.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="pets=null; expected one of cat, or leave pets out"):
        compose("main", ["pets=null"], Home, tmp_path)


def test_a_terminated_entry_point_leaves_nothing_behind(configs: Path) -> None:
    before, stopped = signal.getsignal(signal.SIGTERM), []

    def terminated(config: Root) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            stopped.append(config.seed)

    with pytest.raises(SystemExit, match="143"):
        run_entry("train", Root, ["seed=9"], terminated, configs)
    assert stopped == [9]
    assert signal.getsignal(signal.SIGTERM) is before
