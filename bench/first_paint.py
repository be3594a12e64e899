"""How soon the page shows in a real Chromium, beside a plain Gradio page that takes a prompt and gives a picture.

    .venv/bin/python bench/first_paint.py [--runs 9]

Why: our look, our script and our languages must not cost a visitor time. Both pages are opened in turn, each time as a
new visitor whose browser has nothing cached; names outside of this machine lead nowhere, so that the fonts that plain
Gradio fetches from elsewhere cost it nothing here. `paint` is the browser's first-contentful-paint, `usable` is when
the button to generate can be pressed; both in ms from the start of the navigation. `alike` is our own page as Gradio
alone would show it: its default look, without our styles, script, font and languages. Prints a table, and all figures
as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FLAGS = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
PAGES = ("ours", "plain", "alike")
PAINT = """performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? null"""
BYTES = """performance.getEntriesByType("resource").reduce((sum, one) => sum + one.transferSize, 0)"""


def serve(name: str, port: int) -> None:
    """Serve one of the pages until the process is ended."""
    import web.server  # first: it settles the environment, as for a visitor

    if name == "ours":
        web.server.serve(port=port)
        return
    import gradio as gr

    from engine import Engine
    from web.page import build

    if name == "alike":
        page = build(Engine())
    else:
        with gr.Blocks(analytics_enabled=False) as page:
            prompt, picture = gr.Textbox(label="Prompt"), gr.Image(label="Picture")
            gr.Button("Generate", variant="primary").click(lambda text: None, prompt, picture)
    page.launch(server_name="127.0.0.1", server_port=port, quiet=True)


def started(name: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a page in a process of its own; return it and the address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, "--serve", name, str(port)], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    while process.poll() is None:
        try:
            urllib.request.urlopen(url).close()
            return process, url
        except urllib.error.URLError:
            time.sleep(0.1)
    raise RuntimeError(f"the page {name} did not start")


def visit(browser: Browser, url: str) -> dict[str, float]:
    """Open a page as a new visitor; return `paint` and `usable` in ms, and `bytes` that came over the wire."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    try:
        page = context.new_page()
        page.goto(url, wait_until="commit")
        button = page.get_by_role("button", name="Generate", exact=True).first
        button.wait_for()
        usable = page.evaluate("performance.now()")
        page.wait_for_function(f"({PAINT}) !== null")
        return {"paint": page.evaluate(PAINT), "usable": usable, "bytes": page.evaluate(BYTES)}
    finally:
        context.close()


def measure(runs: int) -> dict[str, dict[str, float]]:
    """Return the medians of all pages, and the spread of the ratios between ours and the plain ones."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("this needs Chromium: apt install chromium")
    servers = {name: started(name) for name in PAGES}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in PAGES}
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
            for run in range(runs + 1):
                for name, (_, url) in servers.items():
                    found = visit(browser, url)
                    if run:  # the first warms up the servers
                        seen[name].append(found)
            browser.close()
    finally:
        for process, _ in servers.values():
            process.terminate()
            process.wait()
    medians: dict[str, dict[str, float]] = {
        name: {what: round(statistics.median(result[what] for result in all_of)) for what in all_of[0]}
        for name, all_of in seen.items()
    }
    for other in PAGES[1:]:
        medians[f"ours/{other}"] = {
            what: round(
                statistics.median(ours[what] / its[what] for ours, its in zip(seen["ours"], seen[other], strict=True)),
                2,
            )
            for what in ("paint", "usable", "bytes")
        }
    return medians


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--serve", nargs=2, metavar=("PAGE", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], int(options.serve[1]))
    else:
        figures = measure(options.runs)
        for name, row in figures.items():
            print(f"{name:12}", "  ".join(f"{what} {value:>10}" for what, value in row.items()))
        print(json.dumps(figures))
