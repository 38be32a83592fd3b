from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, BertModel, DistilBertModel, DPRContextEncoder, DPRQuestionEncoder, T5Config, T5Model

from tests.retrieval.encoder_models import (
    TEXTS,
    WIDTH,
    describe,
    reference,
    unit,
    write_distilbert,
    write_dpr,
    write_xlm_roberta,
)
from tests.retrieval.support import write_tiny_bert
from verl.errors import ConfigError, RetrieverError
from verl.retrieval.encoder import Encoder, batches, load_encoder
from verl.retrieval.encoder_network import TransformersNetwork
from verl.retrieval.encoder_packed import PackedNetwork
from verl.retrieval.encoder_spec import ENCODERS, EncoderConfig

CPU = EncoderConfig(device="cpu")
INSTRUCT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("models") / "bert", WIDTH)


@pytest.fixture(scope="module")
def xlm_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_xlm_roberta(tmp_path_factory.mktemp("models") / "xlm-roberta")


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_distilbert(tmp_path_factory.mktemp("models") / "distilbert")


@pytest.fixture(scope="module")
def dpr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_dpr(tmp_path_factory.mktemp("models") / "dpr")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "query_prefix", "passage_prefix", "pooling", "scaled"),
    [
        ("e5", "query: ", "passage: ", "mean", True),
        ("bge", "Represent this sentence for searching relevant passages: ", "", "cls", True),
        ("minilm", "", "", "mean", True),
        ("multilingual-e5-instruct", INSTRUCT, "", "mean", True),
        ("contriever", "", "", "mean", False),
        ("custom", "", "", "mean", True),
    ],
)
def test_vectors_are_those_of_the_plain_model(
    bert: Path, name: str, query_prefix: str, passage_prefix: str, pooling: str, scaled: bool
) -> None:
    encoder = load_encoder(name, str(bert), EncoderConfig(device="cpu", batch_size=2))
    network = BertModel.from_pretrained(bert)
    for encode, prefix in ((encoder.encode_queries, query_prefix), (encoder.encode_passages, passage_prefix)):
        vectors = encode(TEXTS)
        assert vectors.shape == (5, WIDTH) and vectors.dtype == np.float32
        expected = [reference(network, bert, prefix + text, pooling, 128) for text in TEXTS]
        np.testing.assert_allclose(vectors, [unit(v) if scaled else v for v in expected], atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_every_pooling_is_the_plain_one(bert: Path, distilbert: Path, family: str, pooling: str) -> None:
    source, kind = (bert, BertModel) if family == "bert" else (distilbert, DistilBertModel)
    encoder = load_encoder("custom", str(source), CPU, {"pooling": pooling, "normalize": False})
    network = kind.from_pretrained(source)
    expected = [reference(network, source, text, pooling, 128) for text in TEXTS]
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "xlm_roberta"])
def test_a_text_alone_and_in_any_batch_has_the_same_bits(
    request: pytest.FixtureRequest, threads: Callable[[int], None], family: str, pooling: str
) -> None:
    threads(1)
    encoder = load_encoder("custom", str(request.getfixturevalue(family)), CPU, {"pooling": pooling, "max_length": 30})
    assert isinstance(encoder._queries.networks[0], PackedNetwork) is (family != "distilbert")
    texts = [*TEXTS, *("ab " * count for count in range(1, 12)), *("c" * count for count in range(9))] * 2
    together = encoder.encode_queries(texts)
    np.testing.assert_array_equal(np.concatenate([encoder.encode_queries([t]) for t in texts]), together)
    np.testing.assert_array_equal(encoder.encode_queries(texts[::-1])[::-1], together)
    sevens = [encoder.encode_queries(texts[start : start + 7]) for start in range(0, len(texts), 7)]
    np.testing.assert_array_equal(np.concatenate(sevens), together)


@pytest.mark.parametrize("family", ["bert", "distilbert", "xlm_roberta"])
def test_nor_does_it_depend_on_the_batch_with_more_threads(
    request: pytest.FixtureRequest, threads: Callable[[int], None], family: str
) -> None:
    encoder = load_encoder("custom", str(request.getfixturevalue(family)), CPU, {"max_length": 30})
    texts = [*TEXTS, "ab ab", "c"]
    threads(1)
    one = encoder.encode_queries(texts)
    for count in (2, 3):
        threads(count)
        together = encoder.encode_queries(texts)
        np.testing.assert_array_equal(np.concatenate([encoder.encode_queries([t]) for t in texts]), together)
        if family != "distilbert":
            np.testing.assert_array_equal(together, one, "the packed network does not even depend on the threads")


