"""Help by groups of options, as wide as the terminal; suggestions for what is mistyped; usage errors.

typer's plain help is kept (its rich one takes longer to import than everything else together); an option's
``rich_help_panel`` names its group.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from sparkling_cli.errors import ExitCode, UsageError

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
#: what people look for among the commands, and where it is
_ELSEWHERE = {
    "report html card": "a report lies in every output: DST/sparkling/report.html; `sparkling inspect` "
    "measures anew",
    "resume train continue run finetune": "training goes on in your own trainer, from the output: `sparkling "
    "expand` prints the line to add to it",
    "sparkling": "leave out the first word: it is there already",
    "help version": "write it as an option: `sparkling --help`, `sparkling --version`",
    "download pull get": "a model of the Hugging Face hub: hf download NAME --local-dir DIR",
}
_PLACE_OF = {name: place for names, place in _ELSEWHERE.items() for name in names.split()}
#: what people type for something that is no option, or has another name
_ANSWERS = {
    ("-i", "--in", "--input", "--checkpoint", "--ckpt", "--src", "--source"): "the checkpoint is the first "
    "argument",
    ("--device", "--cuda", "--gpu", "--cpu"): "nothing is to be chosen: everything runs on the CPU",
    ("--workers", "--jobs", "-j", "--num-workers"): "did you mean --threads?",
    ("--lr", "--learning-rate"): "did you mean --peak-lr?",
    ("--force", "--overwrite", "--yes", "-y"): "nothing is overwritten: choose another name, or remove what "
    "is there",
    ("--ffn", "--hidden", "--heads", "--kv-heads"): "write --axis ffn=2",
    ("--size",): "did you mean --to?",
    (
        "--layers",
        "--layer",
        "--only",
    ): "an axis grows in every layer that has it; more layers: --axis layers=2",
    ("--dtype", "--precision", "--bf16", "--fp16", "--fp32"): "the output has the types of the source",
    (
        "--no-optimizer",
        "--skip-optimizer",
        "--reset-optimizer",
    ): "state that starts from nothing: --optimizer drop, with an --init other than copy-copy",
}
#: where the output of a command goes, which is no option
_TARGET = {
    "expand": "the output is the second argument: sparkling expand CKPT DST",
    "layout": "it is printed: sparkling layout CKPT > mine.toml",
}
_TARGET_FLAGS = ("-o", "--out", "--output", "--dst")
_ANSWER_OF = {flag: answer for flags, answer in _ANSWERS.items() for flag in flags}
_COMMAND_OF = {name: command for command, names in _SYNONYMS.items() for name in names}


#: the heading of options without a group: --help
_REST = "Running"


class Command(TyperCommand):
    """A command whose help lists its options under the headings of their groups, in order of appearance."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Arguments that must be given stand bare, others in brackets."""
        return [re.sub(r"^\{(\w+)\}$", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]

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
            words = re.sub(r" *\[x>=.*?\]$", "", words)
            sections.setdefault(title, []).append((names, words))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


class Group(TyperGroup):
    """The commands; one that does not exist is answered by the one that was probably meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Nothing at all asks for help."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit(int(ExitCode.USAGE))
        return list(super().parse_args(ctx, args))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command of the first word.

        Raises:
            UsageError: there is none of that name.
        """
        name = args[0]
        if name in self.commands or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        near = difflib.get_close_matches(
            name.lower(), [*self.commands, *_COMMAND_OF, *_PLACE_OF], n=1, cutoff=0.65
        )
        word = near[0] if near else ""
        meant = _COMMAND_OF.get(word, word)
        answer = f"did you mean `sparkling {meant}`?" if meant else "see `sparkling --help`"
        raise UsageError(
            f"there is no command {name!r}; there are {', '.join(self.commands)}",
            hint=_PLACE_OF.get(word, answer),
        )


def usage_error(error: Any, words: Sequence[str]) -> UsageError:
    """What the parser of the command line refused, as an error of this package.

    Args:
        error: click's own.
        words: the command line behind ``sparkling``, for errors that do not say which command they are of.
    """
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else " ".join(["sparkling", *words[:1]])
    answer = f"see `{path} --help`"
    if type(error).__name__ == "NoSuchOption" and context is not None:
        return UsageError(f"there is no option {error.option_name}", hint=_option_meant(error, answer))
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    for kind, words in (("integer", "a whole number"), ("number", "a number")):
        message = re.sub(f"Input should be a valid {kind}.*", f"expected {words}", message)
    message = re.sub(r"Input should be greater than or equal to (\d+)", r"expected \1 or more", message)
    example = _example(context)
    if example and type(error).__name__ in ("MissingParameter", "UsageError"):
        answer = f"for example `{example}`; {answer}"
    if "unexpected extra argument" in message and path.endswith(" inspect"):
        answer = "a second checkpoint goes by --against: sparkling inspect CKPT --against OTHER"
    elif "unexpected extra argument" in message and path.endswith(" expand"):
        answer = f"one checkpoint and one output, and an axis goes by an option: {example}"
    return UsageError(message, hint=answer)


def _option_meant(error: Any, otherwise: str) -> str:
    """What to type instead of an option that there is none of."""
    context, name = error.ctx, error.option_name
    others = [
        command
        for command, found in getattr(context.command, "commands", {}).items()
        if any(name in param.opts for param in found.params)
    ]
    if others:
        return f"the command comes first: sparkling {others[0]} ... {name}"
    if name in _TARGET_FLAGS and context.info_name in _TARGET:
        return _TARGET[context.info_name]
    known = [flag for param in context.command.params for flag in param.opts if flag.startswith("--")]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return _ANSWER_OF.get(name) or (f"did you mean {near[0]}?" if near else otherwise)


def _example(context: Any) -> str | None:
    """The first example of the command's help."""
    text = getattr(getattr(context, "command", None), "help", None) or ""
    found = re.search(r"^ *(sparkling .*(?:\\\n.*)*)$", text, flags=re.M)
    return re.sub(r" *\\\n *", " ", found[1]).strip() if found else None
