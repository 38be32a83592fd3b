"""What is learned of a conversation, under chat templates of several kinds; expectations are the turns themselves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.tiny import CHAT_TEMPLATE, tiny_tokenizer
from verl.errors import DataError
from verl.trainer.sft_chat import encode_chat

END = "<|im_end|>"
TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
)
HEADERS = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_start|>\\n\\n' }}"
    "{{ m['content'] | trim }}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_start|>\\n\\n' }}{% endif %}"
)
INSTRUCTION = (
    "{{ '<|endoftext|>' }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MARKERS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
)
MARKERS_WITH_END = MARKERS.replace("{% endgeneration %}{{ '<|im_end|>\\n' }}", "{{ '<|im_end|>' }}{% endgeneration %}")
THINKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1] }}{{ '<|im_end|>\\n' }}{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + PROMPT
)
COUNTING = "{{ messages | length }} messages\n" + CHAT_TEMPLATE
GLUED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

CONVERSATION = [
    {"role": "user", "content": "Who is the rival of the mentor of Ada?"},
    {"role": "assistant", "content": '<query>{"query": "the mentor of Ada"}</query>'},
    {"role": "user", "content": "Doc 1(Title: Ada) The mentor of Ada is Bob."},
    {"role": "assistant", "content": "The mentor of Ada is Bob."},
]
SAID = [CONVERSATION[1]["content"], CONVERSATION[3]["content"]]


def tokenizer_with(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def runs(tokenizer, messages) -> list[str]:
    """Decode each run of learned tokens."""
    ids, learned = encode_chat(tokenizer, messages)
    assert len(ids) == len(learned)
    found: list[list[int]] = []
    for i, (token, mark) in enumerate(zip(ids, learned, strict=True)):
        if mark and not (i and learned[i - 1]):
            found.append([])
        if mark:
            found[-1].append(token)
    return [tokenizer.decode(run) for run in found]


@pytest.mark.parametrize(
    ("template", "lead"),
    [
        (CHAT_TEMPLATE, ""),
        (DEFAULT_SYSTEM, ""),
        (HEADERS, ""),
        (INSTRUCTION, " "),
        (MARKERS, ""),
        (MARKERS_WITH_END, ""),
    ],
    ids=["chatml", "default_system", "headers_and_trim", "instruction", "markers", "markers_with_end"],
)
def test_assistant_turns_are_learned_with_their_end_and_nothing_else(template: str, lead: str) -> None:
    tokenizer = tokenizer_with(template)
    assert runs(tokenizer, CONVERSATION) == [f"{lead}{text}{END}" for text in SAID]
    ids, _ = encode_chat(tokenizer, CONVERSATION)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)


def test_an_injected_system_turn_shifts_nothing_and_an_own_one_replaces_it() -> None:
    tokenizer = tokenizer_with(DEFAULT_SYSTEM)
    own = [{"role": "system", "content": "Search, then answer."}, *CONVERSATION]
    assert runs(tokenizer, own) == runs(tokenizer, CONVERSATION)
    assert "You are helpful." in tokenizer.decode(encode_chat(tokenizer, CONVERSATION)[0])


def test_what_the_template_puts_into_the_last_turn_alone_is_learned_there_alone() -> None:
    tokenizer = tokenizer_with(THINKING)
    assert runs(tokenizer, CONVERSATION) == [SAID[0] + END, f"<think>\n\n</think>\n\n{SAID[1]}{END}"]


def test_a_turn_that_the_template_rewrites_later_is_refused() -> None:
    thoughtful = [dict(message) for message in CONVERSATION]
    thoughtful[1]["content"] = "<think>Who is Ada?</think>I search."
    with pytest.raises(DataError, match="not prefix-stable: up to turn 1"):
        encode_chat(tokenizer_with(THINKING), thoughtful)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (COUNTING, CONVERSATION, "not prefix-stable"),
        (CHAT_TEMPLATE, CONVERSATION[:1], "no assistant turn"),
        (CHAT_TEMPLATE, CONVERSATION[1:], "the first message is the assistant's"),
        (INSTRUCTION, [CONVERSATION[0], *CONVERSATION], "refuses the turns user, user.*roles must alternate"),
        (MARKERS.replace("m['content'] }}{% endgen", "'' }}{% endgen"), CONVERSATION, "mark no token"),
    ],
    ids=["unstable", "no_assistant", "assistant_first", "refused", "empty_markers"],
)
def test_what_cannot_be_told_apart_is_refused(template: str, messages: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_chat(tokenizer_with(template), messages)


def test_a_token_never_reaches_over_where_the_assistant_begins() -> None:
    tokenizer = tokenizer_with(GLUED)
    # " the" is one token, but the space belongs to the prompt, which is tokenised before anything is said.
    assert len(tokenizer.encode(" the")) == 1
    messages = [CONVERSATION[0], {"role": "assistant", "content": "the mentor"}]
    assert runs(tokenizer, messages) == ["the mentor\n"]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert encode_chat(tokenizer, messages)[0][: len(prompt)] == prompt


INJECTING, MARKED = tokenizer_with(DEFAULT_SYSTEM), tokenizer_with(MARKERS)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("ab é<>\n{}7", min_size=1, max_size=12), min_size=2, max_size=6))
def test_any_words_come_back_as_they_were_said(texts: list[str]) -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    said = [f"{message['content']}{END}" for message in messages if message["role"] == "assistant"]
    assert runs(INJECTING, messages) == runs(MARKED, messages) == said
