"""What can be asked for: one frozen, validated request per mode, and what it becomes with every value filled in.

Each field holds its default, its range and its help line once; the page, the command line, HTTP and the docs read
them from here. A default of None means "the usual value for this model and these weights": `resolved` fills it in, and
returns a type of its own, in which nothing is open.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from core.errors import RequestError
from core.messages import Message
from core.sizes import IMAGE_SIZES, IMAGE_SIZES_TEXT, WeightsKind
from core.upload import Upload

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


SHARED = ("text_encoder", "vae", "tokenizer")  # parts of the weights that every drawing needs, by `hub.parts`


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


def _unguided_at_zero(value: Any) -> Any:
    """Map a CFG of 0 to 1: other programs write either for "no guidance" (diffusers guides above 1 only)."""
    try:
        return 1.0 if float(value) == 0 else value
    except (TypeError, ValueError, OverflowError):  # no number: the field refuses it
        return value


class Checked(BaseModel):
    """Fields that are checked once; a refusal says in words what a field takes. Instances are frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, /, **values: Any) -> Self:
        """Build an instance from untrusted values.

        Raises:
            RequestError: names the first field that is wrong, its value and what is allowed.
        """
        try:
            return cls(**values)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_context=True)[0]
            raise _as_request_error(cls, first) from None

    @classmethod
    def allowed(cls, name: str) -> str | Message:
        """Return what a field takes, from its own declaration: the one place where ranges are put into words."""
        schema = cls.model_json_schema()
        declared = schema["properties"][name]
        if name in ("width", "height"):
            return IMAGE_SIZES_TEXT
        if "allowed" in declared:
            return Message("allowed", declared["allowed"])
        kinds = [kind for kind in declared.get("anyOf", [declared]) if kind.get("type") != "null"]
        kind = kinds[0]  # besides null, every field of ours has one type
        if values := kind.get("enum", [kind["const"]] if "const" in kind else []):
            return ", ".join(values)
        if kind["type"] == "string":
            some = Message("text", "some text of up to {limit} characters", limit=kind["maxLength"])
            any_ = Message("text", "any text of up to {limit} characters", limit=kind["maxLength"])
            return some if name in schema["required"] else any_
        low, high = kind["minimum"], kind["maximum"]
        if kind["type"] == "integer":
            return Message("range", "a whole number from {low} to {high}", low=low, high=high)
        return Message("range", "a number from {low} to {high}", low=low, high=high)

    @classmethod
    def check(cls, name: str, value: Any) -> Any:
        """Return the value that one field makes of an untrusted one; the other fields do not matter.

        Raises:
            RequestError: there is no such field, or the value is not possible.
        """
        if name not in cls.model_fields:
            raise RequestError(name, value, _only_fields(cls))
        try:
            return pydantic.TypeAdapter(
                Annotated[cls.model_fields[name].annotation, cls.model_fields[name]]
            ).validate_python(value)
        except pydantic.ValidationError:
            raise RequestError(name, value, cls.allowed(name)) from None


class Request(Checked):
    """What every request has in common. Instances are frozen, picklable and JSON-serialisable.

    Attributes:
        mode: the request's name, everywhere: command, endpoint, metadata.
        help: the mode in a few words.
        files: the fields that name an image file of the user's.
        model: which transformer draws: a field or, where there is no choice, a class variable.
        weights: which kind of weights is asked for.
    """

    mode: ClassVar[str]
    help: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:  # each request declares them in the order in which its fields are shown

        @property
        def model(self) -> Model: ...
        @property
        def weights(self) -> WeightsChoice: ...

    @classmethod
    def usual_model(cls) -> Model:
        """Return the model that draws where none is asked for."""
        if "model" in cls.model_fields:
            model: Model = cls.model_fields["model"].default
            return model
        return next(vars(base)["model"] for base in cls.__mro__ if "model" in vars(base))


MODES: dict[str, type[DrawRequest]] = {}  # by name, every request that a picture comes of


