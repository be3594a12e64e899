"""What can be asked for: one frozen, validated request per mode.

Each field holds its default, its range and its help line once; the page, the command line, HTTP and the docs read
them from here. A default of None means "the usual value for this model and these weights": `resolved` fills it in.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from core.errors import RequestError
from core.sizes import IMAGE_SIZES, IMAGE_SIZES_TEXT, WeightsKind

Model = Literal["turbo", "base"]
WeightsChoice = Literal["auto", "full", "mini"]

SEED_MAX = 2**32 - 1
CONTROLNET_STEPS = 9  # Turbo with the ControlNet's "8 steps" file (its model card)
PATH_MAX_CHARS = 4_096  # what Linux takes
PROMPT_MAX_CHARS = 10_000  # far above the text encoder's 512 tokens; a bound on what is parsed at all


@dataclass(frozen=True)
class ModelDefaults:
    """How one model is usually run (the model cards of Tongyi-MAI/Z-Image and Z-Image-Turbo)."""

    title: str
    steps: int
    cfg: float
    guided: bool  # whether CFG and a negative prompt mean anything to it


MODELS: Mapping[Model, ModelDefaults] = {
    "turbo": ModelDefaults("Z-Image Turbo", steps=8, cfg=1.0, guided=False),
    "base": ModelDefaults("Z-Image", steps=25, cfg=4.0, guided=True),
}


@dataclass(frozen=True)
class PreprocessorFacts:
    """What a choice of preprocessor is called, and what it takes from a picture."""

    title: str
    help: str


Preprocessor = Literal["canny", "softedge", "lineart", "scribble", "gray", "depth", "pose", "none"]

PREPROCESSORS: Mapping[Preprocessor, PreprocessorFacts] = {
    "canny": PreprocessorFacts("Canny", "Thin outlines."),
    "softedge": PreprocessorFacts("Soft edge", "Outlines, the stronger the brighter."),
    "lineart": PreprocessorFacts("Line art", "Dark lines of a drawing on light paper."),
    "scribble": PreprocessorFacts("Scribble", "Thick, rough outlines, which leave more to the prompt."),
    "gray": PreprocessorFacts("Gray", "Light and shade, without colours."),
    "depth": PreprocessorFacts("Depth", "How far away things are: near is white."),
    "pose": PreprocessorFacts("Pose", "How people stand, sit or move."),
    "none": PreprocessorFacts("Pre-processed", "The picture as it is, made by another tool or from here."),
}


def _random_when_unset(value: Any) -> Any:
    """Map every spelling of "random" (None, empty, 0, -1) to 0."""
    return 0 if value is None or value == "" or value == -1 or value == "-1" else value


class Request(BaseModel):
    """What every mode's request has in common. Instances are frozen, picklable and JSON-serialisable.

    Besides, each mode has `prompt`, `steps`, `seed` and `weights` as fields, made of the types below, and `model` as a
    field or, where there is no choice, as a class variable.

    Attributes:
        mode: the mode's name, everywhere: command, endpoint, metadata, `hub.parts.NEEDS`.
        help: the mode in a few words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: ClassVar[str]
    help: ClassVar[str]

    @property
    def steps_run(self) -> int:
        """How many denoising steps a resolved request takes."""
        return self.steps

    @classmethod
    def parse(cls, **values: Any) -> Self:
        """Build a request from untrusted values.

        Raises:
            RequestError: names the first field that is wrong, its value and what is allowed.
        """
        try:
            return cls(**values)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_context=True)[0]
            raise _as_request_error(cls, first) from None

    @classmethod
    def allowed(cls, name: str) -> str:
        """Say what a field takes, from its own declaration: the one place where ranges are put into words."""
        schema = cls.model_json_schema()
        declared = schema["properties"][name]
        if "allowed" in declared:
            return str(declared["allowed"])
        kinds = [kind for kind in declared.get("anyOf", [declared]) if kind.get("type") != "null"]
        kind = kinds[0]  # besides null, every field of ours has one type
        if "enum" in kind:
            return ", ".join(kind["enum"])
        if kind["type"] == "string":
            return f"{'some' if name in schema['required'] else 'any'} text of up to {kind['maxLength']} characters"
        noun = {"integer": "a whole number", "number": "a number"}[kind["type"]]
        return f"{noun} from {kind['minimum']} to {kind['maximum']}"


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("blank")
    return text


