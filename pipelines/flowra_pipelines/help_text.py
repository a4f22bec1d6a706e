"""Help that fits the terminal: paragraphs are broken where the terminal ends, not where the source did."""

import inspect

import typer

__all__ = ["flow_paragraphs"]


def flow_paragraphs(app: typer.Typer) -> None:
    r"""Join the lines of each paragraph of all commands' help; one that starts with ``\b`` keeps its lines."""
    for command in app.registered_commands:
        written = command.help or inspect.getdoc(command.callback)
        command.help = None if written is None else _flowing(written)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            flow_paragraphs(group.typer_instance)


def _flowing(text: str) -> str:
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(each if each.startswith("\b") else each.replace("\n", " ") for each in paragraphs)
