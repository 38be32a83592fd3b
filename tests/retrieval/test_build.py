from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.retrieval.support import PASSAGES, open_corpus
from verl.errors import ConfigError, DataError
from verl.retrieval.build import build_index, main
from verl.retrieval.build_flags import build_options, build_parser
from verl.retrieval.build_options import BuildOptions
from verl.retrieval.corpus import Corpus
from verl.retrieval.dense_build import check_room
from verl.retrieval.encoder_spec import EncoderConfig
from verl.retrieval.engine import IndexInfo, open_index
from verl.retrieval.index_kinds import IndexConfig, lay_out
from verl.retrieval.search_config import SearchConfig
from verl.retrieval.settings import BM25Config, LuceneConfig
from verl.retrieval.workplace import workplace

CPU = EncoderConfig(device="cpu")


def test_bm25_is_built_and_opened_from_the_folder_or_a_file_in_it(corpus: Corpus, tmp_path: Path) -> None:
    target = tmp_path / "indexes" / "bm25"
    info = build_index(corpus, "bm25", target)
    assert (info.retriever, info.model, info.documents, info.fingerprint) == ("bm25", None, 8, corpus.fingerprint)
    assert IndexInfo.load(target).same_as(info)
    for path in (target, target / "index.json"):
        engine = open_index(path, corpus, "bm25")
        assert engine.info.name == "bm25"
        assert engine.search(["river"], 1)[0].documents[0].id == "d2"
    assert [entry.name for entry in target.parent.iterdir()] == ["bm25"], "nothing unfinished may stay behind"


def test_dense_is_built_and_opened(corpus: Corpus, tiny_bert: Path, tmp_path: Path) -> None:
    options = BuildOptions(model=str(tiny_bert), encoder=EncoderConfig(device="cpu"))
    build_index(corpus, "bge", tmp_path / "index", options)
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == ["bge_Flat.index", "index.json"]
    engine = open_index(tmp_path / "index" / "bge_Flat.index", corpus, "bge")
    assert engine.info.name == "bge" and len(engine.search(["river"], 8)[0].documents) == 8


def test_an_index_for_another_corpus_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    build_index(corpus, "bm25", tmp_path / "index")
    (tmp_path / "other").mkdir()
    other = open_corpus(tmp_path / "other", [*PASSAGES[:-1], ("d7", "Twin", "A twin passage about lighthouses!")])
    with pytest.raises(DataError) as caught:
        open_index(tmp_path / "index", other, "bm25")
    message = str(caught.value)
    assert "was built for another corpus" in message and "\n" not in message
    assert corpus.fingerprint[:12] in message and other.fingerprint[:12] in message and str(other.path) in message


def test_an_index_of_another_retriever_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    build_index(corpus, "bm25", tmp_path / "index")
    with pytest.raises(ConfigError, match="built for retriever 'bm25', but retriever_name='e5'"):
        open_index(tmp_path / "index", corpus, "e5")


@pytest.mark.parametrize("name", ["bm26", "", "E5"])
def test_an_unknown_retriever_is_refused(corpus: Corpus, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected one of bm25, .*e5, bge, minilm"):
        build_index(corpus, name, tmp_path / "index")
    with pytest.raises(ConfigError, match=r"expected one of bm25, .*e5, bge, minilm"):
        open_index(tmp_path, corpus, name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "holds no index.json"),
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"retriever": "bm25", "model": null, "fingerprint": "x", "documents": 8, "format": 99}', "has format 99"),
    ],
)
def test_a_folder_without_a_readable_index_says_how_to_build_one(
    corpus: Corpus, tmp_path: Path, text: str | None, reason: str
) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    if text is not None:
        (folder / "index.json").write_text(text, "utf-8")
    with pytest.raises(DataError, match=rf"{reason}.*python -m verl.retrieval.build"):
        open_index(folder, corpus, "bm25")
    with pytest.raises(DataError, match="no such file or folder"):
        open_index(tmp_path / "nowhere", corpus, "bm25")


