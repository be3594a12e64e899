"""The page: what a visitor sees and presses, and the endpoints that programs call by name.

Data flows one way: the form becomes a request, the engine turns it into events, each event becomes what the page
shows. Knows nothing of pipelines, of files beyond handing them over, of colours, or of how the server is started.
"""

import inspect
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import annotated_types
import gradio as gr
from gradio.blocks import Block

import metadata
import theme
from engine import Engine
from errors import RequestError, StudioError
from request import (
    MODELS,
    SIZES,
    Event,
    Failure,
    Model,
    Queued,
    Result,
    Sizes,
    Stage,
    Step,
    TextToImage,
    WeightsChoice,
    WeightsKind,
)

TITLE = "Z-Image Studio"
MODEL_ZOO = "https://github.com/Tongyi-MAI/Z-Image#-model-zoo"
COMING_SOON = ("Edit", "Omni")

STAGES = {
    "loading": "Loading",
    "encoding": "Reading the prompt",
    "denoising": "Drawing",
    "decoding": "Developing the picture",
    "saving": "Saving the picture",
}

# Which weights draw, and the words to press for more.
WEIGHTS: dict[WeightsKind, tuple[str, str]] = {
    "mini": ("Drawing with the embedded miniature, which knows small flat icons.", "How to get the real weights"),
    "full": ("Drawing with the real weights.", "Which ones"),
}
WEIGHTS_MISSING = ("This model cannot draw yet: its weights are not complete.", "How to get them")

KEPT = "Your form is as you left it."

HEAD = f'''<meta name="color-scheme" content="dark"><script src="{theme.ASSETS_URL}/page.js" defer></script>'''

# Runs once in the browser: the element stays while its text changes, as a screen reader's live region must, and the
# page's look follows whether something is under way.
STATUS_JS = """
element.setAttribute("role", "status");
watch("value", () => document.body.classList.toggle("busy", !!element.querySelector(".working")));
"""

Update = dict[Block, Any]  # what a listener changes: by component, its value or an update of it


def build(engine: Engine) -> gr.Blocks:
    """Return the page. Nothing is loaded and nothing is drawn before a visitor asks for it."""
    # Pictures are copied to Gradio's cache to be served; they go after a day, and when the server stops.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(_header(), elem_id="header")
        weights_line = gr.HTML(elem_id="weights")
        with gr.Tabs(), gr.Tab(TextToImage.help.title().replace(" To ", " to ")):
            _text_to_image(engine, page, weights_line)
        _endpoint(engine)
    # The engine owns the one queue, which is fair and bounded; Gradio's own must not stand before it.
    page.queue(default_concurrency_limit=None)
    return page


@dataclass(frozen=True)
class Situation:
    """What the page says and offers for one model, given the weights on this machine."""

    kind: WeightsKind
    complete: bool
    sentence: str

    @property
    def sizes(self) -> Sizes:
        """Possible widths and heights."""
        return SIZES[self.kind]

    @classmethod
    def of(cls, engine: Engine, model: Model) -> "Situation":
        """Look at which weights a request for `model` would use now; missing ones are a sentence, not an error."""
        try:
            chosen = engine.weights_in_use(TextToImage.mode, model)
        except StudioError as error:
            return cls("full", False, str(error))
        return cls(chosen.kind, True, chosen.reason)


