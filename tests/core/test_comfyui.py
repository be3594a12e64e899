"""ComfyUI's graphs, in the form of its own templates and of nodes that many have."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import RequestError
from core.metadata import read_picture
from core.parameters import Parameters
from tests.helpers import pictures

Graph = dict[str, Any]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def template(**instead: Any) -> Graph:
    """ComfyUI's own graph for Z-Image Turbo (templates/image_z_image_turbo.json), as it is run."""
    return {
        "9": node("SaveImage", filename_prefix="z-image", images=["57:8", 0]),
        "57:30": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2", device="default"),
        "57:29": node("VAELoader", vae_name="ae.safetensors"),
        "57:33": node("ConditioningZeroOut", conditioning=["57:27", 0]),
        "57:8": node("VAEDecode", samples=["57:3", 0], vae=["57:29", 0]),
        "57:28": node("UNETLoader", unet_name="z_image_turbo_bf16.safetensors", weight_dtype="default"),
        "57:27": node("CLIPTextEncode", text="a lighthouse", clip=["57:30", 0]),
        "57:13": node("EmptySD3LatentImage", width=1024, height=768, batch_size=1),
        "57:11": node("ModelSamplingAuraFlow", shift=3, model=["57:28", 0]),
        "57:3": node(
            "KSampler",
            seed=123,
            steps=9,
            cfg=1,
            sampler_name="euler",
            scheduler="simple",
            denoise=1,
            model=["57:11", 0],
            positive=["57:27", 0],
            negative=["57:33", 0],
            latent_image=["57:13", 0],
        ),
        **instead,
    }


READ = {
    "prompt": "a lighthouse",
    "model": "turbo",
    "steps": 9,
    "cfg": 1.0,
    "seed": 123,
    "width": 1024,
    "height": 768,
}


def changed(key: str, **inputs: Any) -> Graph:
    """The template with other inputs of one node."""
    graph = template()
    graph[key]["inputs"] |= inputs
    return graph


def read(tmp_path: Path, graph: Any, **texts: str) -> Parameters:
    return read_picture(pictures.png(tmp_path / "comfy.png", prompt=json.dumps(graph), **texts))


def test_the_template_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, template(), workflow="{}")
    assert found.source == "comfyui"
    assert found.values == READ
    assert found.not_restored == {"Scheduler": "simple"}
    assert found.request().model_dump()["seed"] == 123


def test_the_sampler_in_pieces_is_read(tmp_path: Path) -> None:
    graph = template()
    graph["57:3"] = node(
        "SamplerCustomAdvanced",
        noise=["1", 0],
        guider=["2", 0],
        sampler=["3", 0],
        sigmas=["4", 0],
        latent_image=["57:13", 0],
    )
    graph |= {
        "1": node("RandomNoise", noise_seed=123),
        "2": node("CFGGuider", cfg=1.0, model=["57:11", 0], positive=["57:27", 0], negative=["57:33", 0]),
        "3": node("KSamplerSelect", sampler_name="res_multistep"),
        "4": node("BasicScheduler", scheduler="simple", steps=9, denoise=1, model=["57:11", 0]),
    }
    found = read(tmp_path, graph)
    assert found.values == READ
    assert found.not_restored == {"Sampler": "res_multistep", "Scheduler": "simple"}
    graph["2"] = node("BasicGuider", model=["57:11", 0], conditioning=["57:27", 0])
    assert read(tmp_path, graph).values == {name: value for name, value in READ.items() if name != "cfg"}


def test_base_with_a_negative_prompt_is_read(tmp_path: Path) -> None:
    graph = changed("57:3", cfg=4.0, steps=25, negative=["5", 0])
    graph |= {
        "5": node("CLIPTextEncode", text="blurry", clip=["57:30", 0]),
        "57:28": node("UNETLoader", unet_name="z_image_bf16.safetensors"),
    }
    found = read(tmp_path, graph)
    assert found.values == READ | {"model": "base", "cfg": 4.0, "steps": 25, "negative_prompt": "blurry"}


