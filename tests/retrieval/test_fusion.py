from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.errors import ConfigError, RetrieverError
from verl.retrieval.engine import EngineInfo, as_live
from verl.retrieval.fusion import HybridEngine
from verl.types import Document, SearchResult

CORPUS = "corpus-a"


@dataclass
class Ranked:
    """Knows a ranking of ids for each query; the documents' texts are this corpus's."""

    rankings: Mapping[str, Sequence[str]]
    name: str = "ranked"
    corpus: str = CORPUS
    size: int = 1000
    fault: Exception | None = None
    faults: Mapping[str, RetrieverError] = field(default_factory=dict)
    barrier: threading.Barrier | None = None
    asked: list[tuple[list[str], int]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    closed: int = 0

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(self.name, self.size, self.size, self.corpus, f"{self.name}/{self.corpus}")

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult | RetrieverError]:
        self.asked.append((list(queries), topk))
        self.threads.add(threading.get_ident())
        if self.barrier is not None:
            self.barrier.wait(20)
        if self.fault is not None:
            raise self.fault
        return [self.faults.get(query) or self._result(query, topk) for query in queries]

    def close(self) -> None:
        self.closed += 1

    def _result(self, query: str, topk: int) -> SearchResult:
        ids = self.rankings[query][:topk]
        documents = tuple(Document(id, f"title {id}", f"text {id} of {self.corpus}") for id in ids)
        return SearchResult(query, documents, tuple(1.0 - rank / 1000 for rank in range(len(ids))))


def ranked(ids: str, **options: object) -> Ranked:
    """An engine that answers the query `q` with one document per letter."""
    return Ranked({"q": ids}, **options)  # type: ignore[arg-type]


def fused(engine: HybridEngine, topk: int = 10) -> SearchResult:
    (result,) = engine.search(["q"], topk)
    assert isinstance(result, SearchResult), result
    return result


def ids(result: SearchResult) -> str:
    return "".join(document.id for document in result.documents)


def test_scores_are_the_papers() -> None:
    result = fused(HybridEngine([ranked("abc"), ranked("bd")]))
    assert ids(result) == "badc"
    assert result.scores == pytest.approx([1 / 61 + 1 / 62, 1 / 61, 1 / 62, 1 / 63], rel=1e-15)
    assert result.query == "q"


def test_weights_and_k_count() -> None:
    result = fused(HybridEngine([ranked("ab"), ranked("ba")], weights=[3, 1], k=0))
    assert ids(result) == "ab"
    assert result.scores == pytest.approx([3 / 1 + 1 / 2, 3 / 2 + 1 / 1])


def test_mirrored_ranks_are_a_tie_and_come_in_the_order_of_their_ids() -> None:
    rankings = ["cab", "abc", "bca"]  # every document once first, once second, once third
    result = fused(HybridEngine([ranked(each) for each in rankings]))
    assert ids(result) == "abc" and len(set(result.scores)) == 1


def test_a_document_that_an_engine_names_twice_counts_at_its_better_rank() -> None:
    result = fused(HybridEngine([ranked("aab"), ranked("b")]))
    assert ids(result) == "ba" and result.scores == pytest.approx([1 / 61 + 1 / 63, 1 / 61])


@given(
    rankings=st.lists(st.permutations("abcdefgh").map(lambda each: each[:5]), min_size=2, max_size=4),
    weights=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    depth=st.integers(1, 6),
)
def test_against_exact_arithmetic(rankings: list[list[str]], weights: list[int], depth: int) -> None:
    engines = [ranked("".join(each)) for each in rankings]
    hybrid = HybridEngine(engines, [float(weight) for weight in weights[: len(engines)]], k=60, depth=depth)
    exact: dict[str, Fraction] = {}
    for weight, ranking in zip(weights, rankings, strict=False):
        for rank, id in enumerate(ranking[:depth], start=1):
            exact[id] = exact.get(id, Fraction(0)) + Fraction(weight / (60 + rank))
    expected = sorted(exact, key=lambda id: (-float(exact[id]), id))
    whole = fused(hybrid, depth)
    assert ids(whole) == "".join(expected[:depth])
    for topk in range(1, depth + 1):
        head = fused(hybrid, topk)
        assert (head.documents, head.scores) == (whole.documents[:topk], whole.scores[:topk])
    hybrid.close()