class DrawRequest(Request):
    """A request that a picture comes of: it has a `prompt`, a `seed` and, where they may be chosen, `steps`.

    A subclass that names a `mode` is found in MODES from then on.
    """

    stem: ClassVar[str]  # how a picture's file begins by default; its seed follows
    needs: ClassVar[Mapping[Model, tuple[str, ...]]]  # for each model that the mode runs with, parts of `hub.parts`

    if TYPE_CHECKING:

        @property
        def prompt(self) -> str: ...
        @property
        def steps(self) -> int | None: ...
        @property
        def seed(self) -> int: ...

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "mode" in vars(cls):
            MODES[cls.mode] = cls

    @property
    def lora_name(self) -> str:
        """The LoRA's file as it was named; empty where there is none."""
        return ""

    @property
    def checkpoint_name(self) -> str:
        """The checkpoint as it was named; empty where the published weights draw."""
        return ""

    @property
    def sides(self) -> tuple[int | None, int | None] | None:
        """The width and height that were asked for, in pixels; None where they follow from an image."""
        return None

    def _filled(self, **values: Any) -> dict[str, Any]:
        """Return the values of the fields, with those that were open."""
        return {**{name: getattr(self, name) for name in type(self).model_fields}, **values}

    def resolved(self, kind: WeightsKind, uploads: Mapping[str, Upload] | None = None) -> Resolved:
        """Return this request with every open value filled in for the weights in use, a random seed included.

        Args:
            kind: of the weights in use.
            uploads: the image files that the request names, by field, where something is to be drawn.

        Raises:
            RequestError: a value is not possible with these weights or this model.
        """
        raise NotImplementedError


class Resolved(DrawRequest):
    """A request in which nothing is open: what a worker carries out. Each mode's own request is its other base.

    Attributes:
        uploads: the image files that it names, by field.
    """

    uploads: Mapping[str, Upload] = Field(default_factory=dict, exclude=True, repr=False)

    if TYPE_CHECKING:

        @property
        def steps(self) -> int: ...
        @property
        def weights(self) -> WeightsKind: ...

    @property
    def steps_run(self) -> int:
        """How many denoising steps are taken."""
        return self.steps

    @property
    def guidance(self) -> float:
        """CFG's factor; 1 is none."""
        return MODELS[self.model].cfg

    @property
    def unwanted(self) -> str:
        """The negative prompt; empty where there is none."""
        return ""

    @property
    def gallery_pairs(self) -> Mapping[str, str]:
        """What A1111's line of parameters holds besides what every mode has, by its names there."""
        return {}


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("blank")
    return text


# Fields that more than one mode has. A mode sets the default, and may word the help line again.
Prompt = Annotated[
    str, Field(max_length=PROMPT_MAX_CHARS, description="What the picture should show."), AfterValidator(_not_blank)
]
Steps = Annotated[
    int | None,
    Field(ge=1, le=100, description="Denoising steps: more take longer and seldom help beyond the usual number."),
]
Side = Annotated[int | None, Field(ge=1)]
Seed = Annotated[
    int,
    Field(ge=0, le=SEED_MAX, description="The same seed gives the same picture; 0 picks one at random."),
    BeforeValidator(_random_when_unset),
]
Cfg = Annotated[
    float | None,
    Field(
        ge=1,
        le=20,
        description="How strictly to follow the prompt (Base only; 4 is usual, 1 or 0 is off).",
        json_schema_extra={"allowed": "a number from 1 to 20, or 0, which is off like 1"},
    ),
    BeforeValidator(_unguided_at_zero),
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
        ge=-5,  # a LoRA that is a slider between two things is trained for both signs, and for more than 1
        le=5,
        description="How much of the LoRA: 1 is as it was trained, 0 is none, below 0 the opposite.",
        json_schema_extra={"flag": None},  # on the command line it is a part of --lora
    ),
]
PICKLES = (".ckpt", ".pt", ".pth", ".bin")  # formats in which a file may run code when it is read


def _no_pickle(text: str) -> str:
    if text.strip().lower().endswith(PICKLES):
        raise ValueError("a pickle")
    return text.strip()


CheckpointFile = Annotated[
    str,
    Field(
        max_length=PATH_MAX_CHARS,
        description="A fine-tune or merge of Z-Image that draws in place of the published transformer.",
        json_schema_extra={
            "allowed": "the path of a .safetensors or .gguf file or of a diffusers folder, or the name of one that is "
            "found on this machine",
            "metavar": "FILE",
        },
    ),
    AfterValidator(_no_pickle),
]
LORA_STRENGTH = 0.8  # what people use first: at 1 a LoRA of the usual training outshouts the prompt