@dataclass(frozen=True)
class Output:
    """Where a picture appears, with what is said about it and what can be done with it."""

    picture: gr.Image
    status: gr.HTML
    cancel: gr.Button
    downloads: gr.Row
    png_file: gr.DownloadButton
    json_file: gr.DownloadButton
    details: gr.Accordion
    parameters: gr.HTML

    @classmethod
    def lay_out(cls) -> "Output":
        """Make the components, from top to bottom."""
        picture = gr.Image(
            type="filepath",
            format="png",
            label="Picture",
            show_label=False,
            interactive=False,
            buttons=["fullscreen"],
            elem_id="picture",
        )
        with gr.Row(elem_id="now"):
            status = gr.HTML(_idle(), elem_id="status", js_on_load=STATUS_JS)
            cancel = gr.Button("Cancel", size="sm", elem_id="cancel", scale=0)
        with gr.Row(visible=False) as downloads:
            png_file = gr.DownloadButton("Download picture", size="sm")
            json_file = gr.DownloadButton("Download parameters", size="sm")
        with gr.Accordion("Parameters", open=False, visible=False) as details:
            parameters = gr.HTML(elem_id="parameters")
        return cls(picture, status, cancel, downloads, png_file, json_file, details, parameters)

    @property
    def shown(self) -> list[Block]:
        """What `follow` changes."""
        return [
            self.picture,
            self.status,
            self.cancel,
            self.downloads,
            self.png_file,
            self.json_file,
            self.details,
            self.parameters,
        ]

    def follow(self, events: Generator[Event, None, None], stopped: Callable[[], bool]) -> Iterator[Update]:
        """Show each event, until the last one or until `stopped`.

        Only this writes what is shown: Gradio's own way to cancel lets two listeners write at once, and the loser of
        that race would leave a page that seems to work on something, or calls the cancelled run a failure.
        """
        said = _working("Starting")
        yield {self.status: said, self.cancel: gr.Button("Cancel", interactive=True)}
        for event in events:
            if stopped():
                events.close()
                yield {self.status: _said(f"Cancelled. {KEPT}")}
                return
            match event:
                case Result():
                    with _files(event) as (png, sidecar):
                        yield {
                            self.picture: gr.Image(png, alt_text=event.request.prompt),
                            self.status: _done(event),
                            self.downloads: gr.Row(visible=True),
                            self.png_file: png,
                            self.json_file: sidecar,
                            self.details: gr.Accordion(visible=True),
                            self.parameters: _parameters(Path(sidecar).read_text(encoding="utf-8")),
                        }
                case Failure():
                    yield {self.status: _failed(event)}
                case _:
                    now = _underway(event)
                    # Also when there is nothing new to show: a visitor who has gone is noticed here.
                    yield {self.status: now if now != said else gr.skip()}
                    said = now


def _text_to_image(engine: Engine, page: gr.Blocks, weights_line: gr.HTML) -> None:
    """Lay out the tab and wire it."""
    first: Model = TextToImage.model_fields["model"].default
    now, usual = Situation.of(engine, first), MODELS[first]

    with gr.Row(elem_id="columns"):
        with gr.Column(elem_id="controls", min_width=280):
            examples = engine.examples(now.kind)
            prompt_field = gr.Textbox(
                label="Prompt",
                info=_help("prompt"),
                placeholder=examples[0],
                lines=3,
                max_lines=10,
                autofocus=True,
                elem_id="prompt",
            )
            samples = gr.Dataset(
                components=[prompt_field],
                samples=[[example] for example in examples],
                label="Try one of these",
                elem_id="examples",
            )
            model_field = gr.Radio(
                choices=[(name.title(), name) for name in MODELS],
                value=first,
                label="Model",
                info=_help("model"),
                elem_id="model",
            )
            steps_field = gr.Slider(
                *_range("steps"), value=usual.steps, step=1, label="Steps", info=_help("steps"), buttons=[]
            )
            with gr.Column(visible=usual.guided, elem_id="guidance") as guidance:
                negative_field = gr.Textbox(label="Negative prompt", info=_help("negative_prompt"), lines=2)
                cfg_field = gr.Slider(
                    *_range("cfg"), value=usual.cfg, step=0.1, label="CFG", info=_help("cfg"), buttons=[]
                )
            with gr.Accordion("Advanced", open=False):
                fixed_size = gr.HTML(_fixed_size(now.sizes), visible=_is_fixed(now.sizes))
                with gr.Row(visible=not _is_fixed(now.sizes)) as free_size:
                    width_field, height_field = (
                        gr.Slider(**_size(now.sizes), label=side.title(), info=_help(side), buttons=[], min_width=200)
                        for side in ("width", "height")
                    )
                # Without a range of its own: the request checks it, and its sentence is better than Gradio's.
                seed_field = gr.Number(TextToImage.model_fields["seed"].default, label="Seed", info=_help("seed"))
            generate = gr.Button("Generate", variant="primary", elem_id="generate")
        with gr.Column(elem_id="output", min_width=280):
            output = Output.lay_out()

    stopping: set[str] = set()  # sessions that have pressed Cancel

    def by_weights(chosen: Model, width: int, height: int) -> Update:
        """What depends on which weights draw; they may have arrived since the server started."""
        now = Situation.of(engine, chosen)
        return {
            weights_line: _weights_line(now),
            samples: gr.Dataset(samples=[[example] for example in engine.examples(now.kind)]),
            fixed_size: gr.HTML(_fixed_size(now.sizes), visible=_is_fixed(now.sizes)),
            free_size: gr.Row(visible=not _is_fixed(now.sizes)),
            width_field: gr.Slider(**_size(now.sizes, width)),
            height_field: gr.Slider(**_size(now.sizes, height)),
        }

    def by_model(chosen: Model, width: int, height: int) -> Update:
        """What choosing a model changes."""
        usual = MODELS[chosen]
        moved = {steps_field: usual.steps, cfg_field: usual.cfg, guidance: gr.Column(visible=usual.guided)}
        return moved | by_weights(chosen, width, height)

    def draw(
        prompt: str,
        model: Model,
        negative_prompt: str,
        steps: int,
        cfg: float,
        width: int,
        height: int,
        seed: float | None,
        visitor: gr.Request,
    ) -> Iterator[Update]:
        """Carry out the form, showing each event."""
        fields: dict[str, Any] = {"prompt": prompt, "model": model, "steps": steps, "width": width, "height": height}
        fields["seed"] = seed
        if MODELS[model].guided:  # the other model's form still holds what was typed before it was chosen
            fields.update(negative_prompt=negative_prompt, cfg=cfg)
        me = visitor.session_hash or ""
        stopping.discard(me)
        with closing(_run(engine, visitor, **fields)) as events:
            yield from output.follow(events, lambda: me in stopping)

    def stop(visitor: gr.Request) -> gr.Button:
        """Note that this visitor wants no picture any more; the run sees it within a step."""
        stopping.add(visitor.session_hash or "")
        return gr.Button("Cancelling", interactive=False)

    form = [prompt_field, model_field, negative_field, steps_field, cfg_field, width_field, height_field, seed_field]
    situation = [model_field, width_field, height_field]
    of_weights = [weights_line, samples, fixed_size, free_size, width_field, height_field]
    of_model = [steps_field, cfg_field, guidance, *of_weights]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}

    run = generate.click(draw, form, output.shown, **quiet)
    run.failure(lambda: _said(f"That did not work; the server's log says why. {KEPT}"), None, output.status, **quiet)
    output.cancel.click(stop, None, output.cancel, **quiet)
    samples.click(lambda sample: sample[0], samples, prompt_field, **quiet)
    model_field.input(by_model, situation, of_model, **quiet)
    page.load(by_weights, situation, of_weights, **quiet)


