"""The panel "Get the real model": what of it is on this machine, and fetching the rest by one press.

The download belongs to the server, and every page that may see it sees the same. Only who sits at the machine may, as
far as that can be told, or everybody where the server was started so; each listener asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import gradio as gr
from gradio.blocks import Block

from core.errors import StudioError
from core.messages import Message
from core.request import TextToImage
from engine import Engine
from hub.download import disk_free
from hub.download_job import DownloadJob, Look, Order
from hub.inventory import Found, find_all
from hub.parts import OFFICIAL, PARTS, REPACKAGED, Edition, needs, size_text, weight
from hub.places import hub_cache
from web.allowed_hosts import is_local as names_this_machine
from web.allowed_hosts import is_loopback, without_port
from web.fields import QUIET, REWORD_JS, Update
from web.form import RAW, Form
from web.language import Say, fixed, say_to
from web.words import paragraph, time_left, upper, working_on

TITLE = "Get the real model"
PARTS_NEEDED = needs(TextToImage.mode, "turbo")
HELD = ("paused", "failed")  # states from which a download goes on
TICK = 1.0  # seconds between two looks while something is fetched

# What a proxy adds to a request that it passes on: where one of these is, the visitor is somewhere else.
FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")

EDITIONS: Mapping[Edition, str] = {
    OFFICIAL: "The official files, as published: {size}",
    REPACKAGED: "The same model as Comfy-Org repackaged it, in 16-bit numbers: {size}",
}

NAMES: Mapping[str, Message] = {
    "turbo": Message("part", "Turbo's transformer"),
    "text_encoder": Message("part", "text encoder"),
    "vae": Message.word("VAE"),
    "tokenizer": Message("part", "tokenizer"),
}

# A screen reader is told at every tenth: the figures beside the bar change each second.
SAID_JS = 'element.setAttribute("role", "status");'


@dataclass(frozen=True)
class Manager:
    """The server's download, and who may see and steer it.

    Attributes:
        job: the download.
        everybody: whether all visitors may, and not only those at this machine.
    """

    job: DownloadJob
    everybody: bool = False

    def may(self, visitor: gr.Request) -> bool:
        """Whether a visitor may see and steer it."""
        return self.everybody or is_local(visitor)


def is_local(visitor: gr.Request) -> bool:
    """Whether a request comes from this machine, of a page of this server, and not by way of a proxy."""
    headers = {name.lower(): value for name, value in dict(visitor.headers).items()}
    client = visitor.client.host if visitor.client else ""
    name = without_port(headers.get("host", ""))
    named_locally = name is not None and names_this_machine(name)
    origin = headers.get("origin")
    same_site = origin is None or origin.partition("://")[2] == headers.get("host")
    return is_loopback(client) and named_locally and same_site and not any(name in headers for name in FORWARDED)


@dataclass(frozen=True)
class Panel:
    """The components.

    Attributes:
        place: what opens, behind its name in the header.
        facts: what is here, what is missing, the disk, the memory, the time.
        edition: the choice of what is fetched.
        begin, pause, go_on, cancel: the buttons.
        progress: how far it is, for the eye.
        said: the same for a screen reader.
        timer: looks while something is fetched.
        finished: how many downloads had ended when this page looked last.
    """

    place: gr.Accordion
    facts: gr.HTML
    edition: gr.Radio
    begin: gr.Button
    pause: gr.Button
    go_on: gr.Button
    cancel: gr.Button
    progress: gr.HTML
    said: gr.HTML
    timer: gr.Timer
    finished: gr.State

    @property
    def followed(self) -> list[Block]:
        """What `_followed` changes."""
        steering = [self.begin, self.pause, self.go_on, self.cancel]
        return [self.place, self.edition, *steering, self.progress, self.said, self.timer, self.finished]


def lay_out() -> Panel:
    """Make the components where the page's header stands now; nobody sees them yet."""
    with gr.Accordion(
        fixed(TITLE), open=False, visible=False, elem_id="real-model", elem_classes=["download"]
    ) as place:
        facts = gr.HTML(js_on_load=REWORD_JS, elem_classes=["facts"])
        edition = gr.Radio(
            [OFFICIAL, REPACKAGED], value=OFFICIAL, label=fixed("What to fetch"), elem_classes=["edition"]
        )
        progress = gr.HTML(elem_classes=["status", "progress"])
        said = gr.HTML(js_on_load=SAID_JS, elem_classes=["sr-only"])
        with gr.Row(elem_classes=["steering"]):
            begin = gr.Button(fixed("Fetch"), variant="primary", visible=False, elem_classes=["begin"])
            go_on = gr.Button(fixed("Go on"), variant="primary", visible=False, elem_classes=["go-on"])
            pause = gr.Button(fixed("Pause"), visible=False, elem_classes=["pause"])
            cancel = gr.Button(fixed("Cancel"), visible=False, elem_classes=["give-up"])
    timer = gr.Timer(TICK, active=False)
    return Panel(place, facts, edition, begin, pause, go_on, cancel, progress, said, timer, gr.State(0))


