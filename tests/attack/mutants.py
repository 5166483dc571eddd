"""What is done to an input: bytes, JSON, TOML, safetensors, GGUF and ONNX, changed so that a reader gets to see it.

Every function takes the sound bytes and a source of chance, and returns other bytes; the same chance gives the same.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any, Final

import onnx

Mutator = Callable[[bytes, random.Random], bytes]

HOSTILE: Final[tuple[Any, ...]] = (
    None, True, False, -1, 0, 1, 3, 7, 2**31, 2**63, 2**70, -(2**63), 1e308, -1e-320, 0.5, float("nan"), float("inf"),
    "", "x", "x" * 300, "\ud800", "\0", "../../etc/passwd", "/dev/zero", "é\u2028", "1", "nan", "auto", "cuda", [], {},
    [0], [None], ["x"], {"x": 1}, [[[[[[]]]]]], {"a": {"b": {"c": {}}}},
)  # fmt: skip
"""Values that stand where others belong."""

_DEEP: Final = ("[" * 3000 + "]" * 3000, "9" * 5000, '{"a":' * 2000 + "0" + "}" * 2000)
"""Texts of JSON that its own readers stumble over."""

_WORDS: Final = (0, 1, 2, 3, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63, 2**64 - 1)


def some_bytes(data: bytes, chance: random.Random) -> bytes:
    """A few bytes flipped, set, cut out, doubled, or all behind a place cut off."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(found) + 1) if found else 0
        length = chance.choice((1, 2, 4, 8, 8, 64))
        match chance.randrange(7):
            case 0 if found:
                found[at % len(found)] ^= 1 << chance.randrange(8)
            case 1 if found:
                found[at % len(found)] = chance.choice((0, 0xFF, 0x80, 0x7F, chance.randrange(256)))
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = chance.randbytes(length)
            case 4:
                found[at:at] = found[max(0, at - length) : at]
            case 5:
                del found[at:]
            case _:
                word = struct.pack("<Q", chance.choice(_WORDS))[: chance.choice((4, 8))]
                found[at : at + len(word)] = word
    return bytes(found)


def head_bytes(data: bytes, chance: random.Random, length: int = 4096) -> bytes:
    """The same, at the beginning, where sizes stand."""
    return some_bytes(data[:length], chance) + data[length:]


# --- JSON


def some_json(data: bytes, chance: random.Random) -> bytes:
    """One or two values, keys or elements other than they were; now and then a byte."""
    if chance.random() < 0.15:
        return some_bytes(data, chance)
    value = json.loads(data)
    for _ in range(chance.choice((1, 1, 2))):
        value = _changed(value, chance)
    text = json.dumps(value)
    if chance.random() < 0.03:
        text = text.replace("null", chance.choice(_DEEP), 1) if "null" in text else chance.choice(_DEEP)
    return text.encode()


