"""ComfyUI's graph in a picture: what its sampler was given, found by following the graph back from it.

A picture holds the graph as it was run (`prompt`: by a node's id its class and its inputs, an input being a value or
[id, output] of the node that it comes from) and as it was drawn on the screen (`workflow`). Facts are from ComfyUI's
`nodes.py` and `comfy_extras`; nodes of others are understood where their inputs have the usual names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.parameters import LABELS, Parameters, restored
from core.request import PROMPT_MAX_CHARS

MAX_NODES = 2_000  # whole films have some hundreds
MAX_SAMPLERS = 20

# Inputs of a sampler that lead to nodes which hold a part of its values (SamplerCustomAdvanced's).
_HELPERS = ("noise", "guider", "sigmas", "sampler")

# What holds a prompt, in the order in which it is looked for; `text_0` is what a node of a live text has shown.
_TEXTS = (
    "text_0",
    "text",
    "prompt",
    "populated_text",
    "positive",
    "t5xxl",
    "text_g",
    "clip_l",
    "text_l",
    "string",
    "value",
)
# Nodes that hand a text on as it is, or put texts together; what a language model wrote is not in the graph.
_HANDS_ON = re.compile(
    "encode|text|string|prompt|positive|primitive|wildcard|concat|join|multiline|show", re.IGNORECASE
)
_JOINS = re.compile("concat|join|combine", re.IGNORECASE)
_WRITES = re.compile(
    "llm|gpt|ollama|gemini|claude|qwen|caption|florence|enhanc|vision|translat|describe", re.IGNORECASE
)
# Nodes that hand a number on as it is.
_HOLDS = re.compile("primitive|seed|number|constant|integer|^int|float|value|reroute|noise", re.IGNORECASE)
MAX_DEPTH = 50  # of nodes that hand a text on to each other
MAX_PROMPT = 2 * PROMPT_MAX_CHARS  # a few nodes that join texts can make one without end

_MODEL_FILES = ("unet_name", "ckpt_name", "model_name", "gguf_name", "model_path")
_SHIFT = 3  # of ModelSamplingAuraFlow in ComfyUI's own graph for Z-Image, and of the scheduler here

# Of the graph on the screen, the values of ComfyUI's own nodes by position; None is what only the screen needs.
_WIDGETS: Mapping[str, tuple[str | None, ...]] = {
    "KSampler": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", None, "steps", "cfg", "sampler_name", "scheduler", "start_at_step"),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "UnetLoaderGGUF": ("unet_name",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "ModelSamplingAuraFlow": ("shift",),
    "RandomNoise": ("noise_seed", None),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KSamplerSelect": ("sampler_name",),
    "CFGGuider": ("cfg",),
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
    "PrimitiveInt": ("value",),
    "LoadImage": ("image",),
}
_MUTED, _BYPASSED = 2, 4  # a node's mode on the screen


@dataclass(frozen=True)
class Node:
    """A node of the graph."""

    kind: str
    inputs: Mapping[str, Any]


Graph = Mapping[str, Node]


def parse(objects: Mapping[str, dict[str, Any]], texts: Mapping[str, str]) -> Parameters | None:
    """Return the parameters in ComfyUI's texts of a picture; None where there are none that can be followed.

    Args:
        objects: the texts that are JSON objects, by name.
        texts: all texts.
    """
    for graph in (_as_run(objects.get("prompt", {})), _as_drawn(objects.get("workflow", {}))):
        if graph and len(graph) <= MAX_NODES and (sampler := _first_sampler(graph)):
            return _of_sampler(graph, *sampler)
    return None


def _as_run(prompt: Mapping[str, Any]) -> Graph:
    return {
        key: Node(node["class_type"], node["inputs"])
        for key, node in prompt.items()
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    }


def _as_drawn(workflow: Mapping[str, Any]) -> Graph:
    """Return the graph of the screen as it would be run, as far as its nodes are ComfyUI's own."""
    lists = (workflow.get("links"), workflow.get("nodes"))
    links, nodes = (value if isinstance(value, list) else [] for value in lists)
    sources = {
        link[0]: [str(link[1]), link[2]]
        for link in links
        if isinstance(link, list) and len(link) >= 5 and isinstance(link[0], int)
    }
    graph: dict[str, Node] = {}
    for node in nodes:
        if not isinstance(node, dict) or not isinstance(node.get("type"), str) or node.get("mode") == _MUTED:
            continue
        inputs: dict[str, Any] = {}
        values = node.get("widgets_values")
        if isinstance(values, list) and node.get("mode") != _BYPASSED:
            names = _WIDGETS.get(node["type"], ())
            inputs = {name: value for name, value in zip(names, values, strict=False) if name}
        slots = node.get("inputs")
        for slot in slots if isinstance(slots, list) else ():
            if isinstance(slot, dict) and isinstance(slot.get("link"), int) and slot["link"] in sources:
                inputs[str(slot.get("name"))] = sources[slot["link"]]
        graph[str(node.get("id"))] = Node(node["type"], inputs)
    return graph


