"""The look: one warm dark palette in both of Gradio's colour modes, Inter from our own files, and the page's CSS."""

from __future__ import annotations

import os
from pathlib import Path

from gradio.themes import Base, Color, Font, sizes
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

ROOT = Path(__file__).parent
ASSETS = ROOT / "assets"
ASSETS_URL = "studio-assets"  # relative, so that it holds behind a proxy that serves us under a path
FAVICON = ASSETS / "favicon.svg"
CSS = ROOT / "theme.css"

TITLE = "Z-Image Studio"
GROUND = "#1A1614"
INK = "#F0E8DD"
ACCENT = "#FFB02E"

# From light to dark, as Gradio numbers them: 50, 100, 200, ... 900, 950.
WARM = Color(  # type: ignore[misc]  # as far as types tell, the shades may be one too many
    *f"#F8F3EC {INK} #DDD3C7 #C6BBAE #AEA294 #94897C #6E645A #4A423B #332C27 #241F1C {GROUND}".split(), name="warm"
)
AMBER = Color(  # type: ignore[misc]  # the same
    *f"#FFF7E8 #FFECC9 #FFE0A8 #FFD287 #FFC05A {ACCENT} #E69A1C #A66D10 #6E4A10 #3D2C12 #2A2013".split(), name="amber"
)

DOT = f"""url("data:image/svg+xml,%3csvg viewBox='0 0 16 16' fill='{GROUND.replace("#", "%23")}' xmlns=\
'http://www.w3.org/2000/svg'%3e%3ccircle cx='8' cy='8' r='3'/%3e%3c/svg%3e")"""

# Strokes on a field of 24 by 24; the class of what has one is its name.
ICONS = {
    "download": "M12 4v11m-5-5 5 5 5-5M5 20h14",
    "copy": "M9 9h11v11H9zM5 15V4h11",
    "copied": "M5 12.5l5 5L19 7",
    "to-controlnet": "M3 19l6-10 4 6 3-4 5 8zM17 6h.01",
    "to-upscale": "M14 4h6v6m0-6-7 7M10 20H4v-6m0 6 7-7",
    "restore": "M4 4v6h6M4.3 14.5A8 8 0 1 0 6 6.3L4 10",
    "again": "M4 4h7v7H4zM13 4h7v7h-7zM4 13h7v7H4zM16.5 13.5v6M13.5 16.5h6",
    "more": "M6 12a1 1 0 1 1-2 0 1 1 0 0 1 2 0zM13 12a1 1 0 1 1-2 0 1 1 0 0 1 2 0zM20 12a1 1 0 1 1-2 0 1 1 0 0 1 2 0z",
    "view": "M4 9V4h5M15 4h5v5M20 15v5h-5M9 20H4v-5",
    "drawer": "M4 7h10m4 0h2M4 17h2m4 0h10M18 7a2 2 0 1 1-4 0 2 2 0 0 1 4 0zM10 17a2 2 0 1 1-4 0 2 2 0 0 1 4 0z",
    "weights": "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
}


def icons() -> str:
    """Return the CSS that gives each icon's class its shape, to be laid over a colour by `theme.css`."""
    look = "fill='none' stroke='black' stroke-width='1.7' stroke-linecap='round' stroke-linejoin='round'"
    svg = f"%3csvg viewBox='0 0 24 24' {look} xmlns='http://www.w3.org/2000/svg'%3e%3cpath d='{{}}'/%3e%3c/svg%3e"
    shape = f'url("data:image/svg+xml,{svg}")'
    return "\n".join(f".{name} {{ --icon: {shape.format(path)}; }}" for name, path in ICONS.items())


# As fontsource cuts Inter: a page in English loads the first file only.
INTER_FILES = {
    "inter-latin.woff2": "U+0000-00FF, U+0131, U+0152-0153, U+02BB-02BC, U+02C6, U+02DA, U+02DC, U+0304, U+0308, "
    "U+0329, U+2000-206F, U+20AC, U+2122, U+2191, U+2193, U+2212, U+2215, U+FEFF, U+FFFD",
    "inter-latin-ext.woff2": "U+0100-02BA, U+02BD-02C5, U+02C7-02CC, U+02CE-02D7, U+02DD-02FF, U+1D00-1DBF, "
    "U+1E00-1E9F, U+1EF2-1EFF, U+2020, U+20A0-20AB, U+20AD-20C0, U+2113, U+2C60-2C7F, U+A720-A7FF",
}