def wire(page: gr.Blocks, panel: Panel, manager: Manager, engine: Engine, form: Form) -> None:
    """Wire the panel; when a download has ended, `form` is shown again, with what the new weights can draw."""
    job = manager.job

    def let_in(visitor: gr.Request) -> Say:
        """Return what words the panel for a visitor who may see it."""
        say = say_to(visitor)
        if not manager.may(visitor):
            raise gr.Error(say("The weights are managed at the machine that serves this page."), print_exception=False)
        return say

    def arrive(visitor: gr.Request) -> Update:
        if not manager.may(visitor):
            return {panel.place: gr.skip()}
        now, say = job.look(), say_to(visitor)
        return {  # the rest is filled in when it is opened
            panel.place: gr.Accordion(label=_label(now, say), visible=True),
            panel.timer: _timer(now),
            panel.finished: now.finished,
        }

    def follow(visitor: gr.Request) -> Update:
        return _followed(panel, job.look(), let_in(visitor))

    def look(visitor: gr.Request) -> Iterator[Update]:
        """Show what is on this machine, and then what drawing would be like, which takes longer to tell."""
        say = let_in(visitor)
        found = _found()
        here = _here(found, say, engine)
        followed = _followed(panel, job.look(), say, found)
        yield {panel.facts: here + paragraph(say("Looking at this machine")), **followed}
        yield {panel.facts: here + _outlook(engine, say)}

    def begin(edition: Edition, visitor: gr.Request) -> Update:
        say = let_in(visitor)
        if edition in EDITIONS:
            job.begin(Order(PARTS_NEEDED, edition))
        return _followed(panel, job.look(), say)

    def steering(act: Callable[[], None]) -> Callable[[gr.Request], Update]:
        def steer(visitor: gr.Request) -> Update:
            say = let_in(visitor)
            act()
            return _followed(panel, job.look(), say)

        return steer

    page.load(arrive, None, panel.followed, **QUIET)
    gr.on([panel.place.expand, panel.facts.input], look, None, [panel.facts, *panel.followed], **QUIET)
    panel.timer.tick(follow, None, panel.followed, **QUIET)
    panel.begin.click(begin, panel.edition, panel.followed, **RAW)
    for button, act in ((panel.pause, job.pause), (panel.go_on, job.go_on), (panel.cancel, job.cancel)):
        button.click(steering(act), None, panel.followed, **QUIET)
    panel.finished.change(look, None, [panel.facts, *panel.followed], **QUIET)
    if form.refresh:
        panel.finished.change(*form.refresh, **RAW)


def _followed(panel: Panel, now: Look, say: Say, found: Sequence[Found] | None = None) -> Update:
    """Return what shows how far the download is, and what can be done; `found` is what is here, where that is known."""
    running, held = now.state == "running", now.state in HELD
    missing = [] if running or held else [part for part in found or _found() if not part.present]
    return {
        panel.place: gr.Accordion(label=_label(now, say)),
        panel.edition: gr.Radio(_choices(missing, say), visible=bool(missing)),
        panel.begin: gr.Button(visible=bool(missing)),
        panel.pause: gr.Button(visible=running),
        panel.go_on: gr.Button(visible=held),
        panel.cancel: gr.Button(visible=running or held),
        panel.progress: _progress(now, say),
        panel.said: _said(now, say),
        panel.timer: _timer(now),
        panel.finished: now.finished,
    }