def _endpoint(engine: Engine) -> None:
    """Add the endpoint `/generate`, which programs call by name."""

    def generate(
        visitor: gr.Request,
        prompt: str,
        model: Model = "turbo",
        negative_prompt: str = "",
        steps: int | None = None,
        cfg: float | None = None,
        width: int | None = None,
        height: int | None = None,
        seed: int = 0,
        weights: WeightsChoice = "auto",
    ) -> Iterator[tuple[dict | None, dict]]:
        """Draw a picture from a prompt. Returns the PNG file and its parameters.

        While it works it gives no file, and how far it is in place of the parameters. What is left out takes the usual
        value for the model and the weights in use; seed 0 picks one at random.
        """
        run = _run(
            engine,
            visitor,
            prompt=prompt,
            model=model,
            negative_prompt=negative_prompt,
            steps=steps,
            cfg=cfg,
            width=width,
            height=height,
            seed=seed,
            weights=weights,
        )
        with closing(run) as events:
            for event in events:
                match event:
                    case Result():
                        with _files(event) as (png, _):
                            yield gr.FileData(path=png).model_dump(), dict(event.sidecar)
                    case Failure():
                        raise gr.Error(event.text, title=event.code, print_exception=False)
                    case _:
                        yield None, {"progress": type(event).__name__.lower(), **vars(event)}

    # gr.api makes an output of each member of a returned tuple, and does not look inside Iterator.
    generate.__signature__ = inspect.signature(generate).replace(return_annotation=tuple[gr.FileData, dict])
    gr.api(generate, api_name=TextToImage.mode)


def _run(engine: Engine, visitor: gr.Request, **fields: Any) -> Generator[Event, None, None]:
    """Carry out an unchecked form; a form that is wrong is a failure like any other. Closing it cancels the work."""
    try:
        request = TextToImage.parse(**fields)
    except StudioError as error:
        yield Failure.of(error)
        return
    with closing(engine.run(request, client=visitor.session_hash or "")) as events:
        yield from events