@pytest.mark.parametrize("config", [EncoderConfig("cpu", 1), EncoderConfig("cpu", 512, 1), EncoderConfig("cpu,cpu", 3)])
def test_neither_batches_nor_devices_change_a_bit(bert: Path, config: EncoderConfig) -> None:
    texts = [*TEXTS, *("ab " * count for count in range(1, 30))]
    expected = load_encoder("e5", str(bert), CPU).encode_passages(texts)
    np.testing.assert_array_equal(load_encoder("e5", str(bert), config).encode_passages(texts), expected)


def test_roberta_counts_positions_from_the_padding_token(xlm_roberta: Path) -> None:
    encoder = load_encoder("multilingual-e5-instruct", str(xlm_roberta), CPU)
    assert encoder.spec.max_length == 32, "34 positions, of which 0 and 1 are never a token's"
    network = AutoModel.from_pretrained(xlm_roberta)
    # A padding token that the user typed has its own position and does not count for the others.
    texts = ["abc", "a<pad>b<pad>c", "", "z" * 40]
    expected = [unit(reference(network, xlm_roberta, text, "mean", 32)) for text in texts]
    np.testing.assert_allclose(encoder.encode_passages(texts), expected, atol=2e-6)
    assert encoder.truncated == 1


def test_a_model_with_relative_positions_is_left_to_transformers(tmp_path: Path) -> None:
    source = write_xlm_roberta(tmp_path / "mpnet", kind="mpnet")
    encoder = load_encoder("custom", str(source), CPU)
    assert isinstance(encoder._queries.networks[0], TransformersNetwork) and encoder.spec.max_length == 32
    expected = [unit(reference(AutoModel.from_pretrained(source), source, text, "mean", 32)) for text in TEXTS]
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), expected, atol=2e-6)


def test_dpr_encodes_questions_and_passages_with_a_model_each(dpr: tuple[Path, Path]) -> None:
    encoder = load_encoder("dpr", f"{dpr[0]},{dpr[1]}", CPU)
    question = DPRQuestionEncoder.from_pretrained(dpr[0]).question_encoder.bert_model
    passage = DPRContextEncoder.from_pretrained(dpr[1]).ctx_encoder.bert_model
    np.testing.assert_allclose(
        encoder.encode_queries(["the river"])[0], reference(question, dpr[0], "the river", "cls", 128), atol=1e-5
    )
    passages = {
        '"the "swift" planet"\nis a river\nof the planet': ('the "swift" planet', "is a river\nof the planet"),
        '""\nonly text': "only text",
        '"only a title"\n': "only a title",
        "no quotes\ntext": ("no quotes", "text"),
        '"t"\n' + "long " * 60: ("t", "long " * 60),
    }
    expected = [reference(passage, dpr[1], parts, "cls", 128) for parts in passages.values()]
    np.testing.assert_allclose(encoder.encode_passages(list(passages)), expected, atol=1e-5)
    assert encoder.truncated == 1
    assert encoder.spec.model == str(dpr[0]) and encoder.spec.passage_model == str(dpr[1])


def test_dpr_needs_two_models_that_fit(dpr: tuple[Path, Path], bert: Path, tmp_path: Path) -> None:
    for models in (str(dpr[0]), f"{dpr[0]},", f"{dpr[0]},{dpr[1]},x"):
        with pytest.raises(ConfigError, match="expected both, with a comma between them"):
            load_encoder("dpr", models, CPU)
    wider = write_tiny_bert(tmp_path / "wider", width=96)
    with pytest.raises(ConfigError, match="queries become 64 numbers and passages 96"):
        load_encoder("dpr", f"{dpr[0]},{wider}", CPU)


def test_title_and_text_without_quotes_for_contriever(bert: Path) -> None:
    encoder = load_encoder("contriever", str(bert), CPU)
    plain = load_encoder("custom", str(bert), CPU, {"normalize": False})
    np.testing.assert_array_equal(
        encoder.encode_passages(['"the river"\nof planets', '""\ntext', '"title"\n']),
        plain.encode_passages(["the river of planets", "text", "title"]),
    )


def test_overrides_make_another_encoder(bert: Path) -> None:
    overrides = {"model": str(bert), "query_prefix": "is: ", "pooling": "last", "max_length": 9}
    encoder = load_encoder("e5", config=CPU, overrides=overrides)
    text = "is: " + "x" * 20
    expected = unit(reference(BertModel.from_pretrained(bert), bert, text, "last", 9))
    np.testing.assert_allclose(encoder.encode_queries(["x" * 20])[0], expected, atol=2e-6)
    assert encoder.spec == dataclasses.replace(ENCODERS["e5"], **overrides)
    with pytest.raises(ConfigError, match=r"unknown key 'encoder\.poling'; did you mean 'encoder\.pooling'"):
        load_encoder("e5", overrides={"poling": "cls"})