@pytest.mark.parametrize(
    ("nodes", "named"),
    [
        (
            {
                "20": node("LoraLoaderModelOnly", lora_name="ink.safetensors", strength_model=0.8, model=["57:28", 0]),
                "57:11": node("ModelSamplingAuraFlow", shift=3, model=["20", 0]),
            },
            {"LoRA": "ink.safetensors (0.8)"},
        ),
        (
            {
                "20": node("LoraLoader", lora_name="ink.safetensors", strength_model=1, model=["57:28", 0]),
                "21": node(
                    "Power Lora Loader (rgthree)",
                    lora_1={"on": True, "lora": "gold.safetensors", "strength": 0.5},
                    lora_2={"on": False, "lora": "off.safetensors", "strength": 1},
                    model=["20", 0],
                ),
                "57:11": node("ModelSamplingAuraFlow", shift=3, model=["21", 0]),
            },
            {"LoRA": "gold.safetensors (0.5), ink.safetensors (1)"},
        ),
        ({"57:11": node("ModelSamplingAuraFlow", shift=6, model=["57:28", 0])}, {"Shift": "6"}),
        (
            {
                "30": node("LatentUpscaleBy", samples=["57:3", 0], scale_by=2),
                "31": node("KSampler", seed=5, steps=4, denoise=0.5, positive=["57:27", 0], latent_image=["30", 0]),
                "57:8": node("VAEDecode", samples=["31", 0]),
            },
            {"Sampler 2": "KSampler, steps 4, denoise 0.5"},
        ),
    ],
    ids=["lora", "loras", "shift", "second pass"],
)
def test_what_cannot_be_restored_is_named(nodes: Graph, named: dict[str, str], tmp_path: Path) -> None:
    found = read(tmp_path, template(**nodes))
    assert found.values == READ
    assert found.not_restored == {"Scheduler": "simple"} | named


def test_a_picture_that_was_begun_from_is_named(tmp_path: Path) -> None:
    graph = changed("57:3", latent_image=["40", 0], denoise=0.6)
    graph |= {"40": node("VAEEncode", pixels=["41", 0]), "41": node("LoadImage", image="photo.png")}
    found = read(tmp_path, graph)
    assert found.not_restored == {"Scheduler": "simple", "Denoise": "0.6", "Image": "photo.png"}


@pytest.mark.parametrize(
    "nodes",
    [
        {"60": node("PrimitiveStringMultiline", value="a lighthouse")},
        {"60": node("Text Multiline", text="a lighthouse")},
        {
            "60": node("StringConcatenate", string_a="a", string_b=["61", 0], delimiter=" "),
            "61": node("PrimitiveString", value="lighthouse"),
        },
        {
            "60": node("ShowText|pysssh", text=["61", 0], text_0="a lighthouse"),
            "61": node("OllamaGenerate", prompt="describe"),
        },
        {"60": node("ImpactWildcardProcessor", wildcard_text="a {lighthouse|mill}", populated_text="a lighthouse")},
    ],
    ids=["primitive", "multiline", "joined", "shown", "wildcard"],
)
def test_a_prompt_is_followed_to_where_it_was_typed(nodes: Graph, tmp_path: Path) -> None:
    found = read(tmp_path, {**changed("57:27", text=["60", 0]), **nodes})
    assert found.values == READ


def test_a_prompt_that_a_language_model_wrote_is_named(tmp_path: Path) -> None:
    graph = {**changed("57:27", text=["60", 0]), "60": node("OllamaGenerate", prompt="Write a prompt", model="llama")}
    found = read(tmp_path, graph)
    assert "prompt" not in found.values
    assert found.not_restored["Prompt"] == "OllamaGenerate"
    with pytest.raises(RequestError, match=r"^prompt: "):
        found.request()


def test_values_from_other_nodes_are_followed_or_named(tmp_path: Path) -> None:
    graph = changed("57:3", seed=["70", 0], steps=["71", 0], cfg=["72", 0])
    graph |= {
        "70": node("Seed (rgthree)", seed=123),
        "71": node("PrimitiveInt", value=9),
        "72": node("MathExpression|pysssh", expression="a * 2", a=1),
    }
    found = read(tmp_path, graph)
    assert found.values == {name: value for name, value in READ.items() if name != "cfg"}
    assert found.not_restored["CFG scale"] == "MathExpression|pysssh"


def test_conditioning_through_a_controlnet_is_followed(tmp_path: Path) -> None:
    graph = changed("57:3", positive=["80", 0], negative=["80", 1], cfg=4)
    graph |= {
        "80": node("ControlNetApplyAdvanced", positive=["57:27", 0], negative=["5", 0], strength=0.7),
        "5": node("CLIPTextEncode", text="blurry"),
        "57:28": node("UNETLoader", unet_name="z_image_bf16.safetensors"),
    }
    found = read(tmp_path, graph)
    assert (found.values["prompt"], found.values["negative_prompt"]) == ("a lighthouse", "blurry")


def test_a_loader_that_also_encodes_is_read(tmp_path: Path) -> None:
    # efficiency-nodes-comfyui: one node has the files, both prompts and the size.
    loader = node(
        "Efficient Loader",
        ckpt_name="z_image_bf16.safetensors",
        lora_name="ink.safetensors",
        lora_model_strength=0.8,
        positive="a lighthouse",
        negative="blurry",
        empty_latent_width=1024,
        empty_latent_height=768,
    )
    links = {"model": ["1", 0], "positive": ["1", 1], "negative": ["1", 2], "latent_image": ["1", 3]}
    sampler = node(
        "KSampler (Efficient)", seed=123, steps=9, cfg=4.0, sampler_name="euler", scheduler="normal", **links
    )
    found = read(tmp_path, {"1": loader, "2": sampler})
    assert found.values == READ | {"model": "base", "cfg": 4.0, "negative_prompt": "blurry"}
    assert found.not_restored == {"Scheduler": "normal", "LoRA": "ink.safetensors (0.8)"}