class TextToImage(DrawRequest):
    """Text to image."""

    mode: ClassVar[str] = "generate"
    stem: ClassVar[str] = "z-image"
    needs: ClassVar[Mapping[Model, tuple[str, ...]]] = {"turbo": ("turbo", *SHARED), "base": ("base", *SHARED)}
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
    cfg: Cfg = None
    width: Side = Field(None, description="Width in pixels.")
    height: Side = Field(None, description="Height in pixels.")
    seed: Seed = 0
    lora: LoraFile = ""
    lora_strength: LoraStrength = LORA_STRENGTH
    weights: Weights = "auto"
    variety: float = Field(
        0.0, ge=0, le=1, description="How much seeds differ from each other: 0 is as the model draws, 1 is most."
    )
    checkpoint: CheckpointFile = ""

    @property
    def lora_name(self) -> str:
        """The LoRA's file as it was named; empty where there is none."""
        return self.lora

    @property
    def checkpoint_name(self) -> str:
        """The checkpoint as it was named; empty where the published weights draw."""
        return self.checkpoint

    @property
    def sides(self) -> tuple[int | None, int | None] | None:
        """The width and height that were asked for, in pixels."""
        return self.width, self.height

    def resolved(self, kind: WeightsKind, uploads: Mapping[str, Upload] | None = None) -> ResolvedTextToImage:
        """Return this request with every open value filled in, as `DrawRequest.resolved`.

        Raises:
            RequestError: the size is not possible with these weights, or CFG or a negative prompt was given to a
                model that has no guidance.
        """
        model, sizes = MODELS[self.model], IMAGE_SIZES[kind]
        if not model.guided and self.negative_prompt.strip():
            text = "nothing with the model turbo; the model base listens to it"
            raise RequestError("negative_prompt", self.negative_prompt, Message("unguided", text))
        if not model.guided and self.cfg not in (None, model.cfg):
            allowed = Message("unguided", "1 with the model turbo; the model base can be guided")
            raise RequestError("cfg", self.cfg, allowed, nearest=1)
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and side != sizes.nearest(side):
                allowed = Message("sizes", "{sizes} with these weights", sizes=sizes.text)
                raise RequestError(name, side, allowed, nearest=sizes.nearest(side))
        return ResolvedTextToImage(
            **self._filled(
                steps=self.steps or model.steps,
                cfg=self.cfg if self.cfg is not None else model.cfg,
                width=self.width or sizes.native,
                height=self.height or sizes.native,
                seed=self.seed or random_seed(),
                weights=kind,
                lora_strength=self.lora_strength if self.lora else LORA_STRENGTH,  # means nothing without one
                uploads=uploads or {},
            )
        )


class ResolvedTextToImage(TextToImage, Resolved):
    """Text to image, with every value filled in."""

    steps: int
    cfg: float
    width: int
    height: int
    weights: WeightsKind

    @property
    def guidance(self) -> float:
        """CFG's factor; 1 is none."""
        return self.cfg

    @property
    def unwanted(self) -> str:
        """The negative prompt; empty where there is none."""
        return self.negative_prompt

    @property
    def gallery_pairs(self) -> Mapping[str, str]:
        """What A1111's line of parameters holds besides what every mode has."""
        return {"Variety": f"{self.variety:g}"} if self.variety else {}


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

    files: ClassVar[tuple[str, ...]] = ("image",)

    image: ImageFile = Field(description="The picture whose structure is kept.")
    preprocessor: Preprocessor = Field("canny", description="What is taken from the picture.")
    canny_low: Threshold = Field(100, description="Canny: how faint an edge may be that goes on from a strong one.")
    canny_high: Threshold = Field(200, description="Canny: how strong an edge must be to begin.")
    weights: Weights = "auto"

    @pydantic.model_validator(mode="after")
    def _thresholds_in_order(self) -> Self:
        if self.canny_low > self.canny_high:
            allowed = Message("in_order", "at most canny_high, which is {high}", high=self.canny_high)
            raise RequestError("canny_low", self.canny_low, allowed)
        return self


