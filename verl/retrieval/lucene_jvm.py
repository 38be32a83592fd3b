"""Lucene and Anserini in this process: the Java machine is started once, on first use.

The jar is the one that pyserini carries; pyserini's own Python code is not imported, since it needs a dozen packages
that are of no use here. The bridge is JPype. pyserini's pyjnius would be another one, but it keeps the object of a
method call in the method itself, so that two threads call each other's objects (kivy/pyjnius issues 287 and 563).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from verl.errors import ConfigError

REMEDY = "run `bash scripts/install.sh lucene` and have Java 11 or newer on the PATH or in JAVA_HOME"
_LEAST_JAVA = (11,)
_MAX_CLAUSES = 1 << 16
"""Words of a query, and parts of a Boolean one, that Lucene accepts."""

JavaClass = Any
JavaObject = Any
"""What JPype makes of Java's types when the program runs."""


@dataclass(frozen=True, slots=True)
class Lucene:
    """The Java classes that are used, by their names.

    Attributes:
        Error: base of all exceptions that Java raises.
        IOError: Java's `IOException`, for example that the disk is full.
    """

    Error: type[Exception]
    IOError: type[Exception]
    BagOfWords: JavaClass
    BM25: JavaClass
    BooleanBuilder: JavaClass
    DirectoryReader: JavaClass
    DocumentGenerator: JavaClass
    EnglishAnalyzer: JavaClass
    FieldInfos: JavaClass
    FSDirectory: JavaClass
    GeneratorArgs: JavaClass
    IndexSearcher: JavaClass
    IndexWriter: JavaClass
    IndexWriterConfig: JavaClass
    JsonDocument: JavaClass
    Occur: JavaClass
    Paths: JavaClass
    PhraseQuery: JavaClass
    QueryBuilder: JavaClass
    Sort: JavaClass
    SortField: JavaClass
    SortType: JavaClass


@cache
def lucene() -> Lucene:
    """Start Java, if it is not running, and return the classes.

    Raises:
        ConfigError: the extra packages or Java are missing, or Java is too old.
    """
    jar = _jar()
    try:
        import jpype
    except ImportError as error:
        raise ConfigError(f"retriever lucene needs the package jpype1; {REMEDY}") from error
    jpype.addClassPath(str(jar))
    if not jpype.isJVMStarted():
        try:
            # -Xrs leaves the signals to Python, which ends services on SIGTERM and SIGINT.
            jpype.startJVM("-Xrs", interrupt=False, convertStrings=False)
        except (jpype.JVMNotFoundException, jpype.JVMNotSupportedException, OSError, RuntimeError) as error:
            raise ConfigError(f"retriever lucene cannot start Java ({error}); {REMEDY}") from error
    if jpype.getJVMVersion() < _LEAST_JAVA:
        version = ".".join(map(str, jpype.getJVMVersion()))
        raise ConfigError(f"retriever lucene found Java {version}; {REMEDY}")
    return _classes(jpype)


def anserini_version() -> str:
    """Return the version of the jar, without starting Java.

    Raises:
        ConfigError: there is none.
    """
    return _jar().name.removeprefix("anserini-").removesuffix("-fatjar.jar")


def _jar() -> Path:
    found = importlib.util.find_spec("pyserini")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    jars = sorted(jar for folder in folders for jar in Path(folder).glob("resources/jars/anserini-*-fatjar.jar"))
    if not jars:
        raise ConfigError(f"retriever lucene needs the package pyserini with its jar of Anserini; {REMEDY}")
    return jars[-1]


def _classes(jpype: Any) -> Lucene:
    search, index = "org.apache.lucene.search", "org.apache.lucene.index"
    names = {
        "BagOfWords": "io.anserini.search.query.BagOfWordsQueryGenerator",
        "BM25": f"{search}.similarities.BM25Similarity",
        "BooleanBuilder": f"{search}.BooleanQuery$Builder",
        "DirectoryReader": f"{index}.DirectoryReader",
        "DocumentGenerator": "io.anserini.index.generator.DefaultLuceneDocumentGenerator",
        "EnglishAnalyzer": "io.anserini.analysis.DefaultEnglishAnalyzer",
        "FieldInfos": f"{index}.FieldInfos",
        "FSDirectory": "org.apache.lucene.store.FSDirectory",
        "GeneratorArgs": "io.anserini.index.IndexCollection$Args",
        "IOError": "java.io.IOException",
        "IndexSearcher": f"{search}.IndexSearcher",
        "IndexWriter": f"{index}.IndexWriter",
        "IndexWriterConfig": f"{index}.IndexWriterConfig",
        "JsonDocument": "io.anserini.collection.JsonCollection$Document",
        "Occur": f"{search}.BooleanClause$Occur",
        "Paths": "java.nio.file.Paths",
        "PhraseQuery": f"{search}.PhraseQuery",
        "QueryBuilder": "org.apache.lucene.util.QueryBuilder",
        "Sort": f"{search}.Sort",
        "SortField": f"{search}.SortField",
        "SortType": f"{search}.SortField$Type",
    }
    classes = {name: jpype.JClass(java) for name, java in names.items()}
    classes["IndexSearcher"].setMaxClauseCount(_MAX_CLAUSES)
    return Lucene(Error=jpype.JException, **classes)
