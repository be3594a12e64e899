"""Headers of GGUF files: the same that the package reads, and nothing from outside is trusted."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from hub import gguf_header
from hub.checkpoint import UnusableError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with metadata of every kind, and tensors of three types."""
    writer = GGUFWriter(tmp_path / "a.gguf", "lumina2")
    writer.add_name("Some Z-Image")
    writer.add_bool("a.truth", True)
    writer.add_float64("a.float", 0.5)
    writer.add_int8("a.small", -3)
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(1000)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 1000)
    writer.add_array("comfy.gguf.orig_shape.c.weight", [2, 1, 2, 64])
    writer.add_tensor("a.weight", np.zeros((3, 2 * 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("b.bias", np.ones(5, np.float32))
    writer.add_tensor("c.weight", np.zeros((1, 144), np.uint8), raw_dtype=GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "a.gguf"


def test_it_is_read_as_the_package_reads_it(file: Path) -> None:
    header, theirs = gguf_header.read_header(file), GGUFReader(file)
    assert header.data_start == theirs.data_offset
    for tensor in theirs.tensors:
        ours = header.tensors[tensor.name]
        assert header.data_start + ours.begin == tensor.data_offset
        assert ours.end - ours.begin == tensor.n_bytes
        assert ours.dtype.removeprefix("GGUF ") == tensor.tensor_type.name
    assert header.shapes == {"a.weight": (3, 64), "b.bias": (5,), "c.weight": (2, 1, 2, 64)}
    assert header.metadata["general.architecture"] == "lumina2"
    assert header.metadata["general.name"] == "Some Z-Image"
    assert (header.metadata["a.truth"], header.metadata["a.float"], header.metadata["a.small"]) == ("True", "0.5", "-3")


def test_types_are_ggmls_own_and_can_be_widened() -> None:
    for number, kind in gguf_header.KINDS.items():
        of = GGMLQuantizationType(number)
        assert (of.name, GGML_QUANT_SIZES[of]) == (kind.name, (kind.numbers, kind.bytes))
        assert dequantize(np.zeros((1, kind.bytes), np.uint8), of).shape == (1, kind.numbers)


def test_a_file_cut_short_says_so(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(4, len(whole) - 32, 97):
        file.write_bytes(whole[:length])
        with pytest.raises(UnusableError, match=r"is cut short|header cannot be read"):
            gguf_header.read_header(file)


START = b"GGUF" + struct.pack("<I", 3)
MANY = 1 << 62


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\3\4", "is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1; 2 and 3 are read"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "of version 50331648"),
        (START + struct.pack("<QQ", MANY, 0), "header cannot be read"),
        (START + struct.pack("<QQ", 0, MANY), "header cannot be read"),
        (START + struct.pack("<QQQ", 0, 1, MANY), "header cannot be read"),
        (START + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 4, MANY), "header cannot be read"),
        (START + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 9, 1), "header cannot be read"),
        (START + struct.pack("<QQQ1sI", 0, 1, 1, b"a", 99), "header cannot be read"),
        (START + struct.pack("<QQQ1sI", 1, 0, 1, b"a", 99), "header cannot be read"),
        (START + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"a", 1, MANY, 0, 0), "header cannot be read"),
        (START + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"a", 1, 4, 40, 0), "the GGUF type 40, which is not read here"),
        (START + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"a", 1, 4, 12, 0), "header cannot be read"),
        (START + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"\xff", 1, 4, 0, 0), "header cannot be read"),
        (START + struct.pack("<QQ", 2, 0) + struct.pack("<Q1sIQIQ", 1, b"a", 1, 4, 0, 0) * 2, "header cannot be read"),
    ],
)
def test_headers_from_outside_are_not_trusted(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(UnusableError, match=said):
        gguf_header.read_header(tmp_path / "a.gguf")


def test_looking_at_a_file_does_not_import_the_package(file: Path) -> None:
    code = "import sys; from pathlib import Path; from hub import packing; import engine; "
    code += "packing.stored([Path(sys.argv[1])]); print('gguf' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
