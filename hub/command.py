"""The command `models`: what there is of the real weights on this machine, fetching them, and checking them.

Progress goes to stderr; stdout holds the answer, or with `--json` exactly one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import hub.remote
from core import console
from core.errors import DownloadError, RequestError, WeightsMissing
from core.messages import Message, plain
from core.request import MODELS
from hub import download, fine_tunes, links, packing, verify
from hub.inventory import COMFYUI, Found, check_fetched, fetch_command, find_all, weights_missing
from hub.parts import OFFICIAL, PARTS, REPACKAGED, Edition, Part, needs, size_text, weight

ALL = "all"
DEFAULT = needs("generate", "turbo")
HELP = f"""parts of the real weights: {", ".join(PARTS)}, or {ALL}. Without any, `list` takes all, `verify` what
is there, `download` what text to image with Turbo needs ({size_text(weight(DEFAULT, OFFICIAL))})"""
EDITION_HELP = f"""download: official, as published ({size_text(weight(DEFAULT, OFFICIAL))} for Turbo; the default),
or repackaged, as Comfy-Org publishes Turbo, text encoder and VAE in bf16 ({size_text(weight(DEFAULT, REPACKAGED))}).
Both draw the same way"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the command line's own."""
    parser = commands.add_parser("models", parents=[common], help="the real weights: list, download, verify")
    parser.add_argument("action", nargs="?", choices=list(_ACTIONS), default="list")
    parser.add_argument("parts", nargs="*", metavar="PART", help=HELP)
    parser.add_argument("--hub", choices=hub.remote.NAMES, default=hub.remote.NAMES[0], help="where to download from")
    parser.add_argument("--edition", choices=get_args(Edition), help=EDITION_HELP)
    parser.add_argument("--repair", action="store_true", help="with download: first read what is there in full, too")
    parser.set_defaults(run=lambda args: _ACTIONS[args.action](args))


def inventory_lines(inventory: Sequence[Found] | None = None) -> list[str]:
    """Return a line on each part of the real weights: whether it is here, and where."""
    lines = []
    for found in find_all() if inventory is None else inventory:
        where = f"in the {found.source}" if found.present else "missing"
        if found.source == COMFYUI or found.edition == REPACKAGED:
            where += f" ({found.files[0].name}, {packing.stored(found.files).title})"
        if found.outdated:
            where = f"{found.files[0].name} in the {found.source}, an older release: {fetch_command([found])}"
        lines.append(": ".join([f"{found.part.name}: {found.part.title}", where, *map(str, found.problems)]))
    return lines


def checkpoint_lines() -> list[str]:
    """Return a line on each fine-tune that is found, and on each file beside them that cannot be used."""
    lines = []
    for tune in fine_tunes.found().values():
        of = f"made of {MODELS[tune.model].title}" if tune.model else "it does not say of which model (--model)"
        size = size_text(tune.size)
        lines.append(f"checkpoint {tune.name}: {tune.stored}, {size}, {of}, in {tune.files[0].parent}")
    return lines + [f"not usable: {problem}" for problem in fine_tunes.unusable()]


def _list(args: argparse.Namespace) -> int:
    inventory = find_all(parts=_parts(args.parts, tuple(PARTS)))
    if args.json:
        _print({"models": [_facts(found) for found in inventory], **({} if args.parts else _checkpoint_facts())})
        return 0
    print("\n".join(inventory_lines(inventory) + ([] if args.parts else checkpoint_lines())))
    if missing := [found for found in inventory if not found.present]:
        less = weight([found.part.name for found in missing], REPACKAGED)
        also = f"; {size_text(less)} with --edition {REPACKAGED}" if size_text(less) != _sum(missing) else ""
        _tell(f"To fetch what is missing ({_sum(missing)}{also}): {fetch_command(missing)}")
    return 0


def _checkpoint_facts() -> dict[str, Any]:
    tunes = [
        {
            "name": tune.name,
            "files": [str(file) for file in tune.files],
            "weights": tune.kind,
            "model": tune.model,
            "stored": tune.stored,
            "bytes": tune.size,
        }
        for tune in fine_tunes.found().values()
    ]
    return {"checkpoints": tunes, "not_usable": plain(fine_tunes.unusable())}


