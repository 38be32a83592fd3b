"""The console command `s3`: one name for every entry point. `s3 COMMAND ARGUMENTS` is `python -m MODULE ARGUMENTS`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from verl.typed import nearest


@dataclass(frozen=True, slots=True)
class Command:
    """A module with `main(arguments)`, which returns an exit code or None, and what it does in a few words."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "quickstart": Command("verl.trainer.quickstart", "the whole pipeline on the embedded world, offline"),
    "build-questions": Command("data_preprocess.qa", "turn published question sets into parquets"),
    "build-corpus": Command("data_preprocess.pooled_corpus", "pool the passages that question sets ship"),
    "build-index": Command("verl.retrieval.build", "index a corpus"),
    "serve-retriever": Command("verl.retrieval.server", "serve an index over HTTP"),
    "serve-generator": Command("generator_llms.host", "serve a frozen generator over vLLM"),
    "cache": Command("generator_llms.cache_cli", "stats, export, import or prune of the reply cache"),
    "precompute": Command("data_preprocess.rag_cache", "answer questions by naive RAG: round-0 documents and baseline"),
    "warmup": Command("data_preprocess.warmup", "turn supporting facts into ExSearch's warm-up trajectories"),
    "import-cache": Command("data_preprocess.published_cache", "make baselines of a published rag_cache.json"),
    "train": Command("verl.trainer.main_ppo", "train a searcher"),
    "query-quickstart": Command("verl.trainer.query_quickstart", "DeepRetrieval on the embedded world, offline"),
    "sft": Command("verl.trainer.main_sft", "fine-tune a model on weighted examples"),
    "self-train": Command("verl.trainer.main_self_train", "let a searcher teach itself by generalised EM (ExSearch)"),
    "self-train-stage": Command("verl.trainer.exsearch.__main__", "run one stage of it, for example inference"),
    "verify-resume": Command(
        "verl.trainer.verify_resume", "prove that a killed and resumed training equals an unbroken one"
    ),
    "collect": Command("verl.evaluation.collect", "gather every question's documents by one method"),
    "controls": Command("verl.evaluation.controls", "what equal, random, gold or no documents do"),
    "leaderboard": Command("verl.evaluation.leaderboard", "put several reports into one table, page and plots"),
    "evaluate-queries": Command(
        "verl.evaluation.deepretrieval", "score queries and SQL by what they find, several methods in one report"
    ),
    "evaluate": Command("verl.evaluation.evaluate", "score collected documents, several methods in one report"),
}


def main(arguments: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run one command; its module is imported only then.

    Returns:
        The exit code: the command's, 0 after `--help`, 2 for a command that does not exist.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(usage(commands))
        return 0 if argv else 2
    name, *rest = argv
    if name not in commands:
        near = nearest(name, list(commands))
        sys.stderr.write(f"error: unknown command {name!r}; did you mean {near!r}? Commands: {', '.join(commands)}\n")
        return 2
    return importlib.import_module(commands[name].module).main(rest) or 0


def usage(commands: Mapping[str, Command]) -> str:
    """Return what `s3 --help` prints."""
    width = max(map(len, commands))
    lines = [f"  {name.ljust(width)}  {command.help}" for name, command in commands.items()]
    return "\n".join(["usage: s3 COMMAND [ARGUMENTS], or s3 COMMAND --help", "", *lines]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
