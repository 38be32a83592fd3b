"""Boolean queries: their grammar against hand-made trees, and their meaning against Python's own operators."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.retrieval.lucene_query import Clauses, Node, Phrase, QuerySyntaxError, Words, parse


def both(*nodes: Node) -> Clauses:
    return Clauses(must=nodes)


def either(*nodes: Node) -> Clauses:
    return Clauses(should=nodes)


A, B, C, D = (Words(letter) for letter in "abcd")


@pytest.mark.parametrize(
    ("query", "tree"),
    [
        ("a", A),
        ("  heat   pump ", Words("heat pump")),
        ("a AND b", both(A, B)),
        ("a OR b AND c", either(A, both(B, C))),
        ("a AND b OR c", either(both(A, B), C)),
        ("(a OR b) AND c", both(either(A, B), C)),
        ("a b AND c d", both(Words("a b"), Words("c d"))),
        ("a NOT b", Clauses(should=(A,), must_not=(B,))),
        ("a NOT b c", Clauses(should=(Words("a c"),), must_not=(B,))),
        ("a AND NOT b", Clauses(must=(A,), must_not=(B,))),
        ("NOT b AND a", Clauses(must=(A,), must_not=(B,))),
        ("a NOT (b AND c)", Clauses(should=(A,), must_not=(both(B, C),))),
        ("a AND (NOT b NOT c)", Clauses(must=(A,), must_not=(B, C))),
        ('"heat pump" AND a', both(Phrase("heat pump"), A)),
        ("a “heat pump”", either(A, Phrase("heat pump"))),
        ('"a AND (b"', Phrase("a AND (b")),
        ("a and b or not c", Words("a and b or not c")),
        ("ANDROID NOTE", Words("ANDROID NOTE")),
        ("C++ x:y a/b -c [d TO e] f~2 g^3 h* \\ &&", Words("C++ x:y a/b -c [d TO e] f~2 g^3 h* \\ &&")),
    ],
)
def test_the_tree_of_a_query(query: str, tree: Node) -> None:
    assert parse(query) == tree


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "unexpected end of the query; expected a word, a quote or a parenthesis"),
        ("a AND", "unexpected end of the query"),
        ("OR a", "unexpected 'OR' at character 1; expected a word"),
        ("a AND AND b", "unexpected 'AND' at character 7"),
        ("a (b", "parenthesis at character 3 is not closed: found end of the query"),
        ("a b) c", "unexpected ')' at character 4; expected AND, OR or the end"),
        ("()", "unexpected ')' at character 2"),
        ('a "b c', "quote at character 3 is not closed"),
        ("NOT a", "the query only says what to leave out; name something to find"),
        ("a OR NOT b", "one side of OR only says what to leave out"),
        ("a NOT (NOT b)", "what follows NOT only says what to leave out"),
        ("a NOT NOT b", "unexpected 'NOT' at character 7 after another one"),
        ("(" * 51 + "a" + ")" * 51, "more than 50 parentheses within each other at character 51"),
    ],
)
def test_a_malformed_query_is_refused_with_the_place(query: str, message: str) -> None:
    with pytest.raises(QuerySyntaxError, match=re.escape(message)):
        parse(query)


def matches(node: Node, document: set[str]) -> bool:
    if isinstance(node, Words):
        return any(word in document for word in node.text.split())
    assert isinstance(node, Clauses)
    found = all(matches(part, document) for part in node.must)
    found = found and (not node.should or any(matches(part, document) for part in node.should))
    return found and not any(matches(part, document) for part in node.must_not)


WORD = st.sampled_from("abcd")
DOCUMENT = st.sets(WORD)


def expressions() -> st.SearchStrategy[str]:
    """Fully parenthesised expressions that Python reads as well: `(a and (b or c) and not d)`."""

    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        several = st.lists(inner, min_size=2, max_size=3)
        with_not = st.tuples(inner, inner, st.sampled_from(["({0} and not {1})", "(not {1} and {0})"]))
        return st.one_of(
            several.map(lambda parts: f"({' and '.join(parts)})"),
            several.map(lambda parts: f"({' or '.join(parts)})"),
            with_not.map(lambda parts: parts[2].format(parts[0], parts[1])),
        )

    return st.recursive(WORD, extend, max_leaves=12)


def chains() -> st.SearchStrategy[str]:
    """Expressions without parentheses, in which precedence decides: `a and not b or c and d`."""
    operand = st.tuples(st.sampled_from([" and ", " and not "]), WORD).map("".join)
    part = st.tuples(WORD, st.lists(operand, max_size=3)).map(lambda part: part[0] + "".join(part[1]))
    return st.lists(part, min_size=1, max_size=4).map(" or ".join)


@settings(max_examples=300)
@given(st.one_of(expressions(), chains()), DOCUMENT)
def test_operators_mean_what_they_mean_in_python(expression: str, document: set[str]) -> None:
    query = re.sub("and|or|not", lambda operator: operator.group().upper(), expression)
    assert matches(parse(query), document) == eval(expression, {}, {letter: letter in document for letter in "abcd"})


SYNTAX = st.lists(st.sampled_from(["a", "(", ")", '"', "AND", "OR", "NOT", " "])).map(" ".join)


@settings(max_examples=500)
@given(st.one_of(st.text(max_size=40), SYNTAX))
def test_any_text_is_a_query_of_its_words_or_a_syntax_error(text: str) -> None:
    try:
        tree = parse(text)
    except QuerySyntaxError:
        return
    assert plain(text_of(tree)) == plain(text)


def text_of(node: Node) -> str:
    if isinstance(node, Clauses):
        return " ".join(text_of(part) for part in (*node.must, *node.should, *node.must_not))
    return node.text


def plain(text: str) -> list[str]:
    """Words in a fixed order, less operators, quotes and parentheses."""
    words = re.sub(r'[()"“”]', " ", text).split()
    return sorted(word for word in words if word not in ("AND", "OR", "NOT"))