def test_another_model_replaces_the_packaged_one(bert: Path) -> None:
    assert load_encoder("minilm", config=CPU, overrides={"model": str(bert)}).width == WIDTH


def test_two_models_share_the_shorter_length(dpr: tuple[Path, Path], xlm_roberta: Path) -> None:
    encoder = load_encoder("dpr", f"{dpr[0]},{xlm_roberta}", CPU)
    assert encoder.spec.max_length == 32
    longest = max(
        len(ids) for side in (encoder._queries, encoder._passages) for ids in [side.tokenizer.encode("a b " * 90).ids]
    )
    assert longest == 32


def test_a_long_text_is_cut_counted_and_logged_once(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_encoder("minilm", str(bert), CPU)
    assert encoder.spec.max_length == 128, "as many as the model has positions"
    with caplog.at_level(logging.WARNING):
        exact = encoder.encode_passages(["a " * 126])
        assert encoder.truncated == 0
        cut = encoder.encode_passages(["a " * 126 + "river " * 9, "a " * 500])
    assert encoder.truncated == 2
    assert [record.message for record in caplog.records] == [
        "a passage is longer than 128 tokens; read up to there and counted"
    ]
    np.testing.assert_array_equal(cut, np.repeat(exact, 2, axis=0))


def test_no_texts_are_no_vectors(bert: Path) -> None:
    encoder = load_encoder("e5", str(bert), CPU)
    assert encoder.encode_queries([]).shape == encoder.encode_passages([]).shape == (0, WIDTH)


def test_text_that_is_no_unicode_is_refused(bert: Path) -> None:
    with pytest.raises(RetrieverError, match="one of 2 texts is no valid Unicode"):
        load_encoder("e5", str(bert), CPU).encode_queries(["fine", "half a pair: \ud800"])


def test_a_vector_that_is_not_finite_is_refused(bert: Path, tmp_path: Path) -> None:
    network = BertModel.from_pretrained(bert)
    with torch.no_grad():
        network.encoder.layer[1].output.LayerNorm.weight.fill_(1e38)
        network.encoder.layer[1].output.LayerNorm.bias.fill_(3e38)
    broken = describe(bert, tmp_path / "broken", {})
    network.save_pretrained(broken)
    with pytest.raises(RetrieverError, match=r"2 of 2 vectors are not finite.*float32; use dtype"):
        load_encoder("e5", str(broken), CPU).encode_queries(["a", "b"])


def test_a_device_without_memory_says_what_to_lower(bert: Path) -> None:
    class Full:
        width, equal_lengths = WIDTH, False

        def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    encoder = load_encoder("e5", str(bert), CPU)
    side = dataclasses.replace(encoder._queries, networks=(Full(),))
    full = Encoder(side, side, encoder.spec, EncoderConfig(batch_tokens=77), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"no memory for 77 tokens.*lower --batch_tokens"):
        full.encode_queries(["a"])


def test_lower_precision_is_near(bert: Path) -> None:
    exact = load_encoder("e5", str(bert), CPU).encode_queries(TEXTS)
    encoder = load_encoder("e5", str(bert), EncoderConfig("cpu", dtype="bfloat16"))
    assert encoder.precision == "bfloat16"
    rounded = encoder.encode_queries(TEXTS)
    assert rounded.dtype == np.float32
    assert 1e-5 < np.abs(rounded - exact).max() < 0.05


class TestModelsThatCannotServe:
    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"encoder e5: model .* cannot be loaded.*pass --retriever_model"):
            load_encoder("e5", str(tmp_path), CPU)

    def test_unknown_name(self) -> None:
        with pytest.raises(ConfigError, match="'e6' is unknown; expected one of e5, bge, minilm"):
            load_encoder("e6")

    def test_no_model_named(self) -> None:
        with pytest.raises(ConfigError, match="encoder custom has no model of its own; pass one with"):
            load_encoder("custom")

    def test_weights_that_would_be_random(self, bert: Path, tmp_path: Path) -> None:
        one_layer = describe(bert, tmp_path / "short", {})
        network = BertModel.from_pretrained(bert)
        weights = {name: value for name, value in network.state_dict().items() if "layer.1." not in name}
        network.save_pretrained(one_layer, state_dict=weights)
        with pytest.raises(ConfigError, match=r"lacks 16 weights of a BertModel.*they would be random"):
            load_encoder("e5", str(one_layer), CPU)

    def test_a_damaged_file(self, bert: Path, tmp_path: Path) -> None:
        damaged = describe(bert, tmp_path / "damaged", {})
        whole = (damaged / "model.safetensors").read_bytes()
        for size in (0, 5, len(whole) // 2):
            (damaged / "model.safetensors").write_bytes(whole[:size])
            with pytest.raises(ConfigError, match="cannot be loaded"):
                load_encoder("e5", str(damaged), CPU)

    def test_an_encoder_with_a_decoder(self, bert: Path, tmp_path: Path) -> None:
        folder = describe(bert, tmp_path / "t5", {})
        T5Model(T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(folder)
        with pytest.raises(ConfigError, match="is a t5, an encoder with a decoder"):
            load_encoder("custom", str(folder), CPU)

    def test_dpr_that_projects(self, dpr: tuple[Path, Path], tmp_path: Path) -> None:
        config = DPRQuestionEncoder.from_pretrained(dpr[0]).config.to_dict() | {"projection_dim": 8}
        folder = describe(dpr[0], tmp_path / "projecting", {"config.json": config})
        with pytest.raises(ConfigError, match=r"projection_dim=8; expected .* with projection_dim=0"):
            load_encoder("dpr", f"{folder},{dpr[1]}", CPU)

    def test_a_length_without_room(self, bert: Path) -> None:
        with pytest.raises(ConfigError, match="adds 2 tokens to a text of at most 2"):
            load_encoder("e5", str(bert), CPU, {"max_length": 2})

    @pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu,cuda:99", "cuda:all,cpu"])
    def test_a_device_that_is_not_there(self, device: str) -> None:
        with pytest.raises(ConfigError, match=f"encoder device='{device}' is not there"):
            load_encoder("e5", config=EncoderConfig(device=device))


class TestMiniLM:
    """The one real encoder that is at hand offline."""

    @pytest.fixture(scope="class")
    def minilm(self) -> Encoder:
        return load_encoder("minilm", config=CPU)

    def test_it_knows_what_is_alike(self, minilm: Encoder) -> None:
        query = minilm.encode_queries(["How many people live in Berlin?"])[0]
        near, far = minilm.encode_passages(
            ["Berlin has a population of 3.8 million registered inhabitants.", "A cat sleeps on the sofa."]
        )
        # 0.75 or so is also what the model card of all-MiniLM-L6-v2 leads one to expect of such a pair.
        assert float(query @ near) > 0.6 > 0.2 > float(query @ far)

    def test_a_text_alone_and_in_a_batch_has_the_same_bits(
        self, minilm: Encoder, threads: Callable[[int], None]
    ) -> None:
        texts = ["who wrote it", "a", "", "the longest river of " * 9, *(f"question number {n}" for n in range(12))]
        together = minilm.encode_queries(texts)
        for count in (1, 3):
            threads(count)
            alone = np.concatenate([minilm.encode_queries([text]) for text in texts])
            np.testing.assert_array_equal(alone, together)


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu(bert: Path, distilbert: Path) -> None:
    for source in (bert, distilbert):
        exact = load_encoder("e5", str(source), CPU).encode_passages(TEXTS)
        for config in (EncoderConfig("cuda"), EncoderConfig("cuda:all", dtype="bfloat16"), EncoderConfig("cuda", 2)):
            np.testing.assert_allclose(load_encoder("e5", str(source), config).encode_passages(TEXTS), exact, atol=0.05)
        single = load_encoder("e5", str(source), EncoderConfig("cuda:0,cuda:0", dtype="float32", batch_size=2))
        np.testing.assert_allclose(single.encode_passages(TEXTS), exact, atol=1e-3)


@given(
    lengths=st.lists(st.integers(1, 40), max_size=60),
    max_texts=st.integers(1, 9),
    max_tokens=st.integers(1, 200),
    equal=st.booleans(),
)
def test_batches_hold_every_row_once_within_their_bounds(
    lengths: list[int], max_texts: int, max_tokens: int, equal: bool
) -> None:
    groups = list(batches(lengths, max_texts, max_tokens, equal))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[row] for row in group]
        assert sizes == sorted(sizes, reverse=True)
        assert len(group) <= max_texts
        assert len(group) == 1 or len(group) * max(sizes) <= max_tokens
        assert not equal or len(set(sizes)) == 1
    longest = [lengths[group[0]] for group in groups]
    assert longest == sorted(longest, reverse=True)