@contextmanager
def _files(result: Result) -> Iterator[tuple[str, str]]:
    """Hand over a result's picture and its parameters by path; Gradio takes copies while they are there.

    As files, because Gradio would encode a decoded picture anew and lose the text in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder) / f"z-image-{result.request.seed}.png"
        sidecar = metadata.save(result, png)
        yield str(png), str(sidecar)


# --- a form's fields, as the request declares them ---------------------------------------------------------------


def _help(name: str) -> str:
    return TextToImage.model_fields[name].description or ""


def _range(name: str) -> tuple[float, float]:
    bounds = TextToImage.model_fields[name].metadata
    lowest = next(bound.ge for bound in bounds if isinstance(bound, annotated_types.Ge))
    highest = next(bound.le for bound in bounds if isinstance(bound, annotated_types.Le))
    return lowest, highest


def _size(sizes: Sizes, wanted: int = 0) -> dict[str, Any]:
    """Return what a slider for a width or a height is made of; what was wanted stays where it is possible."""
    return {
        "minimum": min(sizes.minimum, sizes.maximum - sizes.step),  # a slider has a range even when it is not shown
        "maximum": sizes.maximum,
        "step": sizes.step,
        "value": wanted if wanted == sizes.nearest(wanted) else sizes.native,
    }


def _is_fixed(sizes: Sizes) -> bool:
    return sizes.minimum == sizes.maximum


# --- what the page says, as HTML ---------------------------------------------------------------------------------


def _header() -> str:
    soon = " and ".join(f'<a href="{MODEL_ZOO}" target="_blank" rel="noopener">{name}</a>' for name in COMING_SOON)
    return f'<h1>{TITLE}<span class="stop">.</span></h1><p>{soon} are coming soon</p>'


def _weights_line(now: Situation) -> str:
    plain, more = WEIGHTS[now.kind] if now.complete else WEIGHTS_MISSING
    return f"<details><summary>{plain} <u>{more}</u></summary><p>{escape(_upper(now.sentence))}</p></details>"


def _fixed_size(sizes: Sizes) -> str:
    return f'<p class="hint">Width and height: {escape(str(sizes))}.</p>'


def _idle() -> str:
    keys = '<span class="keys">Or press <kbd>Ctrl</kbd> <kbd>Enter</kbd>; <kbd>Esc</kbd> cancels.</span>'
    return f'<p class="hint">Describe a picture, then press Generate. {keys}</p>'


def _said(sentence: str) -> str:
    return f"<p>{escape(sentence)}</p>"


def _working(sentence: str, aside: str = "", fraction: float | None = None) -> str:
    """Say what is being done. `aside` is for the eye only: a screen reader need not read every step aloud."""
    known = "" if fraction is None else f' aria-valuenow="{100 * fraction:.0f}" style="--done: {fraction:.1%}"'
    return (
        f'<div class="working"><div class="bar" role="progressbar" aria-label="Progress"{known}><i></i></div>'
        f'<p>{escape(sentence)}<span aria-hidden="true">{escape(aside)}</span></p></div>'
    )


def _underway(event: Queued | Stage | Step) -> str:
    match event:
        case Queued(ahead):
            others = "one request comes" if ahead == 1 else f"{ahead} requests come"
            return _working(f"Waiting: {others} before yours")
        case Stage(name, detail):
            return _working(STAGES.get(name, name), detail, 1.0 if name in ("decoding", "saving") else None)
        case Step(index, total):
            return _working(STAGES["denoising"], f"step {index} of {total}", index / total)


def _failed(failure: Failure) -> str:
    facts = failure.values
    if failure.code != RequestError.code:
        text = _upper(failure.text)
    elif facts["field"] == "prompt":
        text = f"What should the picture show? The prompt takes {facts['allowed']}."
    else:
        name = facts["field"].replace("_", " ").capitalize().replace("Cfg", "CFG")
        text = f"{name} takes {facts['allowed']}; {facts['value']} is not possible."
        if facts["nearest"] is not None:
            text += f" The nearest is {facts['nearest']}."
    return f'<p class="failed">{escape(text)}</p>'


def _done(result: Result) -> str:
    used, total, loading = result.request, result.seconds["total"], result.seconds.get("loading", 0.0)
    time = f"{total:.1f} s" + (f", {loading:.1f} of them loading" if loading >= 1 else "")
    facts = f"{used.model.title()}, {used.steps} steps, {used.width} × {used.height}, {time}"
    notes = "".join(f'<p class="note">{escape(note.text)}</p>' for note in result.notes)
    return f"<p><span>Seed <b>{used.seed}</b></span><span>{facts}</span></p>{notes}"


def _parameters(text: str) -> str:
    # Not as gr.JSON: its colours compete with the picture's.
    return f'<pre tabindex="0">{escape(text)}</pre>'


def _upper(text: str) -> str:
    """Begin a text like a sentence; it may end with a command, so its end stays."""
    return text[:1].upper() + text[1:]