def test_the_same_index_is_kept_another_is_only_replaced_when_told(corpus: Corpus, tmp_path: Path) -> None:
    target = tmp_path / "index"
    build_index(corpus, "bm25", target)
    born = target.stat().st_ino
    build_index(corpus, "bm25", target)
    assert target.stat().st_ino == born, "an index that is what was asked for is not built again"
    changed = BuildOptions(bm25=BM25Config(k1=1.2))
    with pytest.raises(ConfigError, match=r"holds another index.*'k1': 0.9.*'k1': 1.2.*--overwrite"):
        build_index(corpus, "bm25", target, changed)
    assert IndexInfo.load(target).settings["k1"] == 0.9
    build_index(corpus, "bm25", target, BuildOptions(bm25=BM25Config(k1=1.2), overwrite=True))
    assert IndexInfo.load(target).settings["k1"] == 1.2 and target.stat().st_ino != born


def test_a_folder_that_holds_something_else_is_never_touched(corpus: Corpus, tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work", "utf-8")
    with pytest.raises(ConfigError, match="holds something that is no index"):
        build_index(corpus, "bm25", target, BuildOptions(overwrite=True))
    assert (target / "thesis.txt").read_text("utf-8") == "years of work"


def test_a_build_that_fails_leaves_nothing(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_index(corpus, "e5", tmp_path / "out" / "index", BuildOptions(model=str(tmp_path / "no model")))
    assert not (tmp_path / "out").exists()


def test_no_threads_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="threads=0; expected at least 1"):
        open_index(tmp_path, corpus, "bm25", threads=0)


@pytest.mark.parametrize(
    "dense",
    [
        {"model": "m"},
        {"search": SearchConfig(nprobe=4)},
        {"encoder": EncoderConfig("cpu")},
        {"encoder_overrides": {"pooling": "cls"}},
    ],
)
def test_options_of_a_dense_index_are_refused_for_another(
    tmp_path: Path, corpus: Corpus, dense: dict[str, Any]
) -> None:
    build_index(corpus, "bm25", tmp_path / "index")
    (option,) = dense
    with pytest.raises(
        ConfigError, match=f"{option}=.* concerns a dense index, and this one is bm25's; leave {option}"
    ):
        open_index(tmp_path / "index", corpus, "bm25", **dense)
    defaults = {"search": SearchConfig(), "encoder": EncoderConfig(), "encoder_overrides": {}}
    assert open_index(tmp_path / "index", corpus, "bm25", **defaults).info.name == "bm25"


def test_a_model_for_bm25_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bm25, which has no model"):
        build_index(corpus, "bm25", tmp_path / "index", BuildOptions(model="intfloat/e5-base-v2"))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"index": IndexConfig("SQ8")}, "index_kind='SQ8'"),
        ({"embedding_path": Path("emb.memmap")}, "embedding_path="),
        ({"save_embedding": True}, "save_embedding=True"),
        ({"encoder_overrides": {"pooling": "cls"}}, "encoder_spec="),
        ({"index": IndexConfig("HNSW"), "target_recall": 0.9}, "index_kind='HNSW'"),
    ],
)
def test_options_of_an_encoder_are_refused_for_bm25(corpus: Corpus, tmp_path: Path, options: dict, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.* was given for bm25, which has no model; leave it out"):
        build_index(corpus, "bm25", tmp_path / "index", BuildOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_recall": 0.9}, "target_recall=0.9 was given for index_kind=Flat, which has nothing to tune"),
        ({"target_recall": 1.2, "index": IndexConfig("HNSW")}, "target_recall=1.2; expected above 0 and at most 1"),
        ({"embedding_path": Path("x"), "save_embedding": True}, "save_embedding was given with embedding_path"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildOptions(**options)


@pytest.fixture
def dense(tiny_bert: Path) -> BuildOptions:
    return BuildOptions(model=str(tiny_bert), encoder=CPU)


def test_vectors_are_kept_when_asked_for_and_used_again(corpus: Corpus, dense: BuildOptions, tmp_path: Path) -> None:
    build_index(corpus, "e5", tmp_path / "first", replace(dense, save_embedding=True))
    vectors = tmp_path / "first.vectors" / "vectors.memmap"
    assert vectors.stat().st_size == 8 * 32 * 4
    taken = replace(dense, embedding_path=vectors)
    build_index(corpus, "e5", tmp_path / "second", taken)
    assert (tmp_path / "second" / "e5_Flat.index").read_bytes() == (tmp_path / "first" / "e5_Flat.index").read_bytes()
    assert not (tmp_path / "second.vectors").exists()
    (tmp_path / "other").mkdir()
    other = open_corpus(tmp_path / "other", PASSAGES[:7])
    with pytest.raises(DataError, match="have 1024 bytes, expected 896 for 7 documents"):
        build_index(other, "e5", tmp_path / "third", taken)
    np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32).tofile(vectors)
    with pytest.raises(ConfigError, match=r"vectors.memmap was built with another encoder"):
        build_index(corpus, "e5", tmp_path / "third", taken)
    assert sorted(path.name for path in tmp_path.iterdir() if "third" in path.name) == []


def test_a_full_disk_is_told_and_the_next_build_goes_on(corpus: Corpus, dense: BuildOptions, tmp_path: Path) -> None:
    """Files may not grow beyond the size of the vectors: these fit, the index with its header does not."""
    target = tmp_path / "index"
    with file_size_limit(8 * 32 * 4), pytest.raises(DataError, match=r"cannot write index .*free some space"):
        build_index(corpus, "e5", target, dense)
    assert sorted(path.name for path in tmp_path.glob("*index*")) == ["index.vectors"]
    born = (tmp_path / "index.vectors" / "vectors.memmap").stat()
    with file_size_limit(8 * 32 * 4), pytest.raises(DataError, match="cannot write index"):
        build_index(corpus, "e5", target, dense)
    again = (tmp_path / "index.vectors" / "vectors.memmap").stat()
    assert (again.st_ino, again.st_mtime_ns) == (born.st_ino, born.st_mtime_ns), "vectors must not be made again"
    build_index(corpus, "e5", target, dense)
    assert sorted(path.name for path in tmp_path.glob("*index*")) == ["index"]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_too_little_room_is_told_before_anything_is_done() -> None:
    layout = lay_out(IndexConfig("Flat"), 1_000_000, 384)
    check_room(layout, 0, encodes=True, free=3_200_000_000, target=Path("x"))
    check_room(layout, 0, encodes=False, free=1_600_000_000, target=Path("x"))
    check_room(layout, 1_500_000_000, encodes=True, free=1_610_000_000, target=Path("x"))
    with pytest.raises(DataError, match=r"building Flat takes 3.1 GB more beside x \(1.54 GB .* and 3 GB are free"):
        check_room(layout, 0, encodes=True, free=3_000_000_000, target=Path("x"))


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_build_leaves_nothing_to_load_and_is_gone_on_with(
    tiny_bert: Path, tmp_path: Path, way: signal.Signals
) -> None:
    corpus = open_corpus(tmp_path, [(f"d{n}", "title", f"text {n} " + "word " * 30) for n in range(2000)])
    target = tmp_path / "index"
    command = [sys.executable, "-m", "verl.retrieval.build", "build", "--retriever_name", "e5", "--device", "cpu"]
    command += ["--corpus_path", str(corpus.path), "--save_dir", str(target), "--retriever_model", str(tiny_bert)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    vectors = tmp_path / "index.vectors" / "vectors.memmap"
    while not (vectors.exists() and vectors.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(way)
    assert process.wait(timeout=60) == {signal.SIGKILL: -9, signal.SIGTERM: 143}[way]
    assert not target.exists() and vectors.exists()
    assert (tmp_path / ".index.building").exists() == (way == signal.SIGKILL)
    options = BuildOptions(model=str(tiny_bert), encoder=CPU)
    build_index(corpus, "e5", target, options)
    build_index(corpus, "e5", tmp_path / "unbroken", options)
    assert (target / "e5_Flat.index").read_bytes() == (tmp_path / "unbroken" / "e5_Flat.index").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*index*")) == ["index"]


def test_two_builds_of_one_index_do_not_meet(corpus: Corpus, tmp_path: Path) -> None:
    target = tmp_path / "index"
    with workplace(target) as folder:
        (folder / "half").touch()
        with pytest.raises(ConfigError, match="is being built by another process; wait"):
            build_index(corpus, "bm25", target)
        assert (folder / "half").exists()
    assert not folder.exists()
    folder.mkdir()
    (folder / "half").touch()
    (folder / "more").mkdir()
    with workplace(target) as folder:
        assert [path.name for path in folder.iterdir()] == ["lock"], "what a killed build left must go"


def test_vectors_of_something_else_are_only_replaced_when_told(
    corpus: Corpus, dense: BuildOptions, tmp_path: Path
) -> None:
    target = tmp_path / "index"
    build_index(corpus, "e5", target, replace(dense, save_embedding=True))
    another = replace(dense, save_embedding=True, encoder_overrides={"pooling": "cls"})
    with pytest.raises(ConfigError, match="holds another index"):
        build_index(corpus, "e5", target, another)
    before = (tmp_path / "index.vectors" / "vectors.memmap").read_bytes()
    build_index(corpus, "e5", target, replace(another, overwrite=True))
    assert (tmp_path / "index.vectors" / "vectors.memmap").read_bytes() != before
    assert IndexInfo.load(target).settings["encoder_pooling"] == "cls"


def test_damaged_vectors_are_begun_anew_when_told(corpus: Corpus, dense: BuildOptions, tmp_path: Path) -> None:
    scratch = tmp_path / "index.vectors"
    scratch.mkdir()
    (scratch / "vectors.json").write_text("{")
    with pytest.raises(DataError, match=r"vectors.json cannot be read"):
        build_index(corpus, "e5", tmp_path / "index", dense)
    build_index(corpus, "e5", tmp_path / "index", replace(dense, overwrite=True))
    assert sorted(path.name for path in tmp_path.glob("*index*")) == ["index"]


def test_vectors_that_fit_are_never_begun_anew(corpus: Corpus, dense: BuildOptions, tmp_path: Path) -> None:
    options = replace(dense, save_embedding=True, overwrite=True)
    build_index(corpus, "e5", tmp_path / "index", options)
    born = (tmp_path / "index.vectors" / "vectors.memmap").stat().st_mtime_ns
    build_index(corpus, "e5", tmp_path / "index", replace(options, index=IndexConfig("SQ8")))
    assert (tmp_path / "index.vectors" / "vectors.memmap").stat().st_mtime_ns == born


def test_a_folder_of_downloads_is_not_deleted(corpus: Corpus, dense: BuildOptions, tmp_path: Path) -> None:
    target = tmp_path / "downloads"
    build_index(corpus, "e5", target, dense)
    (target / "corpus.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds more than an index \(corpus.jsonl\), and --overwrite would delete"):
        build_index(corpus, "e5", target, replace(dense, index=IndexConfig("SQ8"), overwrite=True))
    assert (target / "corpus.jsonl").read_text() == "precious"


def parse(*arguments: str) -> BuildOptions:
    needed = ["--retriever_name", "e5", "--corpus_path", "c", "--save_dir", "s"]
    return build_options(build_parser().parse_args([*needed, *arguments]))


def test_no_flags_are_the_defaults_of_the_dataclasses() -> None:
    assert parse() == BuildOptions()


def test_the_published_flags_work_under_their_names() -> None:
    published = ["--retrieval_method", "bge", "--model_path", "m", "--corpus_path", "c", "--save_dir", "s"]
    published += ["--use_fp16", "--max_length", "180", "--pooling_method", "cls", "--faiss_type", "Flat"]
    published += ["--batch_size", "32", "--save_embedding"]
    args = build_parser().parse_args(published)
    assert args.retriever_name == "bge"
    assert build_options(args) == BuildOptions(
        model="m",
        encoder=EncoderConfig(batch_size=32, dtype="float16"),
        encoder_overrides={"max_length": 180, "pooling": "cls"},
        save_embedding=True,
    )
    assert parse("--embedding_path", "emb_e5.memmap").embedding_path == Path("emb_e5.memmap")


def test_flags_reach_their_options(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("pooling: cls\nquery_prefix: 'ask: '\n")
    assert parse("--index_kind", "ivf-sq8", "--nlist", "64", "--seed", "5").index == IndexConfig(
        "IVF-SQ8", nlist=64, seed=5
    )
    assert parse("--faiss_type", "IVF64,PQ8", "--train_size", "900").index == IndexConfig(
        "IVF-PQ", nlist=64, pq_m=8, train_size=900
    )
    assert parse("--index_kind", "HNSW", "--hnsw_m", "8", "--ef_construction", "50").index == IndexConfig(
        "HNSW", hnsw_m=8, ef_construction=50
    )
    assert parse("--encoder_spec", str(spec), "--encoder_spec", "max_length=64").encoder_overrides == {
        "pooling": "cls",
        "query_prefix": "ask: ",
        "max_length": 64,
    }
    assert parse("--bm25_k1", "1.5", "--bm25_stopwords", "none").bm25 == BM25Config(k1=1.5, stopwords="none")
    assert parse("--lucene_store_documents", "false").lucene == LuceneConfig(store_documents=False)
    assert parse("--index_kind", "IVF-SQ8", "--target_recall", "0.9").target_recall == 0.9
    with pytest.raises(SystemExit):
        parse("--lucene_store_documents", "perhaps")


def test_the_command_line_builds_skips_bad_lines_and_reports_errors(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"id": id, "contents": f'"{title}"\n{text}'}) for id, title, text in PASSAGES]
    path.write_text("\n".join([*rows, "no json"]))
    common = ["--corpus_path", str(path), "--save_dir", str(tmp_path / "index")]
    dense = ["--retriever_name", "e5", "--retriever_model", str(tiny_bert), "--device", "cpu", *common]

    def failing(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "line 9" in failing(*dense)
    assert "index_kind='LSH' is unknown" in failing(*dense, "--index_kind", "LSH")
    assert "nlist=9 exceeds the 8 vectors" in failing(*dense, "--on-error", "skip", "--index_kind", "IVF9,Flat")
    main([*dense, "--on-error", "skip", "--index_kind", "SQfp16"])
    assert [p.name for p in sorted((tmp_path / "index").iterdir())] == ["e5_SQfp16.index", "index.json"]
    (tmp_path / "index" / "index.json").unlink()
    common = ["--corpus_path", str(path), "--on_error", "skip", "--retriever_model", str(tiny_bert), "--device", "cpu"]
    main(["import", "--index_path", str(tmp_path / "index"), "--retriever_name", "e5", *common])
    assert IndexInfo.load(tmp_path / "index").settings["kind"] == "SQfp16"
    assert "has an index.json already" in failing(
        "import", "--index_path", str(tmp_path / "index"), "--retriever_name", "e5", *common
    )


def test_the_engine_analyses_queries_as_the_index_was_built(corpus: Corpus, tmp_path: Path) -> None:
    target = tmp_path / "index"
    build_index(corpus, "bm25", target, BuildOptions(bm25=BM25Config(stemmer="none")))
    assert json.loads((target / "index.json").read_text("utf-8"))["settings"]["stemmer"] == "none"
    assert open_index(target, corpus, "bm25").search(["rivers"], 1)[0].documents == ()


def test_the_script_passes_its_variables_and_arguments_on() -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "index_build" / "build_index.sh"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "echo", "CORPUS_PATH": "a corpus", "SAVE_DIR": "an index"}
    done = subprocess.run(
        ["bash", str(script), "--nlist", "7"], env=environment, capture_output=True, text=True, check=True
    )
    expected = "-m verl.retrieval.build --retriever_name e5 --corpus_path a corpus --save_dir an index --nlist 7\n"
    assert done.stdout == expected
    del environment["SAVE_DIR"]
    failed = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert failed.returncode != 0 and "SAVE_DIR: set it to the folder" in failed.stderr
