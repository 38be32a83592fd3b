"""The tiny models' tokenizer: byte-level BPE in which every name and every word of the world is one token."""

from __future__ import annotations

import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from data_preprocess.world.language import RELATIONS, names, question_text, sentence

# Protocol tags are one token each, and ordinary text: they are decoded, and a stop string ends exactly on one.
TAGS = (
    *(
        f"<{slash}{tag}>"
        for tag in ("query", "search_complete", "important_info", "information")
        for slash in ("", "/")
    ),
    *(f"<{slash}{tag}>" for tag in ("think", "answer", "question", "search") for slash in ("", "/")),
    *("<QUERY>", "<SEARCH>", "<FACT>", "<FINAL>"),
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_WORDS = (
    "system user assistant Use the following contexts on demand and answer question directly Contexts Doc Title "
    "Search for then stop True False query search important info unknown No relevant documents were found Who What "
    "I need more information so another follows The information is not sufficient yet It a new JSON must"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on the world's own language; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        min_frequency=50,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    # What AutoTokenizer puts before the merges of any Qwen2 checkpoint, whatever its tokenizer.json says.
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _training_text() -> list[str]:
    rng = random.Random(0)
    pool = names()
    relations = list(RELATIONS) + list(RELATIONS.values())
    lines = []
    for name in pool:
        for _ in range(60):
            relation, other = rng.choice(relations), rng.choice(pool)
            lines.append(f"Doc {rng.randint(1, 20)} (Title: {name})\n{sentence(relation, name, other)}")
            lines.append(question_text(other, [relation, rng.choice(relations)]))
            lines.append(f'{{"query": "{relation} of {name}"}}\n\n')
            lines.append(
                f"Doc {rng.randint(1, 20)}(Title: {name}) {sentence(relation, other, name)} [{rng.randint(1, 9)}]"
            )
    lines += [_WORDS, " ".join(word.lower() for word in _WORDS.split())] * 60
    lines += ["system\n", "user\n", "assistant\n", ", ".join("123456789")] * 60
    return lines
