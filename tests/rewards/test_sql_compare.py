"""Whether two results are the same, by each comparison, and what is read off a statement."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.rewards.sql_compare import Row, same, same_up_to_columns
from verl.rewards.sql_text import joined_comparisons, orders, pieces, without_distinct

# gold, other, multiset, multiset ordered, bird, spider, spider ordered
RESULTS: list[tuple[list[Row], list[Row], bool, bool, bool, bool, bool]] = [
    ([(1,), (2,)], [(1,), (2,)], True, True, True, True, True),
    ([(1,), (2,)], [(2,), (1,)], True, False, True, True, False),
    ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False, True, False, False),
    ([(1,), (1,)], [(1,)], False, False, True, False, False),
    ([(1, "a")], [("a", 1)], False, False, False, True, True),
    ([(1, "a"), (2, "b")], [("b", 2), ("a", 1)], False, False, False, True, False),
    ([(1, 2), (2, 1)], [(1, 1), (2, 2)], False, False, False, False, False),
    ([(1, 2), (3, 4)], [(2, 1), (3, 4)], False, False, False, False, False),
    ([(1, 1, 2)], [(1, 2, 2)], False, False, False, False, False),
    ([(1,)], [(1, 1)], False, False, False, False, False),
    ([], [], True, True, True, True, True),
    ([], [(None,)], False, False, False, False, False),
    ([(None,)], [(None,)], True, True, True, True, True),
    ([(None,)], [(0,)], False, False, False, False, False),
    ([(None,)], [("",)], False, False, False, False, False),
    ([(1,)], [(1.0,)], True, True, True, True, True),
    ([(1,)], [("1",)], False, False, False, False, False),
    ([(b"a",)], [("a",)], False, False, False, False, False),
    ([("a",)], [("A",)], False, False, False, False, False),
    ([(0.1 + 0.2,)], [(0.3,)], True, True, False, False, False),
    ([(1e9,)], [(1e9 + 1,)], True, True, False, False, False),
    ([(1.0,)], [(1.00001,)], False, False, False, False, False),
    ([(3,)], [(3.0000000001,)], True, True, False, False, False),
    ([(float("inf"),)], [(float("inf"),)], True, True, True, True, True),
    ([(float("inf"),)], [(1e308,)], False, False, False, False, False),
    ([(10**400,)], [(1.5,)], False, False, False, False, False),
    # Rows that sort differently for the noise in their first number.
    ([(1.0, 2.0), (1.0 + 1e-12, 1.0)], [(1.0 + 1e-12, 2.0), (1.0, 1.0)], True, True, False, False, False),
    ([(1.0, "b"), (1.0 + 1e-12, "a")], [(1.0, "a"), (1.0 + 1e-12, "b")], True, False, False, False, False),
]


@pytest.mark.parametrize(("gold", "rows", "multiset", "ordered", "bird", "spider", "spider_ordered"), RESULTS)
def test_comparisons(
    gold: list[Row], rows: list[Row], multiset: bool, ordered: bool, bird: bool, spider: bool, spider_ordered: bool
) -> None:
    for one, other in ((gold, rows), (rows, gold)):
        assert same(one, other, "multiset", False) is multiset
        assert same(one, other, "multiset", True) is ordered
        assert same(one, other, "bird", False) is same(one, other, "bird", True) is bird
        assert same(one, other, "spider", False) is spider
        assert same(one, other, "spider", True) is spider_ordered


def test_the_tolerance_is_what_was_asked_for() -> None:
    assert same([(1.0,)], [(1.01,)], "multiset", False, tolerance=0.02)
    assert not same([(1.0,)], [(1.01,)], "multiset", False, tolerance=0.001)
    assert not same([(0.1 + 0.2,)], [(0.3,)], "multiset", False, tolerance=0.0)


CELLS = st.sampled_from([None, 0, 1, 2, 1.5, "", "a", "b", b"a"])
TABLES = st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[CELLS] * width), min_size=1, max_size=5))


def brute_force(gold: list[Row], rows: list[Row], ordered: bool) -> bool:
    """Try every permutation of the columns, as Spider's definition says it."""
    if len(gold) != len(rows) or len(gold[0]) != len(rows[0]):
        return False
    for order in itertools.permutations(range(len(gold[0]))):
        moved = [tuple(row[at] for at in order) for row in rows]
        if moved == gold if ordered else Counter(moved) == Counter(gold):
            return True
    return False