def test_every_engine_is_asked_for_the_same_whatever_topk_is() -> None:
    deep, shallow = ranked("abc"), ranked("abc", size=2)
    hybrid = HybridEngine([deep, shallow], depth=50)
    for topk in (1, 50):
        fused(hybrid, topk)
    assert deep.asked == [(["q"], 50)] * 2 and shallow.asked == [(["q"], 2)] * 2
    assert hybrid.info.max_topk == 50
    with pytest.raises(RetrieverError, match="topk=51 exceeds hybrid's most, 50 documents"):
        hybrid.search(["q"], 51)
    with pytest.raises(RetrieverError, match="expected at least 1"):
        hybrid.search(["q"], 0)


def test_engines_search_at_the_same_time_each_always_in_its_own_thread() -> None:
    barrier = threading.Barrier(2)
    engines = [ranked("a", barrier=barrier), ranked("b", barrier=barrier)]
    hybrid = HybridEngine(engines)
    for _ in range(3):
        fused(hybrid)
    assert [len(engine.threads) for engine in engines] == [1, 1]
    assert engines[0].threads != engines[1].threads


def test_queries_keep_their_order_and_do_not_meet() -> None:
    left = Ranked({"one": "ab", "two": "cd"})
    right = Ranked({"one": "ba", "two": "d"})
    one, two = HybridEngine([left, right]).search(["one", "two"], 5)
    assert isinstance(one, SearchResult) and isinstance(two, SearchResult)
    assert (one.query, ids(one), two.query, ids(two)) == ("one", "ab", "two", "dc")


# --- several corpora ---


def test_documents_of_one_corpus_are_told_apart_by_id_even_if_an_engine_spells_them_otherwise() -> None:
    class Shouting(Ranked):
        def _result(self, query: str, topk: int) -> SearchResult:
            result = super()._result(query, topk)
            loud = tuple(Document(each.id, each.title, each.text.upper()) for each in result.documents)
            return SearchResult(query, loud, result.scores)

    result = fused(HybridEngine([ranked("ab"), Shouting({"q": "ba"})]))
    assert ids(result) == "ab" and result.documents[0].text == "text a of corpus-a"


def test_one_id_in_two_corpora_is_two_documents_unless_all_of_it_is_equal() -> None:
    apart = HybridEngine([ranked("ab"), ranked("a", corpus="corpus-b")])
    result = fused(apart)
    assert [document.text for document in result.documents] == [
        "text a of corpus-a",
        "text a of corpus-b",
        "text b of corpus-a",
    ]
    assert result.scores == pytest.approx([1 / 61, 1 / 61, 1 / 62])

    class Copy(Ranked):
        @property
        def info(self) -> EngineInfo:
            return EngineInfo("copy", 7, 7, "corpus-b", "copy")

    together = fused(HybridEngine([ranked("ab"), Copy({"q": "ca"})]))
    assert ids(together) == "acb" and together.scores[0] == pytest.approx(1 / 61 + 1 / 62)


def test_what_the_hybrid_says_about_itself() -> None:
    info = HybridEngine([ranked("a", name="bm25"), ranked("b", name="e5")], [2, 1], k=10, depth=5).info
    assert (info.name, info.documents, info.max_topk, info.corpus) == ("hybrid", 1000, 5, CORPUS)
    assert info.details["engines"] == "bm25 + e5" and info.details["weights"] == "2 1"
    mixed = HybridEngine([ranked("a"), ranked("b", corpus="corpus-b")]).info
    assert mixed.documents is None and mixed.corpus not in ("", CORPUS, "corpus-b")
    assert HybridEngine([ranked("a", corpus=""), ranked("b", corpus="")]).info.corpus == ""