def _first_sampler(graph: Graph) -> tuple[str, list[str]] | None:
    """Return the sampler that began the picture, and the others: passes over what it drew, or further pictures."""
    samplers = [key for key, node in graph.items() if _is_sampler(node)][:MAX_SAMPLERS]
    saves = [key for key, node in graph.items() if "save" in node.kind.lower()][:MAX_SAMPLERS]
    saved = set(_upstream(graph, saves))
    samplers = [key for key in samplers if key in saved] or samplers
    for key in samplers:
        if not set(_upstream(graph, [key])) & (set(samplers) - {key}):
            return key, [other for other in samplers if other != key]
    return None


def _is_sampler(node: Node) -> bool:
    begins = {"seed", "noise_seed", "steps"} & node.inputs.keys()
    return bool("positive" in node.inputs and begins) or {"guider", "sigmas"} <= node.inputs.keys()


def _source(graph: Graph, value: Any) -> str | None:
    """Return the id of the node that an input comes from, None for a value."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and str(value[0]) in graph:
        return str(value[0])
    return None


def _upstream(graph: Graph, keys: Iterable[str], through: Iterable[str] | None = None) -> Iterator[str]:
    """Yield nodes and all that they come from, the nearest first; through inputs of these names alone, where given."""
    waiting, seen = list(keys), set(keys)
    names = None if through is None else set(through)
    for key in waiting:
        yield key
        for name, value in graph[key].inputs.items():
            source = _source(graph, value)
            if source is not None and source not in seen and (names is None or name in names):
                seen.add(source)
                waiting.append(source)


def _of_sampler(graph: Graph, key: str, others: Iterable[str]) -> Parameters:
    """Return what a sampler was given."""
    parts = [graph[part] for part in _upstream(graph, [key], _HELPERS)]
    found: dict[str, Any] = {}
    rest: dict[str, Any] = {}

    def take(into: dict[str, Any], name: str, *inputs: str) -> None:
        """Take the first input of these names; one that a node has worked out is named by the node."""
        value = next((part.inputs[key] for part in parts for key in inputs if key in part.inputs), None)
        into[name], origin = _number(graph, value, inputs)
        if origin:
            rest[LABELS.get(name, name)] = origin

    take(found, "seed", "seed", "noise_seed")
    take(found, "steps", "steps")
    take(found, "cfg", "cfg")
    take(found, "sampler", "sampler_name")
    take(rest, "Scheduler", "scheduler")
    take(rest, "Denoise", "denoise")
    if rest["Denoise"] == 1:
        del rest["Denoise"]
    for name, inputs in (("prompt", ("positive", "conditioning")), ("negative_prompt", ("negative",))):
        texts, origins = _prompts(graph, parts, *inputs)
        found[name] = texts[0] if texts else None
        if not texts and origins:
            rest[LABELS[name]] = ", ".join(origins)
        rest |= {f"{LABELS[name]} {number}": text for number, text in enumerate(texts[1:], 2)}
    _take_latent(graph, parts, found, rest)
    _take_model(graph, parts, found, rest)
    for number, other in enumerate(others, 2):
        node = graph[other]
        told = [f"{name} {node.inputs[name]}" for name in ("steps", "denoise") if name in node.inputs]
        rest[f"Sampler {number}"] = ", ".join([node.kind, *told])
    return restored("comfyui", found, rest)


def _number(graph: Graph, value: Any, names: Iterable[str]) -> tuple[Any, str]:
    """Return an input's value, through nodes that only hold one, or the class of the node that has worked it out."""
    seen: set[str] = set()
    while (source := _source(graph, value)) is not None:
        node = graph[source]
        held = [name for name in (*names, "value", "int", "float", "number") if name in node.inputs]
        if source in seen or not held or not _HOLDS.search(node.kind):
            return None, node.kind
        seen.add(source)
        value = node.inputs[held[0]]
    return (None, "") if isinstance(value, list | dict) else (value, "")