# Fields that more than one mode has. A mode sets the default, and may word the help line anew.
Prompt = Annotated[
    str, Field(max_length=PROMPT_MAX_CHARS, description="What the picture should show."), AfterValidator(_not_blank)
]
Steps = Annotated[
    int | None,
    Field(ge=1, le=100, description="Denoising steps: more take longer and seldom help beyond the usual number."),
]
Side = Annotated[int | None, Field(ge=1, json_schema_extra={"allowed": IMAGE_SIZES_TEXT})]
Seed = Annotated[
    int,
    Field(ge=0, le=SEED_MAX, description="The same seed gives the same picture; 0 picks one at random."),
    BeforeValidator(_random_when_unset),
]
Weights = Annotated[
    WeightsChoice,
    Field(description="Real weights where complete, else the embedded miniature (auto); or one of them by name."),
]
LoraFile = Annotated[
    str,
    Field(
        max_length=PATH_MAX_CHARS,
        description="A LoRA: a .safetensors file that teaches the model a style or a thing.",
        json_schema_extra={"allowed": "the path of a .safetensors file", "metavar": "FILE[:STRENGTH]"},
    ),
]
LoraStrength = Annotated[
    float,
    Field(
        ge=0,
        le=1.5,
        description="How much of the LoRA: 1 is as it was trained, 0 is none.",
        json_schema_extra={"flag": None},  # on the command line it is a part of --lora
    ),
]
LORA_STRENGTH = 0.8  # what people use first: at 1 a LoRA of the usual training outshouts the prompt


class TextToImage(Request):
    """Text to image."""

    mode: ClassVar[str] = "generate"
    help: ClassVar[str] = "text to image"

    prompt: Prompt
    model: Model = Field("turbo", description="Turbo is quick; Base is slower and listens to a negative prompt.")
    negative_prompt: str = Field(
        "",
        max_length=PROMPT_MAX_CHARS,
        description="What the picture should not show (Base only).",
        json_schema_extra={"flag": "--negative"},
    )
    steps: Steps = None
    cfg: float | None = Field(
        None, ge=1, le=20, description="How strictly to follow the prompt (Base only; 4 is usual, 1 is off)."
    )
    width: Side = Field(None, description="Width in pixels.")
    height: Side = Field(None, description="Height in pixels.")
    seed: Seed = 0
    lora: LoraFile = ""
    lora_strength: LoraStrength = LORA_STRENGTH
    weights: Weights = "auto"

    @property
    def defaults(self) -> ModelDefaults:
        """How this request's model is usually run."""
        return MODELS[self.model]

    def resolved(self, kind: WeightsKind) -> TextToImage:
        """Return this request with every open value filled in for the weights in use, a random seed included.

        Raises:
            RequestError: the size is not possible with these weights, or CFG or a negative prompt was given to a
                model that has no guidance.
        """
        model, sizes = self.defaults, IMAGE_SIZES[kind]
        if not model.guided and self.negative_prompt.strip():
            raise RequestError(
                "negative_prompt", self.negative_prompt, "nothing with the model turbo; the model base listens to it"
            )
        if not model.guided and self.cfg not in (None, model.cfg):
            raise RequestError("cfg", self.cfg, "1 with the model turbo; the model base can be guided", nearest=1)
        filled: dict[str, Any] = {
            "steps": self.steps or model.steps,
            "cfg": self.cfg if self.cfg is not None else model.cfg,
            "seed": self.seed or random_seed(),
            "weights": kind,
            "lora_strength": self.lora_strength if self.lora else LORA_STRENGTH,  # means nothing without one
        }
        for side in ("width", "height"):
            asked = getattr(self, side)
            if asked is not None and asked != sizes.nearest(asked):
                raise RequestError(side, asked, f"{sizes} with these weights", nearest=sizes.nearest(asked))
            filled[side] = asked or sizes.native
        return self.model_copy(update=filled)


ImageFile = Annotated[
    str,
    Field(max_length=PATH_MAX_CHARS, json_schema_extra={"allowed": "the name of a picture file"}),
    AfterValidator(_not_blank),
]
Threshold = Annotated[int, Field(ge=0, le=1000)]


class Preprocess(Request):
    """A control image alone: what a preprocessor takes from a picture, at the size that a picture will have."""

    mode: ClassVar[str] = "preprocess"
    help: ClassVar[str] = "the control image alone"
    model: ClassVar[Model] = "turbo"

    image: ImageFile = Field(description="The picture whose structure is kept.")
    preprocessor: Preprocessor = Field("canny", description="What is taken from the picture.")
    canny_low: Threshold = Field(100, description="Canny: how faint an edge may be that goes on from a strong one.")
    canny_high: Threshold = Field(200, description="Canny: how strong an edge must be to begin.")
    weights: Weights = "auto"

    @pydantic.model_validator(mode="after")
    def _thresholds_in_order(self) -> Self:
        if self.canny_low > self.canny_high:
            raise RequestError("canny_low", self.canny_low, f"at most canny_high, which is {self.canny_high}")
        return self


