"""The host: its command line and environment, refusals before loading, and once for real over vLLM's CPU engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from generator_llms import prompts
from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.host import HostConfig, check, command, environment, parse
from verl.errors import ConfigError
from verl.services import free_port
from verl.types import Document, Question

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "generator_llms" / "host.sh"
WORDS = "a b c d e f g h Use the following contexts on demand Doc Title"


def test_arguments_of_ours_are_read_and_all_others_passed_on() -> None:
    config = parse(
        ["--model", "m", "--tp", "2", "--max-model-len", "8192", "--port", "9000", "--enable-prefix-caching"]
    )
    assert config == HostConfig("m", "127.0.0.1", 9000, 2, ("--max-model-len", "8192", "--enable-prefix-caching"))
    assert parse(["--model", "m"]) == HostConfig("m")
    assert parse(["--model", "m", "--mod", "x"]).passthrough == ("--mod", "x")


def test_the_gpu_command_is_plain() -> None:
    assert command(HostConfig("m", tp=2, passthrough=("--max-model-len", "8192")), "gpu")[1:] == [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", "m", "--host", "127.0.0.1", "--port", "8000"),
        *("--tensor-parallel-size", "2", "--max-model-len", "8192"),
    ]


def test_the_cpu_command_is_eager_once() -> None:
    assert command(HostConfig("m"), "cpu").count("--enforce-eager") == 1
    assert command(HostConfig("m", passthrough=("--enforce-eager",)), "cpu").count("--enforce-eager") == 1


def test_the_environment_adds_what_is_missing_and_keeps_what_is_set(tmp_path: Path) -> None:
    hub, local = HostConfig("org/model"), HostConfig(str(tmp_path))
    assert environment(hub, "gpu", {"A": "1"}) == {"A": "1"}
    assert environment(local, "gpu", {}) == {"HF_HUB_OFFLINE": "1"}
    assert environment(hub, "cpu", {})["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment(hub, "cpu", {"VLLM_CPU_KVCACHE_SPACE": "40"})["VLLM_CPU_KVCACHE_SPACE"] == "40"


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check(HostConfig(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check(HostConfig("./nowhere"))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check(HostConfig("outputs/run/checkpoints/hf"))


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="another"):
            check(HostConfig("org/model", port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    "config", [HostConfig("m", port=70_000), HostConfig("m", tp=0), HostConfig("m", host="no.host")]
)
def test_impossible_numbers_are_refused(config: HostConfig) -> None:
    with pytest.raises(ConfigError):
        check(config)


def test_the_script_tells_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", str(SCRIPT), "--model", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
        cwd=tmp_path,
        timeout=60,
    )
    assert run.returncode == 2 and "no config.json" in run.stderr and len(run.stderr.splitlines()) == 1


def test_deepretrieval_is_the_host_with_the_published_settings_that_arguments_replace(tmp_path: Path) -> None:
    argv = tmp_path / "python"
    argv.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    argv.chmod(0o755)
    script = ROOT / "generator_llms" / "deepretrieval.sh"

    def started(*arguments: str) -> HostConfig:
        line = ["bash", str(script), *arguments]
        run = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHON": str(argv)}, timeout=60)
        module, *rest = run.stdout.splitlines()[1:]
        assert module == "generator_llms.host"
        return parse(rest)

    assert started() == HostConfig(
        "DeepRetrieval/DeepRetrieval-NQ-BM25-3B", "127.0.0.1", 8000, 2, ("--max-model-len", "2048")
    )
    own = started("--model", "mine", "--tp", "1", "--port", "9000", "--max-model-len", "512")
    assert (own.model, own.tp, own.port) == ("mine", 1, 9000)
    assert own.passthrough[-2:] == ("--max-model-len", "512")  # vLLM takes the last


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """Write a random Qwen2 of a few thousand parameters with a word tokenizer and a chat template."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {word: index for index, word in enumerate(["<|end|>", "?", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", unk_token="?")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=0,
    )
    folder = tmp_path / "model"
    Qwen2ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def hosted(tiny_model: Path, tmp_path: Path) -> Iterator[str]:
    """Run host.sh in a process group of its own and stop the whole group afterwards."""
    port = free_port()
    line = ["bash", str(SCRIPT), "--model", str(tiny_model), "--port", str(port), "--max-model-len", "256"]
    with (tmp_path / "host.log").open("wb") as log:
        process = subprocess.Popen(
            [*line, "--served-model-name", "tiny", "--dtype", "float32"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHON": sys.executable},
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


DOCUMENTS = (Document("1", "e", "f g h a"),)


def logprobs_by_transformers(folder: Path, question: Question, answer: str) -> list[float]:
    """Compute what the server is asked for, from the model itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = prompts.build("context", question, DOCUMENTS)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    scored = tokenizer(answer, add_special_tokens=False).input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + scored])).logits[0].log_softmax(-1)
    return [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(scored)]


@pytest.mark.integration
async def test_the_client_waits_for_a_host_that_is_starting_and_gets_the_same_answer_twice(
    hosted: str, tiny_model: Path
) -> None:
    # The retry window is what lets a client outlive the start of its generator.
    config = GeneratorConfig(hosted, max_tokens=8, max_prompt_tokens=200, retry_window_s=240.0)
    question = Question("q", "a b c ?", ("d",), "toy")
    async with GeneratorClient(config) as client:
        assert await client.ready() == "tiny"
        first = await client.answer(question, [Document("1", "e", "f g h <|end|> a")])
        assert await client.answer(question, [Document("1", "e", "f g h <|end|> a")]) == first
        scored = await client.complete([{"role": "user", "content": "a b"}], logprobs=True)
        given = await client.answer_logprobs(question, DOCUMENTS, "d e g")
        samples = await client.samples(question, DOCUMENTS, 4)
        assert await client.samples(question, DOCUMENTS, 4) == samples
        text = await client.complete_text("a b", max_tokens=5, logprobs=True)
    assert first.documents_used == 1
    assert given == pytest.approx(logprobs_by_transformers(tiny_model, question, "d e g"), abs=1e-3)
    assert len({sample.text for sample in samples}) > 1
    assert all(0 < len(sample.logprobs) <= 8 for sample in samples)
    assert len(text.logprobs) == text.completion_tokens > 0
    assert len(scored.logprobs) == scored.completion_tokens > 0
    assert all(logprob <= 0 for logprob in scored.logprobs)