def _facts(found: Found) -> dict[str, Any]:
    return {
        "part": found.part.name,
        "repository": found.part.repo,
        "pattern": found.part.pattern,
        "bytes": found.part.size,
        "needed_by": found.part.needed_by,
        "present": found.present,
        "source": found.source,
        "files": [str(path) for path in found.files],
        "problems": plain(found.problems),
    }


def _download(args: argparse.Namespace) -> int:
    parts = _parts(args.parts, DEFAULT)
    broken = _drop_broken(parts) if args.repair else {}
    looked = find_all(parts=parts)
    missing = [found for found in looked if not found.present]
    if not _offline():
        missing += [found for found in looked if found.outdated]
    elif missing:
        what = Message("offline", "offline (--offline or HF_HUB_OFFLINE), so nothing is fetched")
        raise weights_missing(missing, what)
    facts: dict[str, Any] = {"fetched": [], "bytes": 0, "folder": None}
    if missing:
        # What replaces a damaged file is of the same edition, unless another is asked for.
        editions = [args.edition or broken.get(found.part.name, OFFICIAL) for found in missing]
        _tell_choice(missing, editions)
        wanted = [found.part.in_edition(edition) for found, edition in zip(missing, editions, strict=True)]
        facts = _fetch(wanted, args.hub)
        check_fetched(parts)
    made = links.link(parts=parts)
    for link in made:
        if link.reason:
            _tell(f"{link.path}: {link.reason}")
    if args.json:
        _print(facts | {"links": [{"path": str(link.path), "action": link.action} for link in made]})
    else:
        print(f"{', '.join(part.name for part in parts)}: {'fetched and checked' if missing else 'here already'}")
    return 0


def _tell_choice(missing: Sequence[Found], editions: Sequence[Edition]) -> None:
    """Say what each edition weighs, where that differs."""
    names = [found.part.name for found in missing]
    weights = {edition: size_text(weight(names, edition)) for edition in get_args(Edition)}
    if len(set(weights.values())) > 1:
        each = ", ".join(f"{size} {edition}" for edition, size in weights.items())
        _tell(f"What is missing weighs {each} (--edition); fetching {' and '.join(dict.fromkeys(editions))}")


def _fetch(parts: Sequence[Part], hub_name: str) -> dict[str, Any]:
    """Fetch parts, showing how far it is; return what was fetched, the bytes, and where to."""
    fetched: list[str] = []
    plan: download.Planned | None = None
    shown: _Bar | _Lines | None = None
    try:
        for event in download.fetch(parts, download.connect(hub_name)):
            match event:
                case download.Planned():
                    plan = event
                    _tell(
                        f"Fetching {plan.files} files, {size_text(plan.total)} ({size_text(plan.left)} still to come), "
                        f"into {plan.folder} ({size_text(plan.free)} free)"
                    )
                    shown = _Bar(plan) if sys.stderr.isatty() else _Lines()
                case download.Progress():
                    assert shown is not None  # the plan comes first
                    shown.show(event)
                case download.Fetched(file, path):
                    assert shown is not None
                    fetched.append(str(path))
                    shown.tell(f"{file.repo}/{file.name} is whole")
    finally:
        if shown is not None:
            shown.close()
    assert plan is not None
    return {"fetched": fetched, "bytes": plan.left, "folder": str(plan.folder)}


def _drop_broken(parts: Sequence[Part]) -> Mapping[str, Edition]:
    """Read what is there, and make room for what has to be fetched again; return the edition of each such part."""
    editions: dict[str, Edition] = {}
    for verdict in _verdicts(parts):
        removed, left = download.drop(verdict.broken)
        for path in removed:
            _tell(f"removed {path}: it holds something else than the hub gave")
            editions[verdict.found.part.name] = verdict.found.edition
        if left:
            raise DownloadError(
                "{file} holds something else than the hub gave, and is not in the hub's cache: remove it, then run "
                "the same command again",
                file=str(left[0]),
                files=[str(path) for path in left],
            )
    return editions