class ControlNet(Preprocess):
    """Structure to image."""

    mode: ClassVar[str] = "controlnet"
    help: ClassVar[str] = "structure to image"

    prompt: Prompt
    scale: float = Field(
        0.8,
        ge=0,
        le=2,
        description="How strictly the picture keeps the structure; 0.65 to 1.0 is the usual range, 0 is not at all.",
    )
    steps: Steps = None
    seed: Seed = 0
    lora: LoraFile = ""
    lora_strength: LoraStrength = LORA_STRENGTH

    def resolved(self, kind: WeightsKind) -> ControlNet:
        """Return this request with every open value filled in for the weights in use, a random seed included."""
        filled: dict[str, Any] = {
            "steps": self.steps or CONTROLNET_STEPS,
            "seed": self.seed or random_seed(),
            "weights": kind,
            "lora_strength": self.lora_strength if self.lora else LORA_STRENGTH,  # means nothing without one
        }
        return self.model_copy(update=filled)


Upscaler = Literal["best", "fast"]


@dataclass(frozen=True)
class UpscalerFacts:
    """What a choice of upscaler is called, and what it costs: floating-point operations per pixel of the input."""

    title: str
    operations: int


# Operations: two for each weight of a convolution at each place where it is applied, counted from the networks.
UPSCALERS: Mapping[Upscaler, UpscalerFacts] = {
    "best": UpscalerFacts("Best", 35_900_000),
    "fast": UpscalerFacts("Fast", 1_240_000),
}
UPSCALER_OVERLAP = 40  # pixels of the input that neighbouring tiles share; see `upscaler`
UPSCALE_STEPS = 5
UPSCALE_MAX = 4096  # pixels a side of what comes out
UPSCALE_SCALE = 2
# Turbo adds detail without changing what is there; the miniature would turn a photograph into flat colours.
UPSCALE_DENOISE: Mapping[WeightsKind, float] = {"full": 0.33, "mini": 0.0}
_DENOISE_TEXT = f"{UPSCALE_DENOISE['full']} with the real weights, {UPSCALE_DENOISE['mini']:g} with the miniature"


class Upscale(Request):
    """A picture at twice its width and height."""

    mode: ClassVar[str] = "upscale"
    help: ClassVar[str] = "small picture to large: exactly twice the width and height"
    model: ClassVar[Model] = "turbo"

    image: ImageFile = Field(description="The picture to enlarge, up to 2048 a side; transparent places become white.")
    prompt: Prompt = Field("masterpiece, 8k", description="What the refinement should add: a word or two on quality.")
    steps: Steps = Field(None, description=f"Steps of the refinement; {UPSCALE_STEPS} is usual.")
    denoise: float | None = Field(
        None, ge=0, le=1, description=f"How much is drawn anew: 0 is nothing. Usual: {_DENOISE_TEXT}."
    )
    upscaler: Upscaler = Field(
        "best", description="Real-ESRGAN x4plus, or a network of a thirtieth of its size for a slow processor."
    )
    seed: Seed = 0
    weights: Weights = "auto"

    @property
    def steps_run(self) -> int:
        """How many steps a resolved request takes: all of them, however small `denoise` is, but none at 0."""
        if not self.denoise:
            return 0
        assert self.steps is not None  # a resolved request has them
        return self.steps

    def resolved(self, kind: WeightsKind) -> Upscale:
        """Return this request with every open value filled in for the weights in use, a random seed included."""
        filled = {
            "steps": self.steps or UPSCALE_STEPS,
            "denoise": UPSCALE_DENOISE[kind] if self.denoise is None else self.denoise,
            "seed": self.seed or random_seed(),
            "weights": kind,
        }
        return self.model_copy(update=filled)


# By name, every mode that draws.
MODES: Mapping[str, type[Request]] = {request.mode: request for request in (TextToImage, ControlNet, Upscale)}


def random_seed() -> int:
    """Return a seed nobody can foresee."""
    return random.SystemRandom().randint(1, SEED_MAX)


def _as_request_error(cls: type[Request], first: Mapping[str, Any]) -> RequestError:
    """Translate pydantic's first complaint into our one sentence. Judged by pydantic's error type, never its text."""
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return RequestError(name, first["input"], "only the fields " + ", ".join(cls.model_fields))
    return RequestError(name, None if first["type"] == "missing" else first["input"], cls.allowed(name))
