from __future__ import annotations

import pytest

from verl.errors import ConfigError
from verl.retrieval.index_kinds import (
    KINDS,
    IndexConfig,
    IndexLayout,
    adjusted,
    default_nlist,
    default_nprobe,
    lay_out,
    parse_kind,
)


@pytest.mark.parametrize(
    ("rows", "nlist"),
    [
        (1, 1),
        (8, 1),
        (79, 1),
        (80, 2),  # 4 * sqrt(80) = 36, but 40 vectors are wanted in each cluster
        (10_000, 128),  # 400, and 10,000 / 40 = 250
        (50_000, 1024),  # 894
        (1_000_000, 4096),  # 4,000
        (21_015_324, 16_384),  # 18,337
    ],
)
def test_clusters_are_four_root_n_as_a_power_of_two(rows: int, nlist: int) -> None:
    assert default_nlist(rows) == nlist


def test_an_untuned_search_probes_one_cluster_in_64() -> None:
    assert [default_nprobe(nlist) for nlist in (1, 16, 1024, 4096, 16_384)] == [1, 16, 32, 64, 256]


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("flat", IndexConfig("Flat")),
        ("sq8", IndexConfig("SQ8")),
        ("fp16", IndexConfig("SQfp16")),
        ("SQfp16", IndexConfig("SQfp16")),
        ("ivf-sq8", IndexConfig("IVF-SQ8")),
        ("HNSW-Flat", IndexConfig("HNSW")),
        ("IVF4096,Flat", IndexConfig("IVF-Flat", nlist=4096)),
        ("IVF4096,SQ8", IndexConfig("IVF-SQ8", nlist=4096)),
        ("IVF256,PQ96", IndexConfig("IVF-PQ", nlist=256, pq_m=96)),
        ("IVF256,PQ96x8", IndexConfig("IVF-PQ", nlist=256, pq_m=96)),
        ("IVF256,PQ96x8np", IndexConfig("IVF-PQ", nlist=256, pq_m=96)),
        ("HNSW16", IndexConfig("HNSW", hnsw_m=16)),
        ("HNSW64,Flat", IndexConfig("HNSW", hnsw_m=64)),
    ],
)
def test_kinds_go_by_our_names_and_by_those_of_faiss(text: str, config: IndexConfig) -> None:
    assert parse_kind(text) == config


@pytest.mark.parametrize("text", ["", "IVF", "IVF4096", "IVF4096,PQ96x4", "LSH", "OPQ16,IVF256,PQ16", "Flat "])
def test_an_unknown_kind_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"index_kind='.*' is unknown; expected one of Flat, SQ8, .*IVF4096,SQ8"):
        parse_kind(text)


def test_numbers_may_be_given_beside_a_kind_but_not_against_it() -> None:
    assert adjusted(parse_kind("IVF-SQ8"), nlist=64, seed=None) == IndexConfig("IVF-SQ8", nlist=64)
    assert adjusted(parse_kind("IVF64,SQ8"), nlist=64).nlist == 64
    with pytest.raises(ConfigError, match="nlist=128 was given, but the index_kind says 64; leave one of them out"):
        adjusted(parse_kind("IVF64,SQ8"), nlist=128)
    with pytest.raises(ConfigError, match="hnsw_m=8 was given, but the index_kind says 16"):
        adjusted(parse_kind("HNSW16"), hnsw_m=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "LSH"}, "index_kind='LSH' is unknown"),
        ({"kind": "IVF-Flat", "nlist": 0}, "nlist=0; expected at least 1"),
        ({"kind": "HNSW", "hnsw_m": 1}, "hnsw_m=1; expected at least 2"),
        ({"kind": "Flat", "nlist": 4}, "nlist=4 was given for index_kind=Flat, which has none"),
        ({"kind": "IVF-SQ8", "pq_m": 4}, "pq_m=4 was given for index_kind=IVF-SQ8"),
        ({"kind": "HNSW", "train_size": 4}, "train_size=4 was given for index_kind=HNSW"),
    ],
)
def test_a_number_that_does_not_fit_the_kind_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IndexConfig(**settings)


@pytest.mark.parametrize(
    ("config", "rows", "width", "message"),
    [
        (IndexConfig("IVF-Flat", nlist=9), 8, 32, "nlist=9 exceeds the 8 vectors; leave it out for 1"),
        (IndexConfig("IVF-PQ"), 255, 32, "IVF-PQ needs at least 256 documents, there are 255; build Flat"),
        (IndexConfig("IVF-PQ", pq_m=10), 1000, 32, "pq_m=10 does not divide the vectors' width 32.*--pq_m 8"),
        (IndexConfig("IVF-SQ8", nlist=64, train_size=50), 1000, 32, "train_size=50 is too small.*at least 64"),
        (IndexConfig("IVF-PQ", nlist=4, train_size=50), 1000, 32, "train_size=50 is too small.*at least 256"),
    ],
)
def test_too_few_vectors_or_a_wrong_width_are_refused(config: IndexConfig, rows: int, width: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lay_out(config, rows, width)


def test_wiki_18_is_laid_out_as_documented() -> None:
    layouts = {kind: lay_out(IndexConfig(kind), 21_015_324, 768) for kind in KINDS}
    assert [layout.factory for layout in layouts.values()] == [
        "Flat",
        "SQ8",
        "SQfp16",
        "IVF16384,Flat",
        "IVF16384,SQ8",
        "IVF16384,PQ192x8np",
        "HNSW32,Flat",
    ]
    assert layouts["Flat"].index_bytes == 21_015_324 * 768 * 4
    assert layouts["IVF-SQ8"].index_bytes == 21_015_324 * (768 + 8) + 16_384 * 768 * 4
    assert layouts["IVF-SQ8"].train_rows == 40 * 16_384
    assert layouts["SQ8"].train_rows == 65_536 and layouts["Flat"].train_rows == 0


def test_the_training_sample_is_bounded_in_bytes_unless_it_is_given() -> None:
    big = lay_out(IndexConfig("IVF-Flat", nlist=65_536), 100_000_000, 1024)
    assert big.train_rows == (2 << 30) // (4 * 1024) < 40 * 65_536
    assert lay_out(IndexConfig("IVF-Flat", nlist=64, train_size=5000), 10_000, 8).train_rows == 5000
    assert lay_out(IndexConfig("IVF-Flat", nlist=64, train_size=5000), 4000, 8).train_rows == 4000


def test_settings_name_what_decides_the_index() -> None:
    assert IndexConfig("Flat").settings(1000) == {"kind": "Flat"}
    assert IndexConfig("HNSW", hnsw_m=16).settings(9) == {"kind": "HNSW", "hnsw_m": 16, "ef_construction": 200}
    assert IndexConfig("IVF-PQ", seed=3).settings(1_000_000) == {
        "kind": "IVF-PQ",
        "nlist": 4096,
        "pq_m": "width/4",
        "seed": 3,
    }
    assert IndexConfig("SQ8", train_size=300).settings(1000) == {"kind": "SQ8", "train_size": 300, "seed": 0}


def test_a_layout_of_pq_counts_its_books() -> None:
    layout = IndexLayout("IVF-PQ", 1000, 32, 4, 8, 0, 0, 1000, 0)
    assert layout.index_bytes == 1000 * (8 + 8) + 4 * 32 * (4 + 256)