def _changed(value: Any, chance: random.Random) -> Any:
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return chance.choice(HOSTILE)
    # Shallow places are few, and mean most.
    depth = chance.choice(sorted({len(path) for path, _ in places}))
    (path, inside) = chance.choice([place for place in places if len(place[0]) == depth])
    key = path[-1]
    match chance.randrange(8):
        case 0:
            del inside[key]
        case 1:
            other = chance.choice(places)
            inside[key] = copy.deepcopy(other[1][other[0][-1]])
        case 2 if isinstance(inside, dict):
            inside[chance.choice((str(key) + "s", "", "\u0000", "__class__"))] = inside.pop(key)
        case 3 if isinstance(inside, list):
            inside.insert(key, copy.deepcopy(inside[chance.randrange(len(inside))]))
        case 4 if isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
            inside[key] = chance.choice(
                (-inside[key], inside[key] * 2, inside[key] + 1, inside[key] / 3, 10**9)
            )
        case 5 if isinstance(inside[key], str):
            inside[key] = chance.choice(
                (inside[key].upper(), inside[key][:-1], inside[key] * 2, inside[key] + "\n")
            )
        case _:
            inside[key] = copy.deepcopy(chance.choice(HOSTILE))
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Every element with the container that it is in; of long lists the first few."""
    keys: Any = ()
    if isinstance(value, dict):
        keys = value.keys() if len(value) < 200 else list(value)[:20]
    elif isinstance(value, list):
        keys = range(min(len(value), 8))
    for key in keys:
        yield (*path, key), value
        yield from _places(value[key], (*path, key))


def json_lines(data: bytes, chance: random.Random) -> bytes:
    """One line of several changed as JSON."""
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    lines[at] = some_json(lines[at] or b"{}", chance)
    return b"\n".join(lines)


# --- TOML


def some_toml(data: bytes, chance: random.Random) -> bytes:
    """A line doubled, left out, or with another value; now and then a byte."""
    if chance.random() < 0.2:
        return some_bytes(data, chance)
    lines = [line for line in data.decode().splitlines() if line and not line.startswith("#")]
    at = chance.randrange(len(lines))
    key = lines[at].partition("=")[0].strip()
    match chance.randrange(5):
        case 0:
            lines.append(lines[at])
        case 1:
            del lines[at]
        case 2:
            lines[at] = f"{key}{chance.choice(('.a', 's', ' '))} = {_toml_value(chance)}"
        case _:
            lines[at] = f"{key} = {_toml_value(chance)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _toml_value(chance: random.Random) -> str:
    value = chance.choice(HOSTILE)
    if isinstance(value, dict) or value is None:
        return chance.choice(("{}", "{a = 1}", "1979-05-27", "07:32:00", "[" * 2000 + "]" * 2000, "1" * 5000))
    return "nan" if value != value else "inf" if value == float("inf") else json.dumps(value)


# --- files with headers


def safetensors(data: bytes, chance: random.Random) -> bytes:
    """The header changed as JSON, its length right or wrong; or bytes of it."""
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.3:
        return some_bytes(data[: 8 + length], chance) + data[8 + length :]
    header = some_json(data[8 : 8 + length], chance)
    announced = len(header) if chance.random() < 0.9 else chance.choice(_WORDS)
    return announced.to_bytes(8, "little") + header + data[8 + length :]


def gguf(data: bytes, chance: random.Random) -> bytes:
    """Bytes of the header; or a number or text in it, which is found by what surrounds numbers and texts."""
    end = data.find(b"token_embd.weight") + 2048
    if chance.random() < 0.5:
        return some_bytes(data[:end], chance) + data[end:]
    found = bytearray(data)
    at = chance.randrange(0, end)
    length = chance.choice((4, 8))
    found[at : at + length] = struct.pack("<Q", chance.choice(_WORDS))[:length]
    for key in (
        b".head_count",
        b"block_count",
        b"rope.",
        b"context_length",
        b"embedding_length",
        b"eos_token_id",
    ):
        where = data.find(key)
        if where > 0 and chance.random() < 0.2:
            where += len(key) + 4 * chance.randrange(3)
            found[where : where + 4] = struct.pack("<Q", chance.choice(_WORDS))[:4]
    return bytes(found)


def graph(data: bytes, chance: random.Random) -> bytes:
    """Something in an ONNX graph that no longer fits the rest; or bytes of its file."""
    if chance.random() < 0.3:
        return head_bytes(data, chance, 1 << 16)
    model = onnx.load_from_string(data)
    for _ in range(chance.choice((1, 1, 3))):
        _change_graph(model, chance)
    return bytes(model.SerializeToString())


def _change_graph(model: Any, chance: random.Random) -> None:
    nodes, tensors = model.graph.node, model.graph.initializer
    node, tensor = chance.choice(nodes), chance.choice(tensors)
    attributes = [a for n in nodes for a in n.attribute]
    match chance.randrange(13):
        case 0:
            nodes.remove(node)
        case 1 if node.input:
            node.input[chance.randrange(len(node.input))] = chance.choice(
                ("", "nothing", chance.choice(tensors).name)
            )
        case 2 if attributes:
            chance.choice(attributes).i = chance.choice((0, -1, 1, 3, 2**31, 2**62, -(2**63)))
        case 3 if attributes:
            attribute = chance.choice(attributes)
            attribute.type = chance.randrange(1, 12)
        case 4:
            node.op_type = chance.choice(("MatMul", "Nothing", "", "Loop", "If", "MatMulNBits"))
        case 5:
            node.domain = chance.choice(("", "com.microsoft", "evil"))
        case 6 if tensor.dims:
            tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice((0, -1, 1, 7, 2**31, 2**62))
        case 7:
            tensor.data_type = chance.randrange(0, 26)
        case 8 if tensor.external_data:
            entry = chance.choice(tensor.external_data)
            entry.value = chance.choice(("-1", "0", "1", "x", str(2**70), "../model.onnx", "/etc/passwd", ""))
        case 9:
            tensors.remove(tensor)
        case 10:
            tensor.name = chance.choice(("", chance.choice(tensors).name, chance.choice(nodes).name))
        case 11:
            del model.metadata_props[:]
            model.ir_version = chance.choice((0, 3, 99, 2**40))
        case _:
            entry = chance.choice((*model.opset_import, *model.graph.input, *model.graph.output))
            if hasattr(entry, "version"):
                entry.version = chance.choice((0, 1, 9999, -1))
            else:
                entry.type.tensor_type.elem_type = chance.choice((0, 1, 7, 99))