def test_the_fingerprint_covers_everything_that_decides_a_result() -> None:
    variants = [
        HybridEngine([ranked("a"), ranked("b")]),
        HybridEngine([ranked("a"), ranked("b", name="other")]),
        HybridEngine([ranked("a", name="other"), ranked("b")]),
        HybridEngine([ranked("a"), ranked("b"), ranked("c")]),
        HybridEngine([ranked("a"), ranked("b")], weights=[1, 2]),
        HybridEngine([ranked("a"), ranked("b")], k=61),
        HybridEngine([ranked("a"), ranked("b")], depth=99),
        HybridEngine([ranked("a"), ranked("b")], require_all=False),
    ]
    assert len({variant.info.fingerprint for variant in variants}) == len(variants)
    assert variants[0].info.fingerprint == HybridEngine([ranked("x"), ranked("y")]).info.fingerprint


# --- live ---


class Live(Ranked):
    """Is asked for single queries; `search` is for the other way alone."""

    live = True

    async def answer(self, query: str, topk: int) -> SearchResult | RetrieverError:
        (result,) = self.search([query], topk)
        return result


def test_a_hybrid_is_live_where_one_of_its_engines_is() -> None:
    assert as_live(HybridEngine([ranked("a"), ranked("b")])) is None
    hybrid = HybridEngine([ranked("a"), Live({"q": "b"})])
    assert as_live(hybrid) is hybrid


async def test_single_queries_get_what_a_search_gives() -> None:
    rankings = {"one": "abc", "two": "bca", "bad": "ab"}
    index, web = Ranked(rankings), Live(rankings, "web", faults={"bad": RetrieverError("status 500")})
    hybrid = HybridEngine([index, web], [2, 1], depth=2)
    expected = hybrid.search(["one", "two", "bad"], 2)
    answers = await asyncio.gather(*(hybrid.answer(query, 2) for query in ("one", "two", "bad")))
    assert answers[:2] == expected[:2] and str(answers[2]) == str(expected[2]) == "hybrid: web: status 500"
    assert index.asked[1:] == [(["one", "two", "bad"], 2)] and len(index.threads) == 1
    assert web.asked[1:] == [(["one"], 2), (["two"], 2), (["bad"], 2)]
    with pytest.raises(RetrieverError, match="topk=3 exceeds"):
        await hybrid.answer("one", 3)


async def test_an_index_that_fails_a_batch_fails_its_queries() -> None:
    broken = ranked("b", fault=RetrieverError("no such shard"))
    hybrid = HybridEngine([broken, Live({"q": "a"}, "web")])
    assert str(await hybrid.answer("q", 1)) == "hybrid: ranked: no such shard"
    broken.fault = ZeroDivisionError("index on fire")
    with pytest.raises(ZeroDivisionError, match="index on fire"):
        await hybrid.answer("q", 1)


# --- faults ---


def test_an_engine_that_fails_for_a_query_fails_that_query_alone() -> None:
    rankings = {"good": "ab", "bad": "ab"}
    broken = Ranked(rankings, "web", faults={"bad": RetrieverError("status 500")})
    good, bad = HybridEngine([Ranked(rankings), broken]).search(["good", "bad"], 2)
    assert isinstance(good, SearchResult)
    assert isinstance(bad, RetrieverError) and str(bad) == "hybrid: web: status 500"


def test_an_engine_that_fails_altogether_fails_every_query() -> None:
    hybrid = HybridEngine([ranked("ab"), ranked("b", name="web", fault=RetrieverError("no network"))])
    assert [str(answer) for answer in hybrid.search(["q", "q"], 2)] == ["hybrid: web: no network"] * 2
    assert hybrid.partial == 0


