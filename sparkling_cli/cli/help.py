"""Help by groups of options, as wide as the terminal; suggestions for what is mistyped; usage errors.

typer's plain help is kept (its rich one takes longer to import than everything else together); an option's
``rich_help_panel`` names its group.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

from sparkling_cli.errors import UsageError

#: what people call a command that has another name here
_SYNONYMS = {
    "expand": ("widen", "grow", "upscale", "scale", "enlarge", "convert"),
    "inspect": ("show", "info", "compare", "diff", "measure", "stats", "watch"),
    "verify": ("check", "validate", "prove", "test"),
    "plan": ("estimate", "cost", "forecast", "budget"),
    "schedule": ("lr", "rewarmup", "warmup", "rewarm"),
    "layout": ("axes", "dims", "shapes"),
    "architectures": ("models", "archs", "list", "supported"),
}
#: what people type for something that is no option, or has another name
_ANSWERS = {
    ("-o", "--out", "--output", "--dst"): "the output is the second argument: sparkling expand CKPT DST",
    ("-i", "--in", "--input", "--checkpoint", "--ckpt"): "the checkpoint is the first argument",
    ("--lr", "--learning-rate"): "did you mean --peak-lr?",
    ("--force", "--overwrite", "--yes", "-y"): "nothing is overwritten: choose another name, or remove what "
    "is there",
    ("--ffn", "--hidden", "--heads", "--kv-heads"): "write --axis ffn=2",
    ("--size",): "did you mean --to?",
}
_ANSWER_OF = {flag: answer for flags, answer in _ANSWERS.items() for flag in flags}
_COMMAND_OF = {name: command for command, names in _SYNONYMS.items() for name in names}


#: the heading of options without a group: --help
_REST = "Running"


class Command(TyperCommand):
    """A command whose help lists its options under the headings of their groups, in order of appearance."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then one section for each group."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            argument = param.param_type_name == "argument"
            title = "Arguments" if argument else getattr(param, "rich_help_panel", None) or _REST
            names, words = record
            if argument:
                names = re.sub(r" <[^>]*>$", "", names)  # its type, which the metavar says
                words = words.removesuffix("  [required]")
            words = re.sub(r"\[default: \((.*?)\)(?:;.*)?\]", r"[default: \1]", words)
            sections.setdefault(title, []).append((names, words))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


class Group(TyperGroup):
    """The commands; one that does not exist is answered by the one that was probably meant."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command of the first word.

        Raises:
            UsageError: there is none of that name.
        """
        name = args[0]
        if name in self.commands or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        near = difflib.get_close_matches(name.lower(), [*self.commands, *_COMMAND_OF], n=1, cutoff=0.65)
        meant = _COMMAND_OF.get(near[0], near[0]) if near else None
        raise UsageError(
            f"there is no command {name!r}; there are {', '.join(self.commands)}",
            hint=f"did you mean `sparkling {meant}`?" if meant else "see `sparkling --help`",
        )


def usage_error(error: Any) -> UsageError:
    """What the parser of the command line refused, as an error of this package."""
    context = getattr(error, "ctx", None)
    answer = f"see `{context.command_path if context is not None else 'sparkling'} --help`"
    if type(error).__name__ == "NoSuchOption" and context is not None:
        known = [flag for param in context.command.params for flag in param.opts if flag.startswith("--")]
        near = difflib.get_close_matches(error.option_name, known, n=1, cutoff=0.6)
        answer = _ANSWER_OF.get(error.option_name) or (f"did you mean {near[0]}?" if near else answer)
        others = [
            name
            for name, command in getattr(context.command, "commands", {}).items()
            if any(error.option_name in param.opts for param in command.params)
        ]
        if others:
            answer = f"the command comes first: sparkling {others[0]} ... {error.option_name}"
        message = f"there is no option {error.option_name}"
    else:
        message = error.format_message().rstrip(".")
        message = message[:1].lower() + message[1:]
    return UsageError(message, hint=answer)