class ControlNet(Preprocess, DrawRequest):
    """Structure to image."""

    mode: ClassVar[str] = "controlnet"
    stem: ClassVar[str] = "z-image-controlnet"
    needs: ClassVar[Mapping[Model, tuple[str, ...]]] = {"turbo": ("turbo", *SHARED, "controlnet")}
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
    checkpoint: CheckpointFile = ""

    @property
    def lora_name(self) -> str:
        """The LoRA's file as it was named; empty where there is none."""
        return self.lora

    @property
    def checkpoint_name(self) -> str:
        """The checkpoint as it was named; empty where the published weights draw."""
        return self.checkpoint

    def resolved(self, kind: WeightsKind, uploads: Mapping[str, Upload] | None = None) -> ResolvedControlNet:
        """Return this request with every open value filled in, as `DrawRequest.resolved`."""
        return ResolvedControlNet(
            **self._filled(
                steps=self.steps or CONTROLNET_STEPS,
                seed=self.seed or random_seed(),
                weights=kind,
                lora_strength=self.lora_strength if self.lora else LORA_STRENGTH,  # means nothing without one
                uploads=uploads or {},
            )
        )


class ResolvedControlNet(ControlNet, Resolved):
    """Structure to image, with every value filled in."""

    steps: int
    weights: WeightsKind


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


class Upscale(DrawRequest):
    """A picture at twice its width and height."""

    mode: ClassVar[str] = "upscale"
    stem: ClassVar[str] = "z-image-upscale"
    # And Real-ESRGAN, which is no part of a kind of weights: `upscaler.weights`.
    needs: ClassVar[Mapping[Model, tuple[str, ...]]] = {"turbo": ("turbo", *SHARED)}
    help: ClassVar[str] = "small picture to large: exactly twice the width and height"
    files: ClassVar[tuple[str, ...]] = ("image",)
    model: ClassVar[Model] = "turbo"

    image: ImageFile = Field(description="The picture to enlarge, up to 2048 a side; transparent places become white.")
    prompt: Prompt = Field("masterpiece, 8k", description="What the refinement should add: a word or two on quality.")
    steps: Steps = Field(None, description=f"Steps of the refinement; {UPSCALE_STEPS} is usual.")
    denoise: float | None = Field(
        None, ge=0, le=1, description=f"How much is drawn again: 0 is nothing. Usual: {_DENOISE_TEXT}."
    )
    upscaler: Upscaler = Field(
        "best", description="Real-ESRGAN x4plus, or a network of a thirtieth of its size for a slow processor."
    )
    seed: Seed = 0
    weights: Weights = "auto"

    def resolved(self, kind: WeightsKind, uploads: Mapping[str, Upload] | None = None) -> ResolvedUpscale:
        """Return this request with every open value filled in, as `DrawRequest.resolved`."""
        return ResolvedUpscale(
            **self._filled(
                steps=self.steps or UPSCALE_STEPS,
                denoise=UPSCALE_DENOISE[kind] if self.denoise is None else self.denoise,
                seed=self.seed or random_seed(),
                weights=kind,
                uploads=uploads or {},
            )
        )


class ResolvedUpscale(Upscale, Resolved):
    """A picture at twice its width and height, with every value filled in."""

    steps: int
    denoise: float
    weights: WeightsKind

    @property
    def steps_run(self) -> int:
        """How many denoising steps are taken: all of them, however small `denoise` is, but none at 0."""
        return self.steps if self.denoise else 0

    @property
    def gallery_pairs(self) -> Mapping[str, str]:
        """What A1111's line of parameters holds besides what every mode has, by its names there."""
        return {"Denoising strength": f"{self.denoise:g}"}


def random_seed() -> int:
    """Return a seed nobody can foresee."""
    return random.SystemRandom().randint(1, SEED_MAX)


def _only_fields(cls: type[Checked]) -> Message:
    return Message("unknown_field", "only the fields {names}", names=list(cls.model_fields))


def _as_request_error(cls: type[Checked], first: Mapping[str, Any]) -> RequestError:
    """Translate pydantic's first complaint into our one sentence. Judged by pydantic's error type, never its text."""
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return RequestError(name, first["input"], _only_fields(cls))
    return RequestError(name, None if first["type"] == "missing" else first["input"], cls.allowed(name))
