"""The page: what a visitor sees and presses, and the endpoints that programs call by name.

Data flows one way: a tab's form becomes a request, the engine turns it into events, each event becomes what the page
shows. Each tab is a module of its own. Knows nothing of pipelines, of colours, or of how the server is started.
"""

import gradio as gr

import tab_generate
import theme
from engine import Engine
from request import Request, TextToImage

TITLE = "Z-Image Studio"
MODEL_ZOO = "https://github.com/Tongyi-MAI/Z-Image#-model-zoo"
COMING_SOON = ("Edit", "Omni")

HEAD = f'''<meta name="color-scheme" content="dark"><script src="{theme.ASSETS_URL}/page.js" defer></script>'''


def build(engine: Engine) -> gr.Blocks:
    """Return the page. Nothing is loaded and nothing is drawn before a visitor asks for it."""
    # Pictures are copied to Gradio's cache to be served; they go after a day, and when the server stops.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(_header(), elem_id="header")
        weights_line = gr.HTML(elem_id="weights")
        with gr.Tabs(), gr.Tab(_title(TextToImage)):
            tab_generate.lay_out(engine, page, weights_line)
        tab_generate.endpoint(engine)
    # The engine owns the one queue, which is fair and bounded; Gradio's own must not stand before it.
    page.queue(default_concurrency_limit=None)
    return page


def _title(mode: type[Request]) -> str:
    return mode.help.title().replace(" To ", " to ")


def _header() -> str:
    soon = " and ".join(f'<a href="{MODEL_ZOO}" target="_blank" rel="noopener">{name}</a>' for name in COMING_SOON)
    return f'<h1>{TITLE}<span class="stop">.</span></h1><p>{soon} are coming soon</p>'
