"""The header of a GGUF file: damage is one line, and costs neither memory nor a look at the weights."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import pytest

from edgetune import sources
from edgetune.artifact import Artifact
from edgetune.errors import SourceError
from edgetune.gguf_header import read_header


@pytest.fixture
def gguf_file(tiny_gguf: Artifact) -> Path:
    return tiny_gguf.path / "model.gguf"


def header_end(file: Path) -> int:
    from gguf import GGUFReader

    return int(GGUFReader(file).data_offset)


def read_or_refuse(file: Path) -> bool:
    """Read a header and its config; only success or a one-line SourceError are answers."""
    try:
        sources.gguf_config(read_header(file), file)
    except SourceError as error:
        assert "\n" not in str(error), repr(str(error))  # noqa: PT017
        assert str(file) in str(error)  # noqa: PT017
        return False
    return True


@pytest.mark.parametrize("seed", range(20))
def test_a_gguf_file_cut_anywhere_is_refused(gguf_file: Path, tmp_path: Path, seed: int) -> None:
    whole = gguf_file.read_bytes()
    rng = random.Random(seed)
    limit = header_end(gguf_file) if seed % 2 else len(whole)
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[: rng.randrange(limit - 1)])
    with pytest.raises(SourceError, match=r"cut\.gguf: truncated or damaged GGUF file \(.+\); get it again$"):
        read_header(file)
    with pytest.raises(SourceError):
        sources.find(str(file))


@pytest.mark.parametrize("seed", range(8))
def test_flipped_header_bytes_are_refused_or_read_and_never_cost_memory(
    gguf_file: Path, tmp_path: Path, seed: int
) -> None:
    whole, end = gguf_file.read_bytes(), header_end(gguf_file)
    rng = random.Random(seed)
    file = tmp_path / "flipped.gguf"
    tracemalloc.start()
    try:
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(rng.choice([1, 1, 4, 16])):
                data[rng.randrange(4, rng.choice([24, 400, end]))] = rng.randrange(256)
            file.write_bytes(data)
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            read_or_refuse(file)
            assert tracemalloc.get_traced_memory()[1] - start < 4 * len(whole) + 2**20
    finally:
        tracemalloc.stop()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, keys: bytes = b"", n_keys: int = 0, tensors: bytes = b"", n_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + keys + tensors


HUGE = 2**63
BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "4 bytes wanted at byte 0, the file ends at 0"),
    "not GGUF": (b"PK\x03\x04" + b"\0" * 100, "does not begin with 'GGUF'"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + b"\0" * 16, "version 50331648, 2 and 3 are known"),
    "version 1": (header(version=1), "version 1"),
    "too many tensors": (header(n_tensors=HUGE), "9223372036854775808 tensors are not plausible"),
    "too many keys": (header(n_keys=2**24 + 1), "16777217 keys are not plausible"),
    "a string longer than the file": (header(keys=struct.pack("<Q", HUGE), n_keys=1), "bytes wanted"),
    "a key that is not UTF-8": (header(keys=struct.pack("<Q", 1) + b"\xff" + b"\0" * 8, n_keys=1), "utf-8"),
    "unknown value type": (header(keys=text("k") + struct.pack("<I", 77), n_keys=1), "unknown value type 77"),
    "array longer than the file": (
        header(keys=text("k") + struct.pack("<IIQ", 9, 4, 2**24), n_keys=1), "67108864 bytes wanted",
    ),
    "implausible array": (header(keys=text("k") + struct.pack("<IIQ", 9, 8, HUGE), n_keys=1), "array items are not"),
    "array of arrays": (header(keys=text("k") + struct.pack("<IIQ", 9, 9, 1), n_keys=1), "unknown array type 9"),
    "alignment 0": (header(keys=text("general.alignment") + struct.pack("<II", 4, 0), n_keys=1), "alignment 0"),
    "alignment a text": (
        header(keys=text("general.alignment") + struct.pack("<I", 8) + text("x"), n_keys=1), "alignment x",
    ),
    "no dimensions": (header(tensors=text("t") + struct.pack("<I", 0), n_tensors=1), "tensor t has 0 dimensions"),
    "many dimensions": (header(tensors=text("t") + struct.pack("<I", 2**31), n_tensors=1), "2147483648 dimensions"),
    "unknown ggml type": (
        header(tensors=text("t") + struct.pack("<IQIQ", 1, 32, 999, 0), n_tensors=1), "999 is not a valid",
    ),
    "behind the end": (
        header(tensors=text("t") + struct.pack("<IQIQ", 1, 32, 0, 0), n_tensors=1), "ends behind the end of the file",
    ),
    "a tensor of 2^256 bytes": (
        header(tensors=text("t") + struct.pack("<IQQQQIQ", 4, *[HUGE] * 4, 0, 0), n_tensors=1), "ends behind the end",
    ),
    "an offset behind the end": (
        header(tensors=text("t") + struct.pack("<IQIQ", 1, 1, 0, HUGE), n_tensors=1), "ends behind the end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_each_damage_to_a_header_has_its_reason(tmp_path: Path, case: str) -> None:
    data, says = BAD_HEADERS[case]
    file = tmp_path / "x.gguf"
    file.write_bytes(data)
    with pytest.raises(SourceError, match=says) as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


def test_a_header_of_another_architecture_or_of_none(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(header(keys=text("general.architecture") + struct.pack("<I", 8) + text("bert"), n_keys=1))
    with pytest.raises(SourceError, match=r"architecture 'bert'; known: llama, qwen2, qwen3"):
        sources.gguf_config(read_header(file), file)
    file.write_bytes(header())
    with pytest.raises(SourceError, match="architecture None"):
        sources.gguf_config(read_header(file), file)
    file.write_bytes(header(keys=text("general.architecture") + struct.pack("<I", 8) + text("llama"), n_keys=1))
    with pytest.raises(SourceError, match=r"the GGUF header lacks what llama needs \('llama.attention.head_count'\)"):
        sources.gguf_config(read_header(file), file)


def test_an_infinite_number_of_heads_is_refused(tmp_path: Path) -> None:
    keys = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    keys += text("llama.attention.head_count") + struct.pack("<If", 6, float("inf"))
    file = tmp_path / "x.gguf"
    file.write_bytes(header(keys=keys, n_keys=2))
    with pytest.raises(SourceError):
        sources.gguf_config(read_header(file), file)
