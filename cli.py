"""The command line: `python cli.py COMMAND …`. Flags are made from the request's fields, which also check them.

Progress goes to stderr; stdout holds the image's path, or with `--json` exactly one JSON object. Exit codes are the
errors' own (see errors.py): 0 done, 2 bad request, 3 weights missing, 4 out of memory, 130 cancelled, 141 when a pipe
closes (`| head`), 1 anything else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import hub.command
import lora.file
from core import console, environment, metadata
from core.errors import Cancelled, NotWritten, RequestError, StudioError
from core.events import Event, Failure, Result, Step, progress_text
from core.messages import Message, plain
from core.parameters import LABELS, Parameters, all_finite
from core.request import MODES, SEED_MAX, ControlNet, DrawRequest, Preprocess, Request, TextToImage, random_seed
from core.sizes import WeightsKind
from core.upload import Upload
from core.whole_file import check_writable, replacing
from diffusion import device, host_memory, measure, memory
from engine import Engine, Settings, inspection
from hub import fine_tunes, inventory, parts
from hub.checkpoint import fingerprint

MEMORY_HELP = (
    "GB of the device's memory to count with, in place of what is free: fewer leave room to others, more keep more of "
    "the models loaded (also Z_IMAGE_MEMORY)"
)
MODELS_HELP = (
    "a folder with models to look in first: repositories, ComfyUI's own folder, its models, or one of these "
    "(also Z_IMAGE_MODELS)"
)
DTYPE_HELP = (
    "what the real weights compute in: auto (what the device is faster in, as doctor shows it), bf16 or fp32 "
    "(also Z_IMAGE_DTYPE)"
)

MAX_COUNT = 9999  # pictures of a seed: a night's work

AUTH_HELP = (
    "ask visitors for these; who else uses this machine can read them here, but not in --auth-file or Z_IMAGE_AUTH"
)
WAITING_HELP = (
    "requests of one address that may wait at once, of 256 in all; 0 for as many as of all (default: 16); "
    "this machine's own are not counted, here and in the next two"
)
REQUESTS_HELP = "requests that one address may send in a minute; 0 for any number (default: 1200)"
BYTES_HELP = "GB that one address may upload in an hour; 0 for any amount (default: 8)"

COUNT_HELP = f"pictures of each seed, with consecutive seeds, from 1 to {MAX_COUNT} (default: 1)"
OUT_DIR_HELP = "where to write {name}, for any number of pictures; those that are there are not drawn again"
SEEDS_HELP = " May be given several times, for as many pictures."
STDOUT = "-"  # as a file's name
MCP_FOLDER_HELP = "where pictures are kept (default: z-image-studio in your folder Pictures, or in your home)"

TOLD = 120  # characters of a value that a picture has and a request has no place for


class Parser(argparse.ArgumentParser):
    """argparse, with a one-line complaint in place of usage and complaint."""

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with the exit code of a bad request."""
        self.exit(RequestError.exit_code, f"{self.prog}: {message} (--help shows what is possible)\n")


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    common = Parser(add_help=False)
    common.add_argument("--weights", default="auto", help=_help(TextToImage, "weights"))
    common.add_argument("--models", metavar="FOLDER", help=MODELS_HELP)
    common.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    common.add_argument("--dtype", help=DTYPE_HELP)
    common.add_argument("--memory", metavar="GB", help=MEMORY_HELP)
    common.add_argument("--offline", action="store_true", help="never touch the network")
    common.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    common.add_argument("-v", "--verbose", action="store_true", help="log what happens to stderr")

    parser = Parser(prog="cli.py", description="Z-Image Studio: pictures with the Z-Image models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    serve = commands.add_parser("serve", parents=[common], help="the page")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=int, default=7860, help="port to listen on; 0 takes any free one (default: 7860)")
    serve.add_argument("--auth", metavar="USER:PASSWORD", help=AUTH_HELP)
    serve.add_argument(
        "--auth-file", metavar="FILE", help="a file whose first line is USER:PASSWORD (also Z_IMAGE_AUTH)"
    )
    serve.add_argument(
        "--api-key",
        metavar="KEY",
        action="append",
        default=[],
        help="ask programs for this key, or one of several; others on this machine see it in the list of processes "
        "(also Z_IMAGE_API_KEYS)",
    )
    serve.add_argument("--api-keys", metavar="FILE", help="ask programs for one of the keys in a file, one a line")
    serve.add_argument(
        "--insecure", action="store_true", help="allow other machines without --auth, and programs without a key"
    )
    serve.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="answer to this name too, such as a reverse proxy's; may be given several times (default: names of this "
        "machine alone, or any name where --host lets other machines in)",
    )
    serve.add_argument("--client-waiting", type=int, metavar="N", default=Settings.client_limit, help=WAITING_HELP)
    serve.add_argument("--client-requests", type=int, metavar="N", help=REQUESTS_HELP)
    serve.add_argument("--client-gb", type=float, metavar="GB", help=BYTES_HELP)
    serve.add_argument(
        "--manage-models",
        action="store_true",
        help="let every visitor fetch the real model from the page (default: those at this machine, of a server that "
        "listens on it alone and answers to no other name)",
    )
    serve.set_defaults(run=_serve)

    mcp = commands.add_parser("mcp", parents=[common], help="tools for an assistant that starts this (MCP)")
    mcp.add_argument("--out-dir", type=Path, metavar="FOLDER", help=MCP_FOLDER_HELP)
    mcp.set_defaults(run=_mcp)

    for request in MODES.values():
        _add_mode(commands, common, request)

    preprocess = commands.add_parser(Preprocess.mode, parents=[common], help=Preprocess.help)
    _add_fields(preprocess, Preprocess)
    preprocess.add_argument("--out", type=Path, metavar="FILE.png", required=True, help="where to write")
    preprocess.set_defaults(run=_preprocess)

    inspect = commands.add_parser("inspect", parents=[common], help="what a picture or a LoRA file holds")
    inspect.add_argument("file", type=Path)
    inspect.set_defaults(run=_inspect)

    hub.command.add(commands, common)

    doctor = commands.add_parser("doctor", parents=[common], help="device, memory plan, versions, problems")
    doctor.set_defaults(run=_doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    Raises:
        SystemExit: the arguments are none of a command, or nobody reads what is printed any more.
    """
    with console.guarded():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    if args.models is not None:
        os.environ["Z_IMAGE_MODELS"] = args.models
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before anything that could use the network is imported
    try:
        code: int = args.run(args)
        return code
    except StudioError as error:
        return _fail(Failure.of(error), args.json)
    except KeyboardInterrupt:
        return _fail(Failure.of(Cancelled()), args.json)


def _add_fields(parser: Parser, request: type[Request]) -> None:
    """Give every field of a request its flag. Values stay text: the request alone judges them."""
    for name, field in request.model_fields.items():
        if name == "prompt" and field.is_required():
            parser.add_argument(name, nargs="?", help=_help(request, name))
        elif name != "weights":  # one of the common ones
            declared = field.json_schema_extra
            extra: dict[str, Any] = declared if isinstance(declared, dict) else {}
            flag: str | None = extra.get("flag", "--" + name.replace("_", "-"))
            if flag is None:  # a part of another flag's value
                continue
            metavar = extra.get("metavar", flag.removeprefix("--").upper())
            several: dict[str, Any] = {"action": "append"} if name == "seed" else {}
            text = _help(request, name) + (SEEDS_HELP if several else "")
            parser.add_argument(flag, dest=name, metavar=metavar, help=text, **several)


def _add_mode(commands: Any, common: Parser, request: type[DrawRequest]) -> None:
    """Add a mode's command."""
    parser = commands.add_parser(request.mode, parents=[common], help=request.help)
    _add_fields(parser, request)
    parser.add_argument("--from", dest="replay", metavar="FILE", help="take what is not given from a picture")
    parser.add_argument("--count", default="1", metavar="N", help=COUNT_HELP)
    name = f"{request.stem}-SEED.png"
    parser.add_argument("--out", metavar="FILE.png", help=f"where to write; - is standard output (default: {name})")
    parser.add_argument("--out-dir", type=Path, metavar="FOLDER", help=OUT_DIR_HELP.format(name=name))
    parser.set_defaults(run=_draw, request=request)


def _help(request: type[Request], name: str) -> str:
    """Return a field's help line with what it takes."""
    return f"{request.model_fields[name].description} Takes {request.allowed(name)}.".replace("%", "%%")


def _serve(args: argparse.Namespace) -> int:
    from app import server  # it settles the environment before Gradio is imported

    if args.client_waiting < 0:
        raise RequestError("client_waiting", args.client_waiting, "a whole number, 0 for as many as of all")
    server.serve(
        _engine(args, client_limit=args.client_waiting),
        host=args.host,
        port=args.port,
        auth=args.auth,
        auth_file=args.auth_file,
        insecure=args.insecure,
        allow_hosts=args.allow_host,
        client_requests=args.client_requests,
        client_gb=args.client_gb,
        api_keys=args.api_key,
        api_keys_file=args.api_keys,
        manage_models=args.manage_models,
    )
    return 0


def _mcp(args: argparse.Namespace) -> int:
    from web import mcp  # it takes longer to import than most commands run

    folder = args.out_dir
    if folder is None:
        home = Path.home()
        pictures = home / "Pictures"
        folder = (pictures if pictures.is_dir() else home) / "z-image-studio"
    mcp.serve_pipe(_engine(args), folder.absolute())
    return 0


def _draw(args: argparse.Namespace) -> int:
    """Draw the pictures of a command, one after the other with one engine; the first failure ends it."""
    asked, left_out, again = _asked(args)
    requests = _requests(args, asked)
    several = len(requests) > 1 or args.out_dir is not None
    _check_target(args, requests)
    if left_out:
        told = ", ".join(" ".join(f"{name}: {value}".split())[:TOLD] for name, value in left_out.items())
        _to_stderr(str(Message("not_restored", "Not restored: {names}", names=told)))
    skipped = [path for request in requests if (path := _named(args, request)) and path.exists()]
    for path in skipped:
        _to_stderr(f"skipped: {path} is there")
    due = [request for request in requests if _named(args, request) not in skipped]
    drawn: list[dict[str, Any]] = []
    failure: Failure | None = None
    engine = _engine(args)
    with closing(_Progress(len(due))) as progress:
        for request in due:
            last = _follow(engine, request, progress)
            saved = last if isinstance(last, Failure) else _save(args, last, progress)
            if isinstance(saved, Failure):
                failure = saved
                break
            if again and isinstance(last, Result):
                saved |= _compared(again, last)
            drawn.append(saved)
    if failure and several:
        _to_stderr(f"{len(drawn)} of {len(due)} pictures are drawn.")
    facts = {"pictures": drawn, "skipped": [str(path) for path in skipped]} if several else dict(*drawn)
    if failure:
        return _fail(failure, args.json, **facts)
    if args.json:
        _print_json(facts | ({"not_restored": left_out} if left_out else {}))
    return 0


def _requests(args: argparse.Namespace, asked: DrawRequest) -> list[DrawRequest]:
    """Return what is to be drawn: as often as `--seed` and `--count` say, each seed once.

    Raises:
        RequestError: a seed or the count is not possible.
    """
    if not re.fullmatch(r"0*[1-9][0-9]{0,3}", args.count):
        raise RequestError("count", args.count, f"a whole number from 1 to {MAX_COUNT}")
    count, firsts = int(args.count), [asked.check("seed", seed) for seed in args.seed or [asked.seed]]
    if len(firsts) == count == 1 and args.out_dir is None:
        return [asked]  # the engine picks a seed where there is none
    firsts = [first or random_seed() for first in firsts]
    seeds = dict.fromkeys((first + more - 1) % SEED_MAX + 1 for first in firsts for more in range(count))
    return [asked.model_copy(update={"seed": seed}) for seed in seeds]


def _named(args: argparse.Namespace, request: DrawRequest) -> Path | None:
    """Return where a picture is to lie in `--out-dir`, if that is given."""
    return None if args.out_dir is None else args.out_dir / f"{metadata.file_stem(request)}.png"


def _check_target(args: argparse.Namespace, requests: Sequence[DrawRequest]) -> None:
    """Refuse, before any work is done, what the pictures could not be written to; make the folder that is asked for.

    Raises:
        RequestError: it is no name for so many pictures, or it cannot be written to.
    """
    if args.out is not None and args.out_dir is not None:
        raise RequestError("out", args.out, "not given where --out-dir is")
    if args.out is not None and len(requests) > 1:
        raise RequestError("out", args.out, f"for one picture, not for {len(requests)}; --out-dir takes any number")
    if args.out == STDOUT:
        if args.json:
            raise RequestError("out", STDOUT, "a file where --json is given: both would write to standard output")
        if sys.stdout.isatty():
            raise RequestError("out", STDOUT, "for a pipe or a file, as in --out - > fox.png")
        return
    if args.out_dir is not None:
        try:
            args.out_dir.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            wanted = f"a folder that can be made ({getattr(error, 'strerror', None) or error})"
            raise RequestError("out_dir", str(args.out_dir), wanted) from error
    # What it is called by default shows later, with the seed.
    out = Path(args.out) if args.out else _named(args, requests[0]) or metadata.free_path(Path(requests[0].stem))
    _check_out(out, metadata.sidecar_path(out))


def _save(args: argparse.Namespace, result: Result, progress: _Progress) -> dict[str, Any] | Failure:
    """Write a picture where it belongs and say so; return its facts."""
    request = result.request
    stem = Path(metadata.file_stem(request))
    path = Path(args.out) if args.out else _named(args, request) or metadata.free_path(stem)
    facts: dict[str, Any] = {"seed": request.seed, **result.sidecar}
    if args.out == STDOUT:
        sys.stdout.buffer.write(result.png)
        sys.stdout.flush()
    else:
        try:
            sidecar = metadata.save(result, path)
        except NotWritten as error:
            return _kept_elsewhere(result, error)
        facts = {"file": str(path), "json": str(sidecar), **facts}
        if not args.json:
            progress.print(str(path))
    for note in result.notes:
        progress.tell(str(note))
    said = f" {result.weights_note}" if progress.is_first else ""
    if not args.json:
        progress.tell(f"seed {request.seed}, {result.seconds['total']:.1f} s.{said}")
    return facts


def _compared(again: _Again, result: Result) -> dict[str, Any]:
    """Say whether a picture that is drawn again is the same, byte for byte, and if not, what is not as it was."""
    same = again.data == result.png
    differs = {} if same else metadata.differences(again.found, result)
    if same:
        told = Message("same_bytes", "The same as {name}, byte for byte.", name=again.name)
    elif differs:
        text = "Not the same as {name}, byte for byte. What is not as it was: {names}."
        names = "; ".join(f"{name} ({before}, now {now})" for name, (before, now) in differs.items())
        told = Message("other_bytes", text, name=again.name, names=names)
    else:
        text = (
            "Not the same as {name}, byte for byte, though the request, the weights and the version are: another "
            "device, processor or version of a library computes a little differently."
        )
        told = Message("other_machine", text, name=again.name)
    _to_stderr(str(told))
    return {"replay": {"of": again.name, "same_bytes": same, "differs": differs}}


def _kept_elsewhere(result: Result, error: NotWritten) -> Failure:
    """Save a picture that has no place where it was to go, and return the failure that tells where it is now."""
    failure = Failure.of(error)
    stem = metadata.file_stem(result.request)
    for folder in (Path(), Path(tempfile.gettempdir())):
        try:
            kept = metadata.free_path(folder / stem)
            metadata.save(result, kept)
        except (OSError, NotWritten):
            continue
        text = "{failure}. The picture is in {kept} instead"
        values: dict[str, Any] = {"kept": str(kept.absolute())}
        break
    else:
        text, values = "{failure}; the same picture comes again with --seed {seed}", {"seed": result.request.seed}
    message = Message(failure.code, text, failure=failure.message, **values)
    return replace(failure, message=message, values={**failure.values, **values})


class _Again(NamedTuple):
    """A picture of ours that is drawn again as it is: its file's name and bytes, and its parameters."""

    name: str
    data: bytes
    found: Parameters


class _Asked(NamedTuple):
    """What is asked for, what of a picture has no place in it, and the picture if it is drawn again as it is."""

    request: DrawRequest
    left_out: dict[str, str]
    again: _Again | None


def _asked(args: argparse.Namespace) -> _Asked:
    fields = args.request.model_fields
    given = {name: value for name in fields if (value := getattr(args, name, None)) is not None}
    given |= _lora(given) | ({"seed": args.seed[0]} if args.seed else {})
    if not args.replay:
        return _Asked(args.request.parse(**given), {}, None)
    path = Path(args.replay)
    found = _replayed(args.request, path, given)
    asked = {name: value for name, value in given.items() if (name, value) != ("weights", "auto")}
    instead = {LABELS.get(name, name) for name in asked}
    left_out = {name: value for name, value in found.not_restored.items() if name not in instead}
    changed = set(asked) - {*args.request.files, "lora", "lora_strength", "checkpoint"} or args.count != "1"
    ours = found.source == metadata.REQUEST_CHUNK and not changed
    return _Asked(found.request(**asked), left_out, _Again(path.name, path.read_bytes(), found) if ours else None)


def _preprocess(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in Preprocess.model_fields if getattr(args, name) is not None}
    request = Preprocess.parse(**given)
    _check_out(args.out)
    control = _engine(args).control_image(request)
    with replacing(args.out) as file:
        control.image.save(file, "PNG")
    for note in control.notes:
        _to_stderr(str(note))
    notes = [str(note) for note in control.notes]
    facts = {"file": str(args.out), "size": control.image.size, "digest": control.digest, "notes": notes}
    if args.json:
        _print_json(facts)
    else:
        print(args.out)
    return 0


def _lora(given: dict[str, Any]) -> dict[str, str]:
    """Split `--lora FILE:STRENGTH`. What stands before a colon may also be a drive, and a file's name may hold one."""
    match = re.fullmatch(
        r"(.+\.safetensors):([^:/\\]*)|(..+):([-+]?\d*\.?\d+)", given.get("lora", ""), re.IGNORECASE | re.DOTALL
    )
    if match is None:
        return {}
    return {"lora": match[1] or match[3], "lora_strength": match[2] if match[1] else match[4]}


def _replayed(request: type[DrawRequest], path: Path, given: Mapping[str, Any]) -> Parameters:
    """Return the parameters of an image, which must be of this command's mode.

    Args:
        request: the mode's.
        path: the image.
        given: fields that are given, and so need not be found again.

    Raises:
        RequestError: it is another mode's, or it was drawn with a file that is not at hand and not among those given.
    """
    found = metadata.read_picture(path)
    if found.mode != request.mode:
        raise RequestError("from", path.name, f"a picture made by {request.mode}; this one is of {found.mode}")
    for name in (*request.files, "lora"):
        if found.values.get(name) and name not in given:
            _check_same_file(name, found)
    if found.values.get("checkpoint") and "checkpoint" not in given:
        _check_same_checkpoint(found)
    return found


def _check_same_file(name: str, found: Parameters) -> None:
    """Refuse to replay with another file of the same name; an image holds a file's name and digest, not its place."""
    file, digest = str(found.values[name]), found.inputs.get(name)
    wanted = f"the file that this picture was made with (SHA-256 {digest or 'unknown'}); give it with --{name} FILE"
    try:
        if name == "lora":
            at_hand = lora.file.identify(lora.file.read(lora.file.find(file))).digest
        else:
            at_hand = Upload.open(Path(file), name).digest
    except RequestError:
        raise RequestError(name, file, wanted) from None
    if at_hand != digest:
        raise RequestError(name, file, wanted)


def _check_same_checkpoint(found: Parameters) -> None:
    """Refuse to replay with another checkpoint of the same name, as `_check_same_file`."""
    name, expected = found.values["checkpoint"], found.inputs.get("checkpoint", "unknown")
    try:
        same = fingerprint(fine_tunes.find(name).files) == expected
    except (RequestError, OSError):
        same = False
    if not same:
        wanted = f"the checkpoint that drew this picture ({expected}); give it with --checkpoint FILE"
        raise RequestError("checkpoint", name, wanted)


def _inspect(args: argparse.Namespace) -> int:
    facts = inspection.inspected(args.file)
    if "matched" in facts and not args.json:
        facts["matched"] = f"{len(facts['matched'])} modules (--json lists them)"
    _print_facts(facts, args.json)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    environment.prepare_environment(os.environ)
    chosen = inventory.choose(args.weights, TextToImage.mode, "turbo")
    on = {kind: device.choose_device(args.device, kind, args.dtype) for kind in get_args(WeightsKind)}
    total, available = host_memory.total_and_free()
    plans = {
        kind: {
            mode: [str(reason) for reason in memory.plan_for(on[kind], mode, kind, memory_gb=args.memory).reasons]
            for mode in (TextToImage.mode, ControlNet.mode)
        }
        for kind in get_args(WeightsKind)
    }
    facts = {
        "version": metadata.APP_VERSION,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: importlib.metadata.version(name) for name in ("torch", "diffsynth", "transformers", "gradio")},
        "device": _described(on[chosen.kind]),
        **({} if chosen.kind == "full" else {"device for the real weights": _described(on["full"])}),
        "processor": {work: str(pair) for work, pair in vars(measure.speeds()).items()},
        "memory": f"{parts.size_text(available)} of {parts.size_text(total)} free",
        "weights": f"{chosen.kind}: {chosen.reason}",
        "memory plan": plans[chosen.kind],
        **({} if chosen.kind == "full" else {"memory plan for the real weights": plans["full"]}),
        "models": hub.command.inventory_lines(),
    }
    _print_facts(facts, args.json)
    return 0


