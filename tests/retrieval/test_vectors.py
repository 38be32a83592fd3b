from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.support import open_corpus, write_tiny_bert
from tests.retrieval.vectors_encoder import WIDTH, FakeEncoder, FakeTokens
from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder import load_encoder
from verl.retrieval.encoder_spec import EncoderConfig, EncoderSpec
from verl.retrieval.vectors import (
    INFO_NAME,
    VECTORS_NAME,
    VectorsInfo,
    encode_corpus,
    join_vectors,
    open_embeddings,
    open_vectors,
)

DOCUMENTS = 203
ROOT = Path(__file__).resolve().parents[2]


def passages(count: int = DOCUMENTS) -> list[tuple[str, str, str]]:
    return [(f"d{n}", f"Title {n}", f"text {n} " + "word " * (n % 17)) for n in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(tmp_path_factory.mktemp("corpus"), passages())


@pytest.fixture(scope="module")
def unbroken(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors") / "unbroken"
    encode_corpus(corpus, FakeEncoder(), folder)
    return folder


def broken(corpus: Corpus, folder: Path, chunks: int, **settings: float) -> None:
    """Begin a run and break it off after so many chunks."""
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(corpus, FakeEncoder(fails_after=chunks), folder, **settings)


def same_files(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (VECTORS_NAME, INFO_NAME))


def test_every_document_has_its_vector(corpus: Corpus, unbroken: Path) -> None:
    vectors = open_vectors(unbroken, corpus)
    assert vectors.shape == (DOCUMENTS, WIDTH) and vectors.dtype == np.float32 and not vectors.flags.writeable
    encoder = FakeEncoder()
    texts = [document.contents for document in corpus.documents()]
    np.testing.assert_array_equal(vectors, encoder.encode_tokens(encoder.tokenize_passages(texts)))
    raw = np.fromfile(unbroken / VECTORS_NAME, np.float32)
    np.testing.assert_array_equal(raw.reshape(DOCUMENTS, WIDTH), vectors)


def test_a_finished_set_is_not_encoded_again(corpus: Corpus, tmp_path: Path) -> None:
    first = encode_corpus(corpus, FakeEncoder(), tmp_path / "v")
    encoder = FakeEncoder()
    np.testing.assert_array_equal(encode_corpus(corpus, encoder, tmp_path / "v"), first)
    assert encoder.encoded == 1, "the first document, to see that it is the same model"


@pytest.mark.parametrize("chunks", [0, 1, 5, 12])
def test_a_run_that_was_broken_off_goes_on(corpus: Corpus, unbroken: Path, tmp_path: Path, chunks: int) -> None:
    folder = tmp_path / "v"
    broken(corpus, folder, chunks, checkpoint_s=0.0)
    done = 16 * chunks
    assert VectorsInfo.load(folder).rows == done
    with pytest.raises(DataError, match=f"are of {done} of {DOCUMENTS} documents; encode the rest"):
        open_vectors(folder, corpus)
    encoder = FakeEncoder()
    encode_corpus(corpus, encoder, folder)
    assert encoder.encoded == DOCUMENTS - done + (1 if done else 0)
    assert same_files(folder, unbroken)


def test_what_was_written_after_the_last_checkpoint_is_encoded_again(
    corpus: Corpus, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "v"
    broken(corpus, folder, 4, checkpoint_s=1000.0)
    assert VectorsInfo.load(folder).rows == 0 and (folder / VECTORS_NAME).stat().st_size == 4 * 16 * WIDTH * 4
    encode_corpus(corpus, FakeEncoder(), folder)
    assert same_files(folder, unbroken)


def test_killed_at_any_point_the_next_run_goes_on(corpus: Corpus, unbroken: Path, tmp_path: Path) -> None:
    folder, generator = tmp_path / "v", random.Random(0)
    command = [sys.executable, "-m", "tests.retrieval.vectors_encoder", str(corpus.path), str(folder), "0.005"]
    reached = []
    for _ in range(4):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        before = reached[-1] if reached else 0
        deadline = time.monotonic() + 30
        while _rows(folder) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.02))
        process.kill()
        process.wait()
        reached.append(_rows(folder))
    assert reached == sorted(reached) and reached[0] > 0, reached
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    assert same_files(folder, unbroken)


def _rows(folder: Path) -> int:
    info = VectorsInfo.load(folder)
    return info.rows if info else 0


def test_truncated_passages_are_counted_across_runs(
    corpus: Corpus, unbroken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = sum(len(document.contents) > 60 for document in corpus.documents())
    assert VectorsInfo.load(unbroken).truncated == expected > 0
    broken(corpus, tmp_path / "v", 6, checkpoint_s=0.0)
    encode_corpus(corpus, FakeEncoder(), tmp_path / "v")
    assert VectorsInfo.load(tmp_path / "v").truncated == expected
    assert f"{expected} of {DOCUMENTS} passages were cut at 60 tokens" in caplog.text


class TestAnotherOnesFolder:
    def refuse(self, corpus: Corpus, folder: Path, message: str, encoder: FakeEncoder, **settings: str) -> None:
        before = (folder / VECTORS_NAME).read_bytes()
        with pytest.raises(ConfigError, match=message):
            encode_corpus(corpus, encoder, folder, **settings)
        assert (folder / VECTORS_NAME).read_bytes() == before

    def test_another_corpus(self, unbroken: Path, tmp_path: Path) -> None:
        other = open_corpus(tmp_path, passages(7))
        self.refuse(other, unbroken, "something else: corpus '.*, documents 203, asked for 7", FakeEncoder())
        with pytest.raises(DataError, match=r"are of another corpus: fingerprint .* with 203 documents"):
            open_vectors(unbroken, other)

    def test_another_encoder(self, corpus: Corpus, unbroken: Path) -> None:
        spec = EncoderSpec("fake", max_length=60, query_prefix="q: ", pooling="cls")
        differing = "encoder_pooling 'mean', asked for 'cls', encoder_query_prefix '', asked for 'q: '"
        self.refuse(corpus, unbroken, f"something else: {differing}; pass another folder", FakeEncoder(spec))
        self.refuse(corpus, unbroken, "width 24, asked for 25", FakeEncoder(width=25))

    def test_another_number_format(self, corpus: Corpus, unbroken: Path) -> None:
        self.refuse(corpus, unbroken, "dtype 'float32', asked for 'float16'", FakeEncoder(), dtype="float16")
        self.refuse(corpus, unbroken, "precision 'float32', asked for 'bfloat16'", FakeEncoder(precision="bfloat16"))

    def test_another_model_with_the_same_settings(self, corpus: Corpus, unbroken: Path) -> None:
        self.refuse(corpus, unbroken, "vectors of another model: the first one is", FakeEncoder(seed=1))
        self.refuse(corpus, unbroken, "vectors of another model: the first one is", FakeEncoder(scale=1.02))

    def test_a_model_that_moved_is_the_same(self, corpus: Corpus, unbroken: Path) -> None:
        encode_corpus(corpus, FakeEncoder(EncoderSpec("/elsewhere/fake", max_length=60)), unbroken)

    def test_overwriting(self, corpus: Corpus, tmp_path: Path) -> None:
        folder = tmp_path / "v"
        encode_corpus(corpus, FakeEncoder(seed=1), folder)
        other = encode_corpus(corpus, FakeEncoder(), tmp_path / "other")
        np.testing.assert_array_equal(encode_corpus(corpus, FakeEncoder(), folder, overwrite=True), other)

    def test_a_file_of_unknown_origin_is_kept(self, corpus: Corpus, tmp_path: Path) -> None:
        (tmp_path / VECTORS_NAME).write_bytes(b"precious")
        self.refuse(corpus, tmp_path, f"holds a {VECTORS_NAME} without {INFO_NAME}", FakeEncoder())
        encode_corpus(corpus, FakeEncoder(), tmp_path, overwrite=True)
        assert len(open_vectors(tmp_path, corpus)) == DOCUMENTS

    def test_two_processes_at_once(self, corpus: Corpus, tmp_path: Path) -> None:
        folder = tmp_path / "v"

        class Rival(FakeEncoder):
            def encode_tokens(self, tokens: FakeTokens) -> np.ndarray:
                with pytest.raises(ConfigError, match="another process writes vectors into"):
                    encode_corpus(corpus, FakeEncoder(), folder)
                return super().encode_tokens(tokens)

        encode_corpus(corpus, Rival(chunk_documents=DOCUMENTS), folder)
        assert len(open_vectors(folder, corpus)) == DOCUMENTS


class TestDamage:
    @pytest.fixture
    def folder(self, corpus: Corpus, tmp_path: Path) -> Path:
        encode_corpus(corpus, FakeEncoder(), tmp_path / "v")
        return tmp_path / "v"

    @pytest.mark.parametrize("change", [-1, -WIDTH * 4 * 50, 4])
    def test_a_file_of_another_size(self, corpus: Corpus, folder: Path, change: int) -> None:
        data = (folder / VECTORS_NAME).read_bytes()
        (folder / VECTORS_NAME).write_bytes(data[:change] if change < 0 else data + b"\0" * change)
        for read in (lambda: open_vectors(folder, corpus), lambda: encode_corpus(corpus, FakeEncoder(), folder)):
            with pytest.raises(DataError, match=r"counts 203 rows of 96 bytes; the file is damaged"):
                read()

    def test_no_file(self, corpus: Corpus, folder: Path) -> None:
        (folder / VECTORS_NAME).unlink()
        with pytest.raises(DataError, match="has 0 bytes, but"):
            open_vectors(folder, corpus)
        (folder / INFO_NAME).unlink()
        with pytest.raises(DataError, match=f"holds no {INFO_NAME}; encode the corpus into it first"):
            open_vectors(folder, corpus)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": 1}', "null"])
    def test_a_broken_json_file(self, corpus: Corpus, folder: Path, content: str) -> None:
        (folder / INFO_NAME).write_text(content, "utf-8")
        with pytest.raises(DataError, match=f"{INFO_NAME} cannot be read"):
            open_vectors(folder, corpus)

    def test_another_format(self, corpus: Corpus, folder: Path) -> None:
        content = json.loads((folder / INFO_NAME).read_text("utf-8")) | {"format": 9}
        (folder / INFO_NAME).write_text(json.dumps(content), "utf-8")
        with pytest.raises(DataError, match="has format 9, expected 1"):
            open_vectors(folder, corpus)


@contextlib.contextmanager
def files_of_at_most(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes, as a full disk would not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_is_finished(corpus: Corpus, unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "v"
    with (
        files_of_at_most(100 * WIDTH * 4 + 3),
        pytest.raises(DataError, match=r"cannot write vectors into .* the first 96 of 203 rows are kept: make room"),
    ):
        encode_corpus(corpus, FakeEncoder(), folder, checkpoint_s=0.0)
    encoder = FakeEncoder()
    encode_corpus(corpus, encoder, folder)
    assert encoder.encoded == DOCUMENTS - 96 + 1
    assert same_files(folder, unbroken)


def test_joining_on_a_full_disk_leaves_nothing_that_is_taken_for_vectors(
    corpus: Corpus, unbroken: Path, tmp_path: Path
) -> None:
    with files_of_at_most(1000), pytest.raises(DataError, match="cannot write vectors into"):
        join_vectors([unbroken], tmp_path / "all", corpus)
    join_vectors([unbroken], tmp_path / "all", corpus)
    assert same_files(tmp_path / "all", unbroken)


def test_a_passage_without_a_finite_vector_is_placed(corpus: Corpus, tmp_path: Path) -> None:
    class Overflows(FakeEncoder):
        def encode_tokens(self, tokens: FakeTokens) -> np.ndarray:
            if self.chunks == 2:
                raise RetrieverError("1 of 16 vectors are not finite")
            return super().encode_tokens(tokens)

    with pytest.raises(DataError, match="rows 32 to 48 of the corpus: 1 of 16 vectors are not finite"):
        encode_corpus(corpus, Overflows(), tmp_path)


def test_a_folder_that_cannot_be_written(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(DataError, match="cannot write vectors into"):
        encode_corpus(corpus, FakeEncoder(), tmp_path / "file" / "v")


def test_half_precision_halves_the_file(corpus: Corpus, unbroken: Path, tmp_path: Path) -> None:
    half = encode_corpus(corpus, FakeEncoder(), tmp_path / "v", "float16")
    assert half.dtype == np.float16
    assert (tmp_path / "v" / VECTORS_NAME).stat().st_size * 2 == (unbroken / VECTORS_NAME).stat().st_size
    np.testing.assert_array_equal(half, open_vectors(unbroken, corpus).astype(np.float16))


def test_numbers_that_half_precision_cannot_hold_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a vector of rows 0 to 16 does not fit into float16; use float32"):
        encode_corpus(corpus, FakeEncoder(scale=1e6), tmp_path, "float16")


def test_parts_make_a_whole(corpus: Corpus, unbroken: Path, tmp_path: Path) -> None:
    bounds = [(100, 101), (0, 100), (101, DOCUMENTS)]
    parts = [tmp_path / str(start) for start, _ in bounds]
    for part, rows in zip(parts, bounds, strict=True):
        assert encode_corpus(corpus, FakeEncoder(), part, rows=rows).shape == (rows[1] - rows[0], WIDTH)
    np.testing.assert_array_equal(join_vectors(parts, tmp_path / "all", corpus), open_vectors(unbroken, corpus))
    assert same_files(tmp_path / "all", unbroken)
    with pytest.raises(DataError, match="are of 100 of 203 documents"):
        open_vectors(parts[1], corpus)
    with pytest.raises(ConfigError, match="stop 100, asked for 203"):
        encode_corpus(corpus, FakeEncoder(), parts[1])


def test_parts_that_make_no_whole_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    parts = [tmp_path / name for name in "abcd"]
    encode_corpus(corpus, FakeEncoder(), parts[0], rows=(0, 100))
    encode_corpus(corpus, FakeEncoder(), parts[1], rows=(100, DOCUMENTS))
    encode_corpus(corpus, FakeEncoder(EncoderSpec(max_length=9)), parts[2], rows=(100, DOCUMENTS))
    broken(corpus, parts[3], 2, rows=(100, DOCUMENTS))
    target = tmp_path / "all"
    for wrong in (parts[:1], parts[1:2], [parts[0], *parts[:2]], [parts[0], parts[3]], [parts[0], tmp_path / "no"], []):
        with pytest.raises(DataError, match=r"parts hold finished rows .* expected all of 0 to 203 once"):
            join_vectors(wrong, target, corpus)
    with pytest.raises(ConfigError, match="encoder_max_length 9, asked for 60"):
        join_vectors([parts[0], parts[2]], target, corpus)
    assert not target.exists()
    join_vectors(parts[:2], target, corpus)
    with pytest.raises(ConfigError, match="holds vectors already"):
        join_vectors(parts[:2], target, corpus)


@pytest.mark.parametrize("rows", [(0, 0), (-1, 5), (5, 4), (0, DOCUMENTS + 1)])
def test_rows_outside_the_corpus_are_refused(corpus: Corpus, tmp_path: Path, rows: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="expected a part of the corpus's 203 documents"):
        encode_corpus(corpus, FakeEncoder(), tmp_path, rows=rows)


def test_published_embeddings_are_mapped_once_their_size_is_right(tmp_path: Path) -> None:
    numbers = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = tmp_path / "emb_e5.memmap"
    numbers.tofile(path)
    mapped = open_embeddings(path, 4, 3)
    np.testing.assert_array_equal(mapped, numbers)
    assert not mapped.flags.writeable
    for rows, width in ((4, 4), (5, 3), (3, 3)):
        with pytest.raises(DataError, match=f"have 48 bytes, expected {rows * width * 4} for {rows} documents"):
            open_embeddings(path, rows, width)
    with pytest.raises(DataError, match="no such file"):
        open_embeddings(tmp_path / "none", 4, 3)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for count in (500, 4000):
        folder = tmp_path / str(count)
        folder.mkdir()
        corpus = open_corpus(folder, passages(count))
        tracemalloc.start()
        encode_corpus(corpus, FakeEncoder(chunk_documents=64), folder / "v")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_a_real_encoder_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    encoder = load_encoder("e5", str(write_tiny_bert(tmp_path / "bert", 64)), EncoderConfig("cpu"))
    encoder.chunk_documents = 32
    corpus = open_corpus(tmp_path, passages(100))
    whole = encode_corpus(corpus, encoder, tmp_path / "whole")
    np.testing.assert_array_equal(whole, encoder.encode_passages([doc.contents for doc in corpus.documents()]))

    class Dies:
        def __getattr__(self, name: str) -> object:
            return getattr(encoder, name)

        def encode_tokens(self, tokens: object) -> np.ndarray:
            if VectorsInfo.load(tmp_path / "v").rows == 64:
                raise KeyboardInterrupt
            return encoder.encode_tokens(tokens)

    with pytest.raises(KeyboardInterrupt):
        encode_corpus(corpus, Dies(), tmp_path / "v", checkpoint_s=0.0)
    encode_corpus(corpus, encoder, tmp_path / "v")
    assert same_files(tmp_path / "v", tmp_path / "whole")


def test_the_json_file_says_what_is_there(corpus: Corpus, unbroken: Path) -> None:
    info = VectorsInfo.load(unbroken)
    assert (info.rows, info.start, info.stop, info.documents) == (DOCUMENTS, 0, DOCUMENTS, DOCUMENTS)
    assert info.finished and not dataclasses.replace(info, rows=5).finished
    assert info.row_bytes == 4 * WIDTH and info.corpus == corpus.fingerprint
