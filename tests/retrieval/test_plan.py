from __future__ import annotations

from pathlib import Path

import pytest

from tests.retrieval.support import write_corpus
from verl.errors import ConfigError
from verl.retrieval.build import main
from verl.retrieval.calibrate import Rates, calibrate
from verl.retrieval.index_kinds import KINDS, IndexConfig, lay_out
from verl.retrieval.plan import Estimate, choose, estimate, estimate_all, format_time, parse_size, table

WIKI, WIDTH = 21_015_324, 768
RATES = Rates()


def wiki() -> list[Estimate]:
    return estimate_all(IndexConfig(), WIKI, WIDTH, RATES)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64GB", 64e9), ("24GiB", 24 * 2**30), ("1.5 TB", 1.5e12), ("500mb", 5e8), ("4x24GB", 96e9), (" 2KiB ", 2048)],
)
def test_sizes_are_read_with_their_unit(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "64", "64G", "GB", "-4GB", "64 GB of it", "1e3GB"])
def test_a_size_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected for example 64GB, 24GiB or 4x24GB"):
        parse_size(text)


def test_wiki_18_takes_what_is_known_of_it() -> None:
    by_kind = {item.layout.kind: item for item in wiki()}
    assert list(by_kind) == list(KINDS)
    flat = by_kind["Flat"]
    assert flat.disk == WIKI * WIDTH * 4  # the published file has these bytes and a header
    assert flat.gpu == flat.disk / 2
    assert [kind for kind in KINDS if by_kind[kind].gpu is None] == ["SQ8", "SQfp16", "HNSW"]
    assert flat.build_ram < 3e9, "flat files are written without being in memory"
    assert by_kind["IVF-SQ8"].serve_ram == pytest.approx(1.5e9 + WIKI * 776 + 16_384 * WIDTH * 4)
    assert by_kind["IVF-SQ8"].build_ram > by_kind["IVF-SQ8"].disk
    assert flat.query_s == pytest.approx(WIKI * WIDTH / 8e9)
    # 256 of 16,384 clusters are searched: a 64th of the byte codes, and all centroids.
    assert by_kind["IVF-SQ8"].query_s == pytest.approx(WIKI * WIDTH / 64 / 10e9 + 16_384 * WIDTH / 8e9)


def test_build_time_is_clustering_adding_and_the_disk() -> None:
    layout = lay_out(IndexConfig("IVF-Flat", nlist=100), 10_000, 10)
    rates = Rates(flops=1e6, disk_bytes=1e5)
    # training: 10 rounds over 10,000 vectors, then one to add them; 100 clusters of 10 numbers
    clustering = 2 * 100 * 10 * (10 * 10_000 + 10_000) / 1e6
    assert estimate(layout, rates).build_s == pytest.approx(clustering + (4 * 100_000 + layout.index_bytes) / 1e5)


@pytest.mark.parametrize(
    ("ram", "gpu", "kind", "device", "reason"),
    [
        ("64GB", "2x24GB", "Flat", "gpu", "exact search, and 32.3 GB in half precision fit 48.0 GB of GPU"),
        ("64GB", "24GB", "IVF-SQ8", "cpu", "Flat takes 66.1 GB; byte codes lose little, and 17.9 GB fit 64.0 GB"),
        ("256GB", None, "IVF-SQ8", "cpu", "Flat takes 2 s per query; byte codes lose little"),
        ("16GB", None, "IVF-PQ", "cpu", "IVF-SQ8 does not fit, and 5.8 GB fit 16.0 GB"),
        ("4GB", None, "IVF-PQ", "cpu", "nothing fits 4.0 GB"),
    ],
)
def test_the_choice_for_wiki_18_follows_the_machine(
    ram: str, gpu: str | None, kind: str, device: str, reason: str
) -> None:
    choice = choose(wiki(), parse_size(ram), parse_size(gpu) if gpu else 0.0, threads=1)
    assert (choice.kind, choice.device) == (kind, device)
    assert reason in choice.reason


def test_threads_and_size_decide_whether_flat_is_fast_enough() -> None:
    million = estimate_all(IndexConfig(), 4_000_000, 384, RATES)
    assert choose(million, 64e9, 0, threads=1).kind == "IVF-SQ8"  # 0.19 s per query
    assert choose(million, 64e9, 0, threads=2).kind == "Flat"
    few = estimate_all(IndexConfig(), 100, 384, RATES)
    assert [item.layout.kind for item in few] == [kind for kind in KINDS if kind != "IVF-PQ"]
    assert choose(few, 2e9, 0, threads=1).kind == "Flat"


def test_the_table_has_a_line_for_each_kind() -> None:
    lines = table(wiki()).splitlines()
    assert lines[0].split() == [
        "kind",
        "parameters",
        "RAM",
        "serve",
        "RAM",
        "build",
        "disk",
        "GPU",
        "build",
        "queries/s",
    ]
    assert [line.split()[0] for line in lines[1:]] == list(KINDS)
    assert " ".join(lines[1].split()[1:]) == "- 66.1 GB 1.8 GB 64.6 GB 32.3 GB 4 min 0.5"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (5.4, "5 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_times_are_told_in_their_unit(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_a_calibration_measures_every_rate() -> None:
    rates = calibrate(64, IndexConfig(hnsw_m=8, ef_construction=20))
    assert rates.measured
    for name in ("flops", "flat_numbers", "half_numbers", "byte_numbers", "graph_numbers"):
        assert 1e6 < getattr(rates, name) < 1e14, name


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["plan", *arguments])
    return capsys.readouterr().out


def test_the_command_line_says_where_its_numbers_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--documents", str(WIKI), "--width", "768", "--ram", "64GB", "--threads", "1"]
    printed = plan(capsys, *size, "--gpu", "24GB", "--no_calibration")
    assert "21,015,324 documents, vectors of 768 numbers, 1 threads" in printed
    assert "take IVF-SQ8 on the cpu: Flat takes 66.1 GB" in printed
    assert "from constants, not of this machine" in printed
    assert "at a speed that was not measured; its vectors take 64.6 GB of disk" in printed
    assert "about 5.8 h at 1000 documents/s" in plan(capsys, *size, "--no_calibration", "--documents_per_s", "1000")


def test_a_corpus_and_an_encoder_are_measured(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    encoder = ["--retriever_model", str(tiny_bert), "--device", "cpu"]
    printed = plan(capsys, "--corpus", str(corpus), "--ram", "8GB", *encoder)
    assert "8 documents, vectors of 32 numbers" in printed and "documents/s; its vectors" in printed
    assert "from a short measurement on this machine" in printed and "take Flat on the cpu" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ram", "8GB"], "plan needs either --corpus_path or --documents"),
        (["--ram", "8GB", "--documents", "9", "--corpus", "x"], "plan needs either"),
        (["--ram", "8GB", "--documents", "0", "--width", "8"], "documents=0; expected at least 1"),
        (["--ram", "8", "--documents", "9", "--width", "8"], "size '8'; expected for example 64GB"),
        (["--ram", "8GB", "--documents", "9", "--retriever_model", "no/where"], "or pass --width, the numbers"),
        (["--ram", "8GB", "--corpus", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_wrong_input_is_an_error_of_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