def _timer(now: Look) -> gr.Timer:
    """Return what looks again, also while it is paused: another page may go on with it."""
    return gr.Timer(active=now.state == "running" or now.state in HELD)


def _found() -> list[Found]:
    return find_all(parts=[PARTS[name] for name in PARTS_NEEDED])


def _choices(missing: Sequence[Found], say: Say) -> list[tuple[str, str]]:
    """Return what can be chosen, each with what is missing of it weighs."""
    names = [part.part.name for part in missing]
    return [(say(text, size=size_text(weight(names, edition))), edition) for edition, text in EDITIONS.items()]


def _percent(now: Look) -> float:
    return 100 * now.progress.done / max(now.progress.total, 1) if now.progress else 0.0


def _label(now: Look, say: Say) -> str:
    """Return what the header calls the panel."""
    return say("Fetching: {percent} %", percent=int(_percent(now))) if now.state == "running" else say(TITLE)


def _said(now: Look, say: Say) -> str:
    """Return how far it is, in tenths, so that a screen reader is not told each second."""
    return paragraph(_sentence(now, say, int(_percent(now)) // 10 * 10)) if now.state != "idle" else ""


def _sentence(now: Look, say: Say, percent: int) -> str:
    match now.state:
        case "running" if now.progress is None:
            return say("Asking the hub what there is")
        case "running":
            return say("Fetching: {percent} %", percent=percent)
        case "paused":
            return say("Paused. What has arrived is kept, also when the server is stopped.")
        case "failed":
            return upper(say(now.error or ""))
    return say("The real model is here: the next picture is drawn with it.")


def _progress(now: Look, say: Say) -> str:
    """Return how far it is, in figures."""
    if now.state == "idle":
        return ""
    sentence, aside, progress = _sentence(now, say, int(_percent(now))), "", now.progress
    if progress and now.state != "done":
        aside = say("{done} of {total}", done=size_text(progress.done), total=size_text(progress.total))
        if now.speed:
            aside += f", {size_text(round(now.speed))}/s"
        if now.left is not None:
            aside += ", " + time_left(now.left, say)
    if now.state == "done":
        return paragraph(sentence)
    fraction = int(_percent(now)) / 100 if progress else None
    if now.state == "failed":
        return working_on(say, "", aside, fraction or 0.0) + f'<p class="failed">{escape(sentence)}</p>'
    return working_on(say, sentence, aside, fraction)


def _here(found: Sequence[Found], say: Say, engine: Engine) -> str:
    """Return what is on this machine of what is needed, and what room there is for the rest."""
    folder = hub_cache()
    lines = []
    for part in found:
        name = upper(say(NAMES[part.part.name]))
        if part.present:
            where = say("{size} in the {source}", size=size_text(part.size), source=say(part.source))
            lines.append(f"<li><b>{escape(name)}</b> {escape(where)}</li>")
        else:
            why = "".join(f'<p class="note">{escape(upper(say(problem)))}</p>' for problem in part.problems[:1])
            lacks = say("missing")
            lines.append(f"<li><b>{escape(name)}</b> {escape(lacks)}{why}</li>")
    told = [f"<ul>{''.join(lines)}</ul>"]
    if not all(part.present for part in found):
        room = say("Free where it goes: {size} ({folder})", size=size_text(disk_free(folder)), folder=str(folder))
        told.append(paragraph(room))
    if engine.settings.weights == "mini":
        told.append(paragraph(say("This server was started to draw with the miniature alone.")))
    return "".join(told)


def _outlook(engine: Engine, say: Say) -> str:
    """Return what would stay in memory, and what a picture would take."""
    try:
        outlook = engine.outlook()
    except StudioError as error:
        return paragraph(upper(say(error.message)))
    size = "{} × {}".format(*outlook.size)
    text = "A picture of {size} in {steps} steps would take {expected}."
    lines = [
        say("Memory: {plan}", plan=outlook.plan),
        say(text, size=size, steps=outlook.steps, expected=outlook.expected.text),
    ]
    if outlook.refused is not None:
        lines.append(say("That is too much for this machine. Possible: {allowed}.", allowed=outlook.refused))
    return "".join(paragraph(line) for line in lines)