def _described(on: device.Device) -> str:
    return f"{on.name} ({on.kind}, {on.dtype}): {on.reason}"


def _engine(args: argparse.Namespace, **more: Any) -> Engine:
    """Return an engine as the common flags have it; `more` are settings of one command alone."""
    return Engine(Settings(weights=args.weights, device=args.device, dtype=args.dtype, memory_gb=args.memory, **more))


class _Progress:
    """Shows on stderr how far a command is: lines, or on a terminal a bar over all pictures where there are several."""

    def __init__(self, pictures: int) -> None:
        self._pictures, self._done, self._line = pictures, 0, ""
        self._bar: Any = None
        if pictures > 1 and sys.stderr.isatty():
            from tqdm import tqdm  # a tenth of a second

            form = "{desc}|{bar}| {n:.1f} of {total} pictures [{elapsed}, {remaining} left]"
            self._bar = tqdm(total=pictures, bar_format=form, dynamic_ncols=True, file=sys.stderr)

    def show(self, event: Event) -> None:
        """Show what happens to the picture that is being drawn."""
        line = progress_text(event)
        if self._bar is not None:
            self._bar.set_description_str(line + " ", refresh=False)
            part = event.index / event.total if isinstance(event, Step) else 0
            self._bar.update(max(self._done + part - self._bar.n, 0))
        elif line != self._line:
            self.tell(f"{self._done + 1} of {self._pictures}: {line}" if self._pictures > 1 else line)
        self._line = line

    def finish(self) -> None:
        """Count a picture as drawn."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._done - self._bar.n)

    @property
    def is_first(self) -> bool:
        """Whether no more than one picture is drawn."""
        return self._done <= 1

    def tell(self, line: str) -> None:
        """Print a line on stderr, above the bar."""
        with self._aside():
            _to_stderr(line)

    def print(self, line: str) -> None:
        """Print a line on stdout, which may be the same terminal."""
        with self._aside():
            print(line)

    def _aside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._bar is None else self._bar.external_write_mode(file=sys.stderr)

    def close(self) -> None:
        """Leave a bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _follow(engine: Engine, request: DrawRequest, progress: _Progress) -> Result | Failure:
    """Run a request, showing how far it is; return its last event."""
    for event in engine.run(request):
        if isinstance(event, Result | Failure):
            progress.finish()
            return event
        progress.show(event)
    raise AssertionError("a run ends with a Result or a Failure")


