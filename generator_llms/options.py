"""Multiple choice: the options that stand in a question's text, and which of them an answer means."""

from __future__ import annotations

import re

_HEADING = "\nOptions:\n"
_OPTION = re.compile(r"([A-Z]): (.*)")
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|right\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s+)?"  # "The answer is"
    r"\(?([A-Z])([.:)]|$)\s*(.*)",  # "(B) text", "B: text", "B. text", "B) text", "B"
    re.IGNORECASE | re.DOTALL,
)
_PUNCTUATION = " .,:;!\"'"


def read_options(text: str) -> dict[str, str]:
    """Return the options of a question by letter, in their order; empty where it has none.

    They follow the line `Options:` as `A: text`, `B: text` and so on (the layout of MIRAGE's questions here). A line
    that does not start with the next letter goes on with the option before it.
    """
    _, heading, tail = text.rpartition(_HEADING)
    options: dict[str, str] = {}
    for line in tail.split("\n") if heading else ():
        match = _OPTION.match(line)
        if match and ord(match[1]) == ord("A") + len(options):
            options[match[1]] = match[2]
        elif options:
            letter = next(reversed(options))
            options[letter] = f"{options[letter]}\n{line}"
    return {letter: option.strip() for letter, option in options.items()}


def chosen_option(question: str, answer: str) -> str | None:
    """Return the option that an answer means, as `K: text`; None where that is not clear.

    An answer means the option whose text it is, or else the one whose letter it gives, unless the text after the
    letter is that of another option. A single letter is always that of an option, also where it is another's text.
    """
    options = read_options(question)
    if _plain(answer).upper() not in options and (letter := _by_text(options, answer)):
        return f"{letter}: {options[letter]}"
    match = _LETTER.fullmatch(answer.strip())
    letter = match[1].upper() if match else ""
    if match is None or letter not in options:
        return None
    said, meant = _plain(match[3]), _plain(options[letter])
    if match[2] == "." and said and said not in meant and meant not in said:  # "C. difficile" names no option
        return None
    return f"{letter}: {options[letter]}" if _by_text(options, match[3]) in ("", letter) else None


def _by_text(options: dict[str, str], text: str) -> str:
    """Return the letter of the one option with this text, however it is spaced and capitalised; "" if none is."""
    wanted = _plain(text)
    letters = [letter for letter, option in options.items() if _plain(option) == wanted]
    return letters[0] if len(letters) == 1 and wanted else ""


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(_PUNCTUATION)
