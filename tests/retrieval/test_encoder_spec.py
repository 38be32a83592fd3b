from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from verl.errors import ConfigError, DataError
from verl.retrieval.encoder_spec import (
    ENCODERS,
    EncoderConfig,
    EncoderSpec,
    read_overrides,
    recorded_spec,
    spec_settings,
)


def test_specs_are_those_of_the_model_cards() -> None:
    assert {name: dataclasses.astuple(spec)[:5] for name, spec in ENCODERS.items()} == {
        "e5": ("intfloat/e5-base-v2", "query: ", "passage: ", "mean", True),
        "bge": (
            "BAAI/bge-base-en-v1.5",
            "Represent this sentence for searching relevant passages: ",
            "",
            "cls",
            True,
        ),
        "minilm": ("sentence-transformers/all-MiniLM-L6-v2", "", "", "mean", True),
        "multilingual-e5-instruct": (
            "intfloat/multilingual-e5-large-instruct",
            "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ",
            "",
            "mean",
            True,
        ),
        "contriever": ("facebook/contriever", "", "", "mean", False),
        "dpr": ("facebook/dpr-question_encoder-single-nq-base", "", "", "cls", False),
        "sentence-transformers": ("", "", "", "mean", True),
        "custom": ("", "", "", "mean", True),
    }
    assert {name for name, spec in ENCODERS.items() if spec.max_length != 256} == set()
    assert ENCODERS["dpr"].passage_model == "facebook/dpr-ctx_encoder-single-nq-base"
    assert {name: spec.passage_format for name, spec in ENCODERS.items() if spec.passage_format != "contents"} == {
        "contriever": "plain",
        "dpr": "pair",
    }


def test_overrides_come_from_files_and_pairs_and_the_last_one_wins(tmp_path: Path) -> None:
    yaml = tmp_path / "gte.yaml"
    yaml.write_text('model: thenlper/gte-base\nquery_prefix: "query: "\nmax_length: 512\n', "utf-8")
    other = tmp_path / "a=b.json"
    other.write_text(json.dumps({"normalize": False, "pooling": "cls"}), "utf-8")
    assert read_overrides(
        [str(yaml), "pooling=max", str(other), "max_length=128", "passage_prefix=one, two = three "]
    ) == {
        "model": "thenlper/gte-base",
        "query_prefix": "query: ",
        "max_length": 128,
        "pooling": "cls",
        "normalize": False,
        "passage_prefix": "one, two = three ",
    }
    assert read_overrides(["normalize=true", "model=7"]) == {"normalize": True, "model": "7"}
    assert read_overrides([]) == {}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("poling=cls", r"unknown key 'encoder\.poling'; did you mean 'encoder\.pooling'"),
        ("pooling=clss", r"encoder\.pooling='clss' .*expected one of 'mean', 'cls', 'max', 'last'; did you mean 'cls'"),
        ("max_length=many", r"encoder\.max_length='many' .*expected int"),
        ("max_length=0", "max_length=0; expected at least 1"),
        ("normalize=yes", r"encoder\.normalize='yes' .*expected true or false"),
        ("nowhere.yaml", "'nowhere.yaml' cannot be read .*expected a YAML or JSON file, or key=value"),
    ],
)
def test_what_is_no_spec_is_refused(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_overrides([source])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: 7\n", r"spec.yaml: encoder\.model=7 \(int\): expected str"),
        (b"prefix: x\n", r"spec.yaml: unknown key 'encoder\.prefix'"),
        (b"- model\n", "spec.yaml holds a list; expected a mapping"),
        (b"model: [\n", "spec.yaml' cannot be read"),
        (b"\xff\xfe\xfa", "spec.yaml' cannot be read"),
        (b"", "spec.yaml holds a NoneType; expected a mapping"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_overrides([str(path)])


@pytest.mark.parametrize("name", list(ENCODERS))
def test_a_spec_survives_being_recorded_among_other_settings(name: str) -> None:
    settings = spec_settings(ENCODERS[name])
    assert all(
        key.startswith("encoder_") and isinstance(value, str | int | float | bool) for key, value in settings.items()
    )
    assert recorded_spec(json.loads(json.dumps({"kind": "Flat", "nprobe": 8, **settings}))) == ENCODERS[name]


def test_a_record_of_another_version_is_refused() -> None:
    with pytest.raises(DataError, match=r"unknown key 'encoder\.colour'"):
        recorded_spec({"encoder_colour": "red"})


@pytest.mark.parametrize("bad", [{"pooling": "sum"}, {"passage_format": "html"}, {"max_length": 0}])
def test_a_spec_made_in_code_is_checked_too(bad: dict[str, str | int]) -> None:
    with pytest.raises(ConfigError, match=f"encoder {next(iter(bad))}="):
        EncoderSpec("model", **bad)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"batch_tokens": 0}, {"dtype": "int8"}])
def test_a_config_that_cannot_run_is_refused(bad: dict[str, str | int]) -> None:
    with pytest.raises(ConfigError, match=f"encoder {next(iter(bad))}="):
        EncoderConfig(**bad)