class Inter(Font):
    """Inter, served by this app: Gradio would fetch it from a third party."""

    def __init__(self) -> None:
        super().__init__("Inter")

    def stylesheet(self) -> dict[str, str | None]:
        """Return the font's CSS in the form that Gradio's themes take."""
        faces = (
            f"@font-face {{ font-family: Inter; font-weight: 100 900; font-display: swap; unicode-range: {characters}; "
            f"src: url('{ASSETS_URL}/{name}') format('woff2'); }}"
            for name, characters in INTER_FILES.items()
        )
        return {"url": None, "css": "\n".join(faces)}


def build() -> Base:
    """Return the theme for `launch(theme=...)`."""
    theme = Base(
        primary_hue=AMBER,
        secondary_hue=AMBER,
        neutral_hue=WARM,
        radius_size=sizes.radius_md,
        font=[Inter(), "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )
    line, raised = "*neutral_800", "*neutral_900"
    theme.set(
        body_background_fill_dark="*neutral_950",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary_dark="*neutral_950",
        background_fill_secondary_dark=raised,
        border_color_primary_dark=line,
        color_accent_soft_dark="*neutral_800",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_padding="0px",
        block_info_text_color_dark="*neutral_400",
        block_info_text_size="*text_sm",
        block_label_background_fill_dark="transparent",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color_dark="*neutral_100",
        block_title_text_weight="500",
        form_gap_width="0px",
        layout_gap="20px",
        link_text_color_dark="*neutral_200",
        link_text_color_hover_dark="*primary_500",
        link_text_color_active_dark="*primary_500",
        link_text_color_visited_dark="*neutral_200",
        input_background_fill_dark=raised,
        input_background_fill_hover_dark=raised,
        input_border_color_dark="*neutral_700",
        input_border_color_hover_dark="*neutral_600",
        input_border_color_focus_dark="*neutral_400",
        input_border_width="1px",
        input_placeholder_color_dark="*neutral_500",
        input_radius="*radius_md",
        checkbox_background_color_dark=raised,
        checkbox_background_color_selected_dark="*primary_500",
        checkbox_border_color_dark="*neutral_600",
        checkbox_label_background_fill_dark="transparent",
        checkbox_label_background_fill_hover_dark=raised,
        checkbox_label_background_fill_selected_dark=raised,
        checkbox_label_border_color_dark="*neutral_700",
        checkbox_label_border_color_selected_dark="*primary_500",
        radio_circle=DOT,
        checkbox_label_padding="9px 16px",
        button_large_padding="12px 20px",
        button_large_text_size="*text_md",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_400",
        button_primary_border_color_dark="*primary_500",
        button_primary_border_color_hover_dark="*primary_400",
        button_primary_text_color_dark="*neutral_950",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover_dark=raised,
        button_secondary_border_color_dark="*neutral_700",
        button_secondary_border_color_hover_dark="*neutral_600",
        button_secondary_text_color_dark="*neutral_100",
        error_border_color_dark="*primary_500",
        error_icon_color_dark="*primary_500",
        error_text_color_dark="*neutral_100",
        accordion_text_color_dark="*neutral_200",
    )
    # The look is dark whatever the visitor's system prefers: the light palette is the dark one.
    for name, value in list(vars(theme).items()):
        if name.endswith("_dark") and value is not None:
            setattr(theme, name.removesuffix("_dark"), value)
    return theme


class _Assets(StaticFiles):
    """The assets by their path behind ASSETS_URL: StaticFiles finds it by the root path, which a proxy may have cut."""

    def get_path(self, scope: Scope) -> str:
        """Return the file that is asked for, below the folder."""
        path: str = scope["path_params"]["path"]
        return os.path.normpath(os.path.join(*path.split("/")))


def routes() -> list[Route]:
    """Return the routes that serve the assets: before any login, and to be matched before Gradio's own routes."""
    return [Route(f"/{ASSETS_URL}/{{path:path}}", _Assets(directory=ASSETS))]
