"""Writes docs/reference.md: every command, flag, field, endpoint and route, from the code that reads them.

    .venv/bin/python docs/reference.py

A test compares the file with what this would write.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, Python looks beside it alone
    sys.path.insert(0, str(ROOT))

from cli import build_parser
from core.request import MODES, SEED_MAX, Preprocess, Request
from engine import Engine
from web import programs

PAGE = ROOT / "docs" / "reference.md"

INTRO = """# Reference

Made by `docs/reference.py` from the requests and the command line's parser; do not edit.

Every request is one type, whichever way it comes: the page's forms, the command line's flags and the endpoints'
arguments are its fields. What is left out takes the default; *usual* means the usual value for the model and the
weights in use.
"""


def reference() -> str:
    """Return the page's text."""
    return "\n".join([INTRO, *_requests(), *_routes(), *_commands()]).rstrip() + "\n"


def _requests() -> Iterator[str]:
    requests: list[type[Request]] = [*MODES.values(), Preprocess]
    for request in requests:
        yield f"## {request.mode}: {request.help}\n"
        yield f"Command `{_command(request)}`, endpoint `/{request.mode}`.\n"
        yield from _table(
            ("field", "flag", "takes", "default", ""), (_field(request, name) for name in request.model_fields)
        )


def _command(request: type[Request]) -> str:
    required = [name for name, field in request.model_fields.items() if field.is_required()]
    return " ".join([request.mode, *(f"{_flag(request, name)}" for name in required)])


def _flag(request: type[Request], name: str) -> str:
    field = request.model_fields[name]
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if name == "prompt" and field.is_required():
        return "PROMPT"
    flag = extra.get("flag", "--" + name.replace("_", "-"))
    if flag is None:
        return "in --lora"
    return f"{flag} {extra.get('metavar', str(flag).removeprefix('--').upper())}"


def _field(request: type[Request], name: str) -> tuple[str, ...]:
    field = request.model_fields[name]
    default = "required" if field.is_required() else "*usual*" if field.default is None else f"`{field.default!r}`"
    return f"`{name}`", f"`{_flag(request, name)}`", str(request.allowed(name)), default, field.description or ""


def _routes() -> Iterator[str]:
    """What programs ask for below /v1, by the OpenAPI document that the server gives them."""
    document = programs.build(Engine()).openapi()
    yield "## Routes for programs\n"
    yield f"Below `{programs.PREFIX}`; the server gives the same as `{programs.PREFIX}/openapi.json`.\n"
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    rows = ((f"`{name}`", operation["summary"], _statuses(operation)) for name, operation in operations.items())
    yield from _table(("route", "", "answers"), rows)
    for name, operation in operations.items():
        for schema in _bodies(operation):
            if "mode" in schema["properties"]:  # whose fields stand above
                continue
            yield f"`{name}` takes:\n"
            fields = schema["properties"].items()
            taken = ((f"`{field}`", *_described(field, facts, schema["required"])) for field, facts in fields)
            yield from _table(("field", "takes", "default", ""), taken)
        if any("mode" in schema["properties"] for schema in _bodies(operation)):
            modes = ", ".join(f"`{schema['title']}`" for schema in _bodies(operation))
            yield f"`{name}` takes `mode`, which is {modes}, and the fields of that mode as above.\n"
    yield "A job is told as:\n"
    facts = document["components"]["schemas"]["JobFacts"]["properties"]
    told = ((f"`{name}`", _kind(facts[name]), str(facts[name].get("description", ""))) for name in facts)
    yield from _table(("field", "is", ""), told)


def _statuses(operation: dict[str, Any]) -> str:
    return ", ".join(sorted(status for status in operation["responses"] if status != "422"))  # which is never given


def _bodies(operation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the types that a route takes, once each, whatever they are sent as."""
    content = operation.get("requestBody", {}).get("content", {})
    schemas = [body["schema"] for body in content.values()][:1]
    return [kind for schema in schemas for kind in schema.get("oneOf", [schema])]


def _described(name: str, facts: dict[str, Any], required: list[str]) -> tuple[str, str, str]:
    default = facts.get("default")
    shown = "required" if name in required else "*usual*" if default is None else f"`{default!r}`"
    return _kind(facts), shown, facts.get("description", "")


def _kind(facts: dict[str, Any]) -> str:
    """Return what a field takes, or is, by its schema."""
    kinds = [kind for kind in facts.get("anyOf", [facts]) if kind.get("type") != "null"]
    kind = kinds[0]
    if "contentMediaType" in kind:
        return "a file"
    if values := kind.get("enum", [kind["const"]] if "const" in kind else []):
        return ", ".join(map(str, values))
    if "$ref" in kind:
        return "an object"
    low, high = kind.get("minimum"), kind.get("maximum")
    bounds = f" from {low:g} to {high:g}" if low is not None and high is not None and high < SEED_MAX else ""
    return f"{kind['type']}{bounds}"


def _commands() -> Iterator[str]:
    yield "## Flags of every command\n"
    parser = build_parser()
    (choice,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    commands: dict[str, argparse.ArgumentParser] = dict(choice.choices)
    common = {action.dest for action in commands["doctor"]._actions}
    yield from _flags(commands["doctor"], common)
    helps = {action.dest: action.help or "" for action in choice._choices_actions}
    for name, command in commands.items():
        if name in (*MODES, Preprocess.mode, "doctor"):
            continue
        yield f"## {name}: {helps[name]}\n"
        yield from _flags(command, {action.dest for action in command._actions} - common)


def _flags(parser: argparse.ArgumentParser, destinations: set[str]) -> Iterator[str]:
    # argparse has no public list of what a parser takes.
    actions = [action for action in parser._actions if action.dest in destinations and action.dest != "help"]
    rows = []
    for action in actions:
        spelled = ", ".join(action.option_strings) or action.dest
        if action.choices is not None and not isinstance(action, argparse._SubParsersAction):
            spelled += f" {'|'.join(map(str, action.choices))}"
        elif action.metavar and action.option_strings:
            spelled += f" {action.metavar}"
        rows.append((f"`{spelled}`", action.help or ""))
    yield from _table(("flag", ""), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(" ".join(cell.replace("|", "\\|").replace("%%", "%").split()) for cell in row) + " |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