@settings(max_examples=150, deadline=None)
@given(TABLES, TABLES, st.randoms(use_true_random=False), st.booleans())
def test_spider_is_its_definition(gold: list[Row], other: list[Row], draw: object, ordered: bool) -> None:
    width = list(range(len(gold[0])))
    draw.shuffle(width)  # type: ignore[attr-defined]
    moved = [tuple(row[at] for at in width) for row in gold]
    if not ordered:
        draw.shuffle(moved)  # type: ignore[attr-defined]
    assert same(gold, moved, "spider", ordered)
    assert same(gold, other, "spider", ordered) is brute_force(gold, other, ordered)


@settings(max_examples=100, deadline=None)
@given(TABLES, TABLES)
def test_a_multiset_without_tolerance_is_a_counter(gold: list[Row], other: list[Row]) -> None:
    assert same(gold, other, "multiset", False, tolerance=0.0) is (Counter(gold) == Counter(other))
    assert same(gold, gold[::-1], "multiset", False)


def test_columns_that_are_alike_take_no_factorial() -> None:
    wide = [tuple(range(row, row + 12)) for row in range(12)]
    turned = [tuple((cell * 5) % 23 for cell in row) for row in wide]
    assert same_up_to_columns(wide, [row[::-1] for row in wide], ordered=False)
    assert not same_up_to_columns(wide, turned, ordered=False)
    latin = [tuple((row + column) % 9 for column in range(9)) for row in range(9)]
    other = [tuple((2 * row + column) % 9 for column in range(9)) for row in range(9)]
    assert same_up_to_columns(latin, other, ordered=False), "2 row runs through all rows: the same bag"
    assert not same_up_to_columns(latin, other, ordered=True)


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a", True),
        ("SELECT a FROM t ORDER/* by */BY a", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1 LIMIT 3", True),
        ("WITH x AS (SELECT 1 ORDER BY 1) SELECT * FROM x ORDER BY 1", True),
        ("SELECT (SELECT 1) ORDER BY 1", True),
        ("SELECT '(' ORDER BY 1", True),
        ("SELECT ')' , \"(\", `(`, [(] FROM t ORDER BY 1", True),
        ("SELECT 'it''s (' FROM t ORDER BY 1", True),
        ("SELECT a FROM t", False),
        ("SELECT * FROM (SELECT a FROM t ORDER BY a)", False),
        ("WITH x AS (SELECT 1 ORDER BY 1) SELECT * FROM x", False),
        ("SELECT rank() OVER (PARTITION BY b ORDER BY a) FROM t", False),
        ("SELECT group_concat(a ORDER BY a) FROM t", False),
        ("SELECT 'order by' FROM t", False),
        ('SELECT "ORDER BY 1" FROM t', False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT a FROM t /* ORDER BY a", False),
        ("SELECT reorder by FROM t", False),
        ("SELECT orders, by FROM t", False),
        ("SELECT 'ORDER' 'BY'", False),
        ("", False),
        (")) ORDER BY", True),
        ("'open ORDER BY a", False),
    ],
)
def test_a_result_is_ordered_by_the_outermost_order_alone(sql: str, expected: bool) -> None:
    assert orders(sql) is expected


def test_distinct_and_spaced_comparisons() -> None:
    sql = "SELECT DISTINCT a, count(distinct b), 'DISTINCT', \"distinct\" FROM t -- distinct"
    assert without_distinct(sql) == "SELECT  a, count( b), 'DISTINCT', \"distinct\" FROM t -- distinct"
    assert joined_comparisons("a > = 1 AND b < = 2 AND c ! = 3") == "a >= 1 AND b <= 2 AND c != 3"


SCRAPS = ["'", '"', "`", "[", "]", "--", "/*", "*/", "(", ")", "ORDER ", "BY "]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(max_size=8) | st.sampled_from(["'", '"', "`", "[", "]", "--", "/*", "*/", "(", ")", "ORDER ", "BY "])
    )
)
def test_tokens_lose_nothing(scraps: list[str]) -> None:
    sql = "".join(scraps)
    assert "".join(text for _, text in pieces(sql)) == sql
    assert orders(sql) in (True, False)