def test_the_graph_of_the_screen_is_read_where_it_is_alone(tmp_path: Path) -> None:
    def drawn(number: int, kind: str, values: list[Any], mode: int = 0, **links: int) -> Graph:
        inputs = [{"name": name, "type": "X", "link": link} for name, link in links.items()]
        return {"id": number, "type": kind, "mode": mode, "inputs": inputs, "widgets_values": values}

    sampled = [123, "randomize", 9, 1, "euler", "simple", 1]
    workflow = {
        "nodes": [
            drawn(1, "UNETLoader", ["z_image_turbo_bf16.safetensors", "default"]),
            drawn(2, "LoraLoaderModelOnly", ["ink.safetensors", 0.8], model=10),
            drawn(7, "LoraLoaderModelOnly", ["bypassed.safetensors", 1], mode=4, model=15),
            drawn(3, "CLIPTextEncode", ["a lighthouse"]),
            drawn(4, "CLIPTextEncode", [""]),
            drawn(5, "EmptySD3LatentImage", [1024, 768, 1]),
            drawn(6, "KSampler", sampled, model=11, positive=12, negative=13, latent_image=14),
        ],
        "links": [
            *([10, 1, 0, 2, 0, "MODEL"], [15, 2, 0, 7, 0, "MODEL"], [11, 7, 0, 6, 0, "MODEL"]),
            *([12, 3, 0, 6, 1, "C"], [13, 4, 0, 6, 2, "C"], [14, 5, 0, 6, 3, "L"]),
        ],
    }
    found = read_picture(pictures.png(tmp_path / "x.png", workflow=json.dumps(workflow)))
    assert found.values == READ
    assert found.not_restored == {"Scheduler": "simple", "LoRA": "ink.safetensors (0.8)"}


def test_a_line_of_parameters_comes_before_the_graph(tmp_path: Path) -> None:
    # Nodes that save for galleries write both, and have worked out what the graph only leads to.
    found = read(tmp_path, template(), parameters="a mill\nSteps: 8, Seed: 5, Size: 512x512")
    assert (found.source, found.values["prompt"]) == ("a1111", "a mill")


def test_of_two_pictures_the_saved_one_is_read(tmp_path: Path) -> None:
    other = {
        "1": node("KSampler", seed=5, steps=2, cfg=1, positive=["57:27", 0]),
        "2": node("PreviewImage", images=["1", 0]),
    }
    assert read(tmp_path, other | template()).values == READ


# --- hostile graphs ---


@pytest.mark.parametrize(
    "nodes",
    [
        {"57:27": node("CLIPTextEncode", text=["57:27", 0])},
        {"57:27": node("ConditioningCombine", conditioning_1=["57:27", 0], conditioning_2=["57:33", 0])},
        {"57:11": node("ModelSamplingAuraFlow", model=["57:11", 0])},
        {"57:13": node("EmptySD3LatentImage", width=["57:13", 0], height=["57:13", 0])},
        {"57:13": node("Latent", samples=["57:3", 0])},
        {"57:3": node("KSampler", positive=["57:3", 0], seed=["57:3", 0], latent_image=[[], {}])},
        {"57:3": node("KSampler", positive=[["57:3"], 0], seed={"a": 1}, steps=[1, 2, 3])},
        {
            str(number): node("StringConcatenate", string_a=[str(number + 1), 0], string_b=[str(number + 1), 0])
            for number in range(1_500)
        }
        | {"1500": node("PrimitiveString", value="x" * 1_000), "57:27": node("CLIPTextEncode", text=["0", 0])},
        {
            str(number): node("StringConcatenate", string_a=[str(number + 1), 0], string_b="x" * 1_000)
            for number in range(40)
        }
        | {"57:27": node("CLIPTextEncode", text=["0", 0])},
        {str(number): node("KSampler", positive=["57:27", 0], seed=1, steps=1) for number in range(1_500)},
        {str(number): node("SaveImage", images=["57:8", 0]) for number in range(100_000)},
    ],
    ids=lambda nodes: f"{len(nodes)} nodes",
)
def test_a_graph_without_end_is_read_or_refused(nodes: Graph, tmp_path: Path) -> None:
    try:
        found = read(tmp_path, template(**nodes))
        found.request()
    except RequestError as refused:
        assert len(str(refused)) < 400