def _verify(args: argparse.Namespace) -> int:
    verdicts = _verdicts(_parts(args.parts, tuple(PARTS)))
    if not args.parts:  # nobody needs every part
        verdicts = [verdict for verdict in verdicts if verdict.state != "missing"]
    bad = [verdict.found for verdict in verdicts if verdict.state != "whole"]
    if not args.json:
        for verdict in verdicts:
            print(f"{verdict.found.part.name}: {_judgement(verdict)}")
            for problem in verdict.problems:
                print(f"  {problem}")
    if not verdicts:
        raise weights_missing(find_all(parts=[PARTS[name] for name in DEFAULT]))
    if not bad:
        if args.json:
            _print({"models": [_verdict_facts(verdict) for verdict in verdicts]})
        return 0
    command = f"{fetch_command(bad)} --repair"
    raise WeightsMissing(
        "not whole: {parts}; to fix them ({size} at most): {command}",
        parts=[found.part.name for found in bad],
        size=_sum(bad),
        models=[_verdict_facts(verdict) for verdict in verdicts],
        command=command,
    )


def _verdicts(parts: Sequence[Part]) -> list[verify.Verdict]:
    verdicts = []
    for event in verify.verify(parts=parts):
        if isinstance(event, verify.Verdict):
            verdicts.append(event)
        elif event.size > 100_000_000:
            _tell(f"reading {event.path} ({size_text(event.size)})")
    return verdicts


def _judgement(verdict: verify.Verdict) -> str:
    if verdict.state != "whole":
        return verdict.state
    if not verdict.unproven:
        return f"whole ({verdict.found.source}; every file has the hub's digest)"
    return (
        f"whole by headers, lengths, names and shapes ({verdict.found.source}; the hub's digest of "
        f"{len(verdict.unproven)} files is not known here)"
    )


def _verdict_facts(verdict: verify.Verdict) -> dict[str, Any]:
    return {
        **_facts(verdict.found),
        "state": verdict.state,
        "problems": plain(verdict.problems),
        "broken": [str(path) for path in verdict.broken],
        "digest_unknown": [str(path) for path in verdict.unproven],
    }


class _Bar:
    """Shows how far a download is on a terminal: a bar with speed and time left."""

    def __init__(self, plan: download.Planned) -> None:
        from tqdm import tqdm

        had = plan.total - plan.left
        self._bar = tqdm(total=plan.total, initial=had, unit="B", unit_scale=True, dynamic_ncols=True, file=sys.stderr)

    def show(self, progress: download.Progress) -> None:
        """Move the bar."""
        self._bar.set_description(f"{progress.files_done} of {progress.files} files", refresh=False)
        self._bar.update(progress.done - self._bar.n)

    def tell(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class _Lines:
    """Shows how far a download is in a file or a pipe: a line at every full percent, not more than one a second."""

    def __init__(self) -> None:
        self._speed, self._shown, self._percent = download.Speed(), time.monotonic(), -1

    def show(self, progress: download.Progress) -> None:
        """Print a line, if it is time for one."""
        self._speed.see(progress.done)
        percent, now = 100 * progress.done // max(progress.total, 1), time.monotonic()
        if percent == self._percent or now - self._shown < 1:
            return
        self._shown, self._percent = now, percent
        left = self._speed.left(progress.total)
        _tell(
            f"{size_text(progress.done)} of {size_text(progress.total)} ({percent} %), "
            f"{size_text(round(self._speed.per_second))}/s, {'?' if left is None else f'{left / 60:.0f}'} min left, "
            f"{progress.files_done} of {progress.files} files"
        )

    def tell(self, line: str) -> None:
        """Print another line."""
        _tell(line)

    def close(self) -> None:
        """Do nothing: every line is whole."""


def _parts(names: Sequence[str], default: Sequence[str]) -> list[Part]:
    for name in names:
        if name not in PARTS and name != ALL:
            raise RequestError("part", name, ", ".join([*PARTS, ALL]))
    chosen = PARTS if ALL in names else names or default
    return [part for name, part in PARTS.items() if name in chosen]


def _offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def _sum(missing: Sequence[Found]) -> str:
    return size_text(sum(found.part.size for found in missing))


def _print(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, ensure_ascii=not console.takes_any_letter()))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_ACTIONS = {"list": _list, "download": _download, "verify": _verify}