def _prompts(graph: Graph, parts: Iterable[Node], wanted: str, *others: str) -> tuple[list[str], list[str]]:
    """Return the texts that a sampler's conditioning was encoded from: of `positive` or of `negative`.

    With them come the classes of the nodes that wrote texts which are not in the graph.
    """
    inputs = (wanted, *others)
    waiting = [next((part.inputs[name] for part in parts for name in inputs if name in part.inputs), None)]
    texts: list[str] = []
    origins: list[str] = []
    known: dict[str, str] = {}
    seen = set()
    for link in waiting:
        source = _source(graph, link)
        if source is None or source in seen:
            continue
        seen.add(source)
        node = graph[source]
        conditions = [value for name, value in node.inputs.items() if name.startswith("cond")]
        passed = node.inputs.get(wanted)
        if "zeroout" in node.kind.lower():
            continue
        if isinstance(passed, str) and "negative" in node.inputs:  # a loader that also encodes
            texts.append(passed)
        elif "negative" in node.inputs and _source(graph, passed) is not None:  # both pass through, as by a ControlNet
            waiting.append(passed)
        elif conditions:
            waiting += conditions
        elif text := _text(graph, source, known, 0):
            texts.append(text)
        else:
            writers = (_source(graph, node.inputs.get(name)) for name in _TEXTS)
            origins += [graph[writer].kind for writer in writers if writer is not None]
    return [text for text in texts if text.strip()], origins


def _text(graph: Graph, key: str, known: dict[str, str], depth: int) -> str:
    """Return the text that a node holds or puts together; empty where it is not in the graph."""
    kind, inputs = graph[key].kind, graph[key].inputs
    if key in known:
        return known[key]
    known[key] = ""  # what a node that comes from itself would get
    if depth > MAX_DEPTH or not _HANDS_ON.search(kind) or (_WRITES.search(kind) and "encode" not in kind.lower()):
        return ""

    def of(name: str) -> str:
        value = inputs.get(name)
        source = _source(graph, value)
        if source is not None:
            return _text(graph, source, known, depth + 1)
        return value if isinstance(value, str) else ""

    if _JOINS.search(kind):
        between = of("delimiter") or of("separator")
        pieces = [text for name in sorted(inputs) if re.match("text|string|prompt", name) and (text := of(name))]
        known[key] = between.join(pieces)[:MAX_PROMPT]
    else:
        known[key] = next((text for name in _TEXTS if (text := of(name)).strip()), "")
    return known[key]


def _take_latent(graph: Graph, parts: Iterable[Node], found: dict[str, Any], rest: dict[str, Any]) -> None:
    """Take the size, and name the image that was begun from."""
    names = ("latent_image", "latent", "samples")
    latent = next((part.inputs[name] for part in parts for name in names if name in part.inputs), None)
    start = _source(graph, latent)
    for key in _upstream(graph, [start] if start else []):
        node = graph[key]
        for prefix in ("", "empty_latent_"):
            if "width" not in found and {f"{prefix}width", f"{prefix}height"} <= node.inputs.keys():
                for side in ("width", "height"):
                    found[side], origin = _number(graph, node.inputs[prefix + side], (side,))
                    if origin:
                        rest[LABELS[side]] = origin
        if "loadimage" in node.kind.lower() and isinstance(node.inputs.get("image"), str):
            rest["Image"] = node.inputs["image"]


def _take_model(graph: Graph, parts: Iterable[Node], found: dict[str, Any], rest: dict[str, Any]) -> None:
    """Take the model's file and the LoRAs on the way from it."""
    loras: list[tuple[str, Any]] = []
    source = _source(graph, next((part.inputs["model"] for part in parts if "model" in part.inputs), None))
    for key in _upstream(graph, [source] if source else [], ("model", "lora_stack", "model_1", "optional_lora_stack")):
        node = graph[key]
        loras += _loras(node)
        if "shift" in node.inputs and node.inputs["shift"] != _SHIFT:
            rest["Shift"] = node.inputs["shift"]
        for name in _MODEL_FILES:
            if isinstance(node.inputs.get(name), str):
                found.setdefault("model", node.inputs[name])
    found["loras"] = loras


def _loras(node: Node) -> Iterator[tuple[str, Any]]:
    """Yield the LoRAs that a node applies: ComfyUI's own loaders, stacks with numbered inputs, rgthree's loader."""
    for name, value in node.inputs.items():
        match = re.fullmatch("lora(?:_name)?(_?[0-9]{0,3})", name)
        if isinstance(value, dict) and isinstance(value.get("lora"), str) and value.get("on", True):
            yield value["lora"], value.get("strength")
        elif match and isinstance(value, str) and value not in ("", "None"):
            number = match[1]
            inputs = (
                f"{kind}{number}" for kind in ("strength_model", "lora_model_strength", "model_weight", "strength")
            )
            much = next((node.inputs[strength] for strength in inputs if strength in node.inputs), None)
            if node.inputs.get(f"switch{number}") != "Off":
                yield value, much if isinstance(much, int | float | str) else None