def _fail(failure: Failure, as_json: bool, **facts: Any) -> int:
    _to_stderr(failure.text)
    if as_json:
        error = {"code": failure.code, "message": failure.text, **plain(failure.values)}
        _print_json({"error": error, **facts})
    return failure.exit_code


def _check_out(path: Path, *beside: Path) -> None:
    """Refuse, before any work is done, a name that the image could not be written to, or the files beside it."""
    if path.suffix.lower() != ".png" or not os.path.isdir(path.parent) or os.path.isdir(path):
        raise RequestError("out", str(path), "a file name that ends in .png, in a folder that exists")
    try:
        check_writable(path, *beside)
    except NotWritten as error:
        text = "a file that can be written; {path} cannot ({reason})"
        raise RequestError("out", str(path), Message("out_closed", text, **error.values)) from error


def _print_facts(facts: dict[str, Any], as_json: bool, indent: str = "") -> None:
    """Print facts, of which some come out of files: nothing in them can steer a terminal or pass for another fact."""
    if as_json:
        _print_json(facts)
        return
    for name, value in facts.items():
        name = _on_one_line(str(name))
        if isinstance(value, dict):
            print(f"{indent}{name}:" if value else f"{indent}{name}: none")
            _print_facts(value, False, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{name}:")
            print("\n".join(f"{indent}  {_on_one_line(str(item))}" for item in value))
        else:
            print(f"{indent}{name}: {_visible(str(value)).replace(chr(10), chr(10) + indent + '    ')}")


def _print_json(facts: dict[str, Any]) -> None:
    """Print one JSON object on one line; what is no number in JSON (NaN, infinity) is a text."""
    text = json.dumps(all_finite(facts), ensure_ascii=not console.takes_any_letter(), allow_nan=False)
    print("".join(json.dumps(letter)[1:-1] if _is_hidden(letter) else letter for letter in text))


def _visible(text: str) -> str:
    """Return a text with what a terminal would obey or hide written out, line ends and tabs aside."""
    return "".join(
        letter.encode("unicode_escape").decode() if letter not in "\n\t" and _is_hidden(letter) else letter
        for letter in text
    )


def _on_one_line(text: str) -> str:
    return _visible(text).replace("\n", "\\n")


def _is_hidden(letter: str) -> bool:
    """Return whether a character controls a terminal, orders or hides text, or is half of one."""
    joiners = "\u200c\u200d"  # of scripts and of emoji
    return letter not in joiners and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _to_stderr(line: str) -> None:
    print(_visible(line), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
