"""Messages on a screen of some width: lines end between words, and never inside what may be pasted.

A line's end inside a path or a command would be copied along with it, and make another path of it.
"""

from __future__ import annotations

import re
from textwrap import TextWrapper

#: a shell's word in quotes, or the same of a message: what has spaces and is one thing
_QUOTED = r"(?<!\w)'[^'\n]*'(?!\w)|`[^`\n]*`|\"[^\"\n]*\""
#: a command, up to the punctuation that ends it in a sentence
_COMMAND = (
    r"(?:\bsparkling (?:architectures|expand|inspect|layout|plan|schedule|verify)\b|\b(?:python3?|pip|hf) )"
    rf"(?:{_QUOTED}|[^,;:)'\"`\n]|[,;:)](?=\S))*"
)
#: options with their values
_OPTION = rf"--[a-z][a-z-]*(?:[ =](?!--)(?:{_QUOTED}|[^\s,;]+))?"
_WHOLE = re.compile(rf"{_COMMAND}|{_QUOTED}|(?<![\w-]){_OPTION}(?: {_OPTION})*")
#: stands for a space at which a line must not end; in no message
_KEPT = "\x1f"


def wrapped(text: str, width: int, *, indent: str = "") -> str:
    """A line of text as several; a command, a path in quotes or a word that is longer stays one.

    Args:
        text: without line ends.
        width: columns.
        indent: of all lines but the first.
    """
    kept = _WHOLE.sub(lambda found: found[0].replace(" ", _KEPT), text)
    lines = TextWrapper(width, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
    return lines.fill(kept).replace(_KEPT, " ")
