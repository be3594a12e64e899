"""The web server: its options, and serving the page on this machine or on a Space.

Importing it loads no torch, draws nothing and listens to nothing.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from core import environment
from core.errors import NotWritten, RequestError
from core.request import MODES
from core.whole_file import check_writable
from engine import Engine, worker_zerogpu, zerogpu
from hub import links, parts
from hub.download_job import DownloadJob
from web import language, listening, logins, own_files, programs, theme
from web.allowed_hosts import AllowedHosts, checked, is_loopback
from web.api_keys import ApiKeys
from web.client_limits import ClientLimits, LimitsOfClients
from web.first_paint import FirstPaint
from web.logins import LoginLimits
from web.malformed import Malformed
from web.origins import Origins
from web.page import HEAD, build
from web.readers import Reading
from web.real_model import Manager
from web.run import THREADS
from web.upload_limits import MAX_LORA, UploadLimits
from web.visits import Visiting, sweeping

log = logging.getLogger(__name__)

HOST, PORT = "127.0.0.1", 7860
NO_KEYS = ApiKeys()
PAGE_CLOSED = "This page is closed: start the server with --auth USER:PASSWORD. Programs may come in with an API key."


def serve(
    engine: Engine | None = None,
    *,
    host: str = HOST,
    port: int = PORT,
    auth: str | None = None,
    auth_file: str | None = None,
    insecure: bool = False,
    allow_hosts: Sequence[str] = (),
    client_requests: int | None = None,
    client_gb: float | None = None,
    api_keys: Sequence[str] = (),
    api_keys_file: str | None = None,
    manage_models: bool = False,
) -> None:
    """Serve the page until the process is stopped.

    Args:
        engine: what draws; a new one where none is given.
        host: the address to listen on, or a name of this machine. On a Space, the Space decides.
        port: the port to listen on, 1 to 65535; 0 takes a free one.
        auth: "user:password" that visitors must give, or None.
        auth_file: a file that holds it in place of `auth`; where neither is given, Z_IMAGE_AUTH may hold it.
        insecure: allow an address that other machines reach without `auth`.
        allow_hosts: names that visitors may call this server by, besides those of this machine alone. Where none is
            given and `host` is open to other machines, any name is answered: it cannot be known.
        client_requests: how many requests one address may send in a minute, 0 for any number; None for the usual.
        client_gb: how many GB it may upload in an hour, likewise.
        api_keys: of which programs must show one, where there are any; those of Z_IMAGE_API_KEYS count too.
        api_keys_file: a file with more of them, one a line.
        manage_models: let every visitor fetch the real model from the page; else only those at this machine may, where
            nobody else is meant to come: `host` is this machine's alone, and no proxy is announced.

    Raises:
        RequestError: `auth`, a key, a name, a limit, `host` or `port` is malformed or not to be had, `host` is open to
            other machines without `auth` and keys, or the value of GRADIO_ROOT_PATH, GRADIO_TEMP_DIR or TMPDIR is not
            possible.
    """
    account, keys = logins.account(auth, auth_file), ApiKeys.collect(api_keys, api_keys_file)
    options = launch_options(host, port, account, insecure, allow_hosts, keys)
    limits = ClientLimits.of(client_requests, client_gb)
    if not environment.on_space():
        options["server_name"], options["server_port"] = listening.place(host, port)
    with _uploads():
        engine = engine or Engine()
        limited = Middleware(LimitsOfClients, limits=limits, modes=set(MODES), is_full=engine.is_full)
        options["app_kwargs"]["middleware"] += [limited, Middleware(Reading)]
        # Gradio's name for the requests that it works on.
        options["max_threads"] = engine.settings.queue_limit + THREADS
        if environment.on_space():
            link_preloaded()
        if zerogpu.ACTIVE:
            # Here, and only on ZeroGPU: `launch` packs what lies on "cuda" by then.
            engine.worker = worker_zerogpu.ZeroGpuWorker(engine.settings)
        manager = None
        if manage_models or is_for_this_machine(host, allow_hosts):
            manager = Manager(DownloadJob(), everybody=manage_models)
            manager.job.restore()
        page = build(engine, manager)
        closed = programs_closed(host, account, insecure, keys)
        private, root_path = is_for_this_machine(host, allow_hosts), options.get("root_path", "")
        options["app_kwargs"]["routes"] += programs.routes(engine, keys, closed, root_path, private)
        with own_files.gone_at_the_end(page):
            try:
                with environment.without_proxies():
                    _, url, _ = page.launch(**options, share=False, quiet=True, prevent_thread_lock=True)
            except OSError as error:  # Gradio's way of saying so; nothing else is opened before the port
                raise RequestError("port", port, listening.PORTS) from error
            # Of listeners other than runs, which have threads of their own. It may be one, or None for the usual.
            page.limiter = anyio.CapacityLimiter(THREADS)  # type: ignore[assignment]
            print(f"{theme.TITLE} is at {url} (Ctrl+C stops it)", flush=True)
            page.block_thread()


def is_for_this_machine(host: str, allow_hosts: Sequence[str]) -> bool:
    """Whether nobody but those at this machine is meant to use the page."""
    return is_loopback(host) and not (allow_hosts or _root_path() or environment.on_space())


def link_preloaded() -> None:
    """Link what was preloaded to `models/`, where a Space keeps no files of its own; the app runs without them too."""
    try:
        made = links.link()
    except OSError as error:
        log.warning("no links to the preloaded weights: %s", error)
    else:
        log.info("links to the preloaded weights: %d made, of %d parts", len(made), len(parts.PARTS))


def launch_options(
    host: str,
    port: int,
    auth: str | None,
    insecure: bool,
    allow_hosts: Sequence[str] = (),
    api_keys: ApiKeys = NO_KEYS,
) -> dict[str, Any]:
    """Return the keyword arguments for `Blocks.launch`.

    Raises:
        RequestError: as `serve`.
    """
    options: dict[str, Any] = {
        "theme": theme.build(),
        "css": theme.icons(),
        "css_paths": [theme.CSS],
        "head": HEAD,
        "favicon_path": str(theme.FAVICON),
        # Gradio compresses its assets; the page itself and its configuration, 350 and 300 kB, it does not.
        "app_kwargs": {
            "routes": theme.routes(),
            "lifespan": sweeping,
            "middleware": [
                Middleware(Visiting),
                Middleware(UploadLimits, folder=get_upload_folder, apart=programs.PREFIX),
                Middleware(GZipMiddleware),
                Middleware(FirstPaint),
                Middleware(Malformed, apart=programs.PREFIX),
            ],
        },
        "max_file_size": MAX_LORA,
        "state_session_capacity": 1000,  # of which each takes a third of a megabyte
        "footer_links": [],  # the header has what is needed of them
        "i18n": language.for_gradio(),
        "run_history": False,  # it would keep every visitor's prompts in their browser
        "enable_monitoring": False,
        "show_error": True,
        "pwa": False,
    }
    if auth is not None:
        options["auth"] = logins.parts(auth)
        options["app_kwargs"]["middleware"].append(Middleware(LoginLimits))
    names = [checked(name) for name in allow_hosts]
    if environment.on_space():
        return options  # its address, port and name come from its environment
    server_name = listening.in_url(host)
    if auth is None and not insecure and not is_loopback(host):
        if not api_keys:
            raise RequestError(
                "host", host, f"{HOST} (this machine only); any other address together with --auth-file FILE (a line "
                "USER:PASSWORD), --auth USER:PASSWORD or Z_IMAGE_AUTH for the page, --api-key KEY for programs, or "
                "both, or with --insecure if everybody who reaches it may use it"
            )  # fmt: skip
        options |= {"auth": lambda user, password: False, "auth_message": PAGE_CLOSED}
    root_path = _root_path()
    in_front = urlsplit(root_path).hostname
    middleware = [Middleware(Origins, names=[*names, in_front] if in_front else names)]
    if is_loopback(host) or names:
        # Gradio asks at the address that it listens on whether it is up.
        middleware.insert(0, Middleware(AllowedHosts, names=[*names, host]))
    options["app_kwargs"]["middleware"][:0] = middleware
    return options | {"server_name": server_name, "server_port": port, "root_path": root_path}


def programs_closed(host: str, auth: str | None, insecure: bool, api_keys: ApiKeys) -> bool:
    """Whether the routes for programs let nobody in: no key is asked for where the page is, or has to be, guarded."""
    if api_keys or insecure:
        return False
    return auth is not None or not (environment.on_space() or is_loopback(host))


def _root_path() -> str:
    """Return where a proxy in front of us serves the page, as GRADIO_ROOT_PATH says: a path, an address, or nothing."""
    given = os.environ.get("GRADIO_ROOT_PATH", "").strip()
    if not re.fullmatch(r"((https?://[^/?#\s]+)?(/[^?#\s]*)?)", given):
        raise RequestError("GRADIO_ROOT_PATH", given, "a path such as /studio, or a whole address such as "
            "https://example.com/studio")  # fmt: skip
    return given.rstrip("/")


@contextmanager
def _uploads() -> Iterator[None]:
    """Hold a place for the pictures that visitors bring and get; refuse to start where they could not be written."""
    try:
        named, folder = "TMPDIR", os.environ.get("TMPDIR", "")
        try:
            own_files.settle()
            named, folder = "GRADIO_TEMP_DIR", get_upload_folder()
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            check_writable(Path(folder, "picture.png"))
        except (OSError, NotWritten) as error:
            reason = error.values["reason"] if isinstance(error, NotWritten) else error.strerror or error
            allowed = f"a folder that can be written to; this one cannot ({reason})"
            raise RequestError(named, folder, allowed) from error
        yield
    finally:
        own_files.leave()