def test_without_require_all_the_others_are_fused_and_that_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    broken = ranked("b", name="web", fault=RetrieverError("no network"))
    hybrid = HybridEngine([ranked("ab"), broken], require_all=False)
    assert ids(fused(hybrid)) == "ab" and hybrid.partial == 1
    assert "fused without web: no network" in caplog.text
    (answer,) = HybridEngine([broken, broken], require_all=False).search(["q"], 2)
    assert str(answer) == "hybrid: web: no network; web: no network"


def test_a_fault_of_the_program_is_raised_after_all_have_come_back() -> None:
    barrier = threading.Barrier(2)
    other = ranked("a", barrier=barrier)
    hybrid = HybridEngine([ranked("b", fault=ZeroDivisionError("index on fire"), barrier=barrier), other])
    with pytest.raises(ZeroDivisionError, match="index on fire"):
        hybrid.search(["q"], 1)
    assert len(other.asked) == 1


def test_an_engine_that_loses_a_query_is_found_out() -> None:
    class Forgetful(Ranked):
        def search(self, queries: Sequence[str], topk: int) -> list[SearchResult | RetrieverError]:
            return super().search(queries[1:], topk)

    with pytest.raises(RetrieverError, match="forgetful gave 1 results for 2 queries"):
        HybridEngine([ranked("a"), Forgetful({"q": "a"}, "forgetful")]).search(["q", "q"], 1)


def test_closing_closes_every_engine_even_if_one_cannot() -> None:
    class Stuck(Ranked):
        def close(self) -> None:
            super().close()
            raise OSError("stuck")

    engines = [ranked("a"), Stuck({"q": "b"}), ranked("c")]
    with pytest.raises(OSError, match="stuck"):
        HybridEngine(engines).close()
    assert [engine.closed for engine in engines] == [1, 1, 1]


# --- opening ---


def test_engines_are_opened_searched_and_closed_each_in_one_thread() -> None:
    together = threading.Barrier(2)
    used: dict[str, set[int]] = {"left": set(), "right": set()}

    class Noting(Ranked):
        def search(self, queries: Sequence[str], topk: int) -> list[SearchResult | RetrieverError]:
            used[self.name].add(threading.get_ident())
            return super().search(queries, topk)

        def close(self) -> None:
            used[self.name].add(threading.get_ident())

    def opener(name: str) -> Callable[[], Ranked]:
        def open_() -> Ranked:
            together.wait(20)
            used[name].add(threading.get_ident())
            return Noting({"q": "ab"}, name)

        return open_

    hybrid = HybridEngine.open([opener("left"), opener("right")], [2, 1], depth=7)
    assert ids(fused(hybrid, 2)) == "ab" and hybrid.info.max_topk == 7
    hybrid.close()
    assert len(used["left"]) == len(used["right"]) == 1 and used["left"] != used["right"]
    assert threading.get_ident() not in used["left"] | used["right"]


def test_an_engine_that_cannot_be_opened_closes_the_others() -> None:
    good = ranked("a")

    def broken() -> Ranked:
        raise ConfigError("no such index")

    with pytest.raises(ConfigError, match="no such index"):
        HybridEngine.open([lambda: good, broken])
    with pytest.raises(ConfigError, match="depth=0"):
        HybridEngine.open([lambda: good, lambda: good], depth=0)
    assert good.closed == 3


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"weights": [1]}, "1 weights for 2 engines"),
        ({"weights": [1, 0]}, "numbers above 0"),
        ({"weights": [1, -1]}, "numbers above 0"),
        ({"weights": [1, float("nan")]}, "numbers above 0"),
        ({"weights": [1, float("inf")]}, "numbers above 0"),
        ({"k": -1}, "k=-1"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_a_wrong_fusion_is_refused(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        HybridEngine([ranked("a"), ranked("b")], **wrong)  # type: ignore[arg-type]


def test_fewer_than_two_engines_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least two"):
        HybridEngine([ranked("a")])
