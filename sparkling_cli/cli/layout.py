"""``sparkling layout``: print what every tensor's dims mean."""

from __future__ import annotations

from sparkling_cli.cli import options as opt
from sparkling_cli.cli.console import output


def layout(
    checkpoint: opt.CheckpointArg,
    model: opt.ModelOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Print what every tensor's dims mean, as a layout file.

    It is the file that `--layout` accepts. CKPT may also be a config.json.

    \b
    Examples:
        sparkling layout ckpt/ > mine.toml
        sparkling expand ckpt/ --layout mine.toml --axis ffn --factor 2
    """
    import sys

    from sparkling_cli import api
    from sparkling_cli.layout.file import to_dict, to_toml
    from sparkling_cli.results.commands import Layout

    found = api.layout_of(checkpoint, model=model)
    output.data(Layout(layout=to_dict(found)))
    if not output.as_json:
        sys.stdout.write(to_toml(found))
