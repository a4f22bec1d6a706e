"""A loader that is given many thousands of damaged files loads rightly or refuses in one line, and never anything else.

What it loads is compared with an oracle that reads the same bytes and applies the rules of the formats in a few lines.
"""

import json
import math
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flowra_adapters import (
    METHODS,
    Adapter,
    AdapterMethod,
    LoRA,
    adapters,
    attach,
    detach,
    load_adapter,
    merge,
    save_adapter,
)
from flowra_adapters.adapter import AdapterDict
from flowra_adapters.kohya import load_kohya, save_kohya
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import nested

SECONDS = 5.0  # for one input of two kilobytes
MEGABYTES = 256  # that all inputs together may add to the process
LARGE = 1e15
LONGEST = 1200  # characters of a message, some 100 of them for the folder


class Net(nn.Module):
    """An embedding, convolutions with and without groups, a norm, linear layers, and a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.grouped = nn.Conv1d(4, 6, 2, groups=2)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids ``(b, t)`` to ``(b, t - 1, 3)``."""
        hidden = self.grouped(torch.tanh(self.conv(self.words(ids).mT))).mT
        output: Tensor = self.head(torch.tanh(self.fc(self.norm(hidden))))
        return output


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().double().eval()


IDS = torch.arange(14).view(2, 7) % 7
BASE = net()
State = dict[str, Tensor]


def copy_of_base() -> State:
    return {name: tensor.clone() for name, tensor in BASE.state_dict().items()}


# Files as the fuzzer sees them.

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPES = [
    *SIZES,
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "U16",
    "U32",
    "U64",
    "C64",
    "f32",
    "",
    "F128",
    None,
    5,
]
CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
CODES |= {
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
    torch.uint8: "U8",
}
CASTS = [*CODES]


@dataclass(frozen=True)
class Files:
    """A configuration and tensors: name to dtype, shape and bytes."""

    config: dict[str, Any]
    tensors: dict[str, tuple[Any, Any, bytes]]

    @classmethod
    def of(cls, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> "Files":
        """Take tensors apart."""
        return cls(config, {name: taken_apart(tensor) for name, tensor in tensors.items()})

    def entries(self) -> dict[str, Any]:
        """Return the header of a safetensors file."""
        found, start = {}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
            start += len(data)
        return found

    def packed(self, header: str | None = None, length: int | None = None) -> bytes:
        """Write a safetensors file, with another header or another length of it than is true."""
        text = (json.dumps(self.entries()) if header is None else header).encode("utf-8", "replace")
        size = len(text) if length is None else length
        return size.to_bytes(8, "little") + text + b"".join(data for _, _, data in self.tensors.values())

    def text(self) -> bytes:
        """Write the configuration."""
        return json.dumps(self.config).encode()


def taken_apart(tensor: Tensor) -> tuple[str, list[int], bytes]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return CODES[tensor.dtype], list(tensor.shape), data.numpy().tobytes()


Damage = Callable[[random.Random, Files], tuple[bytes, bytes]]
ODD_NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    10**9,
    2**63,
    2**64,
    10**400,
    -(10**30),
    1e308,
    5e-324,
    math.nan,
    math.inf,
    -math.inf,
    0.5,
    2.0,
]
ODD: list[Any] = [
    *ODD_NUMBERS,
    None,
    True,
    False,
    "",
    "2",
    "lora",
    "x" * 5000,
    "a\nb",
    "\ud800",
    "../../etc/passwd",
    "é\u202e",
]
ODD += [
    [],
    [[]],
    [None],
    ["head"],
    ["fc"],
    [True] * 2,
    {},
    {"": 1},
    {"fc": 2},
    {"a\nb": {}},
    [[[[[1]]]]],
    "fc.weight",
    ["fc.weight"],
]
BOMBS = [
    *(
        "(a+)+b",
        "(c|c)*d",
        "(.*.*)*x",
        "(?:a|aa)+$",
        "((((((((((c?)*)*)*)*)*)*)*)*)*)*z",
        ".*" * 30 + "!",
        "[a-z]*" * 20 + "!",
    ),
    *(
        "(?x:(c|c|o|n|v) +)!",
        ".?" * 60 + "!",
        "(.|.)" * 40 + "!",
        "(?=(a+))",
        "c{1,99999}" * 5,
        "(?i)fc",
        "(?P<n>c)(?P=n)*",
    ),
    *(
        "fc",
        "f.",
        ".*",
        "fc|conv",
        "[",
        "(",
        "\\",
        "(?",
        "c" * 10000,
        "(" * 3000 + ")" * 3000,
        "x{99999999999999999999}",
        "",
        "\n",
    ),
]
ODD_NAMES = [
    "",
    ".",
    "..",
    "../../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "x" * 3000,
    "é\u202e",
    "\n",
    "\0",
    "fc",
    "conv",
    "weight",
]
ODD_NAMES += [
    "lora_A",
    "fc:0",
    "fc:q",
    "default",
    "base_layer",
    "fc.base_layer",
    "bias",
    "head",
    "norm",
    "words",
    ":",
    "site",
    "a" * 60,
]


def flipped(rng: random.Random, data: bytes, share: float = 1.0) -> bytes:
    """Change a few bits in the first part of some bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if out:
            out[rng.randrange(max(1, int(len(out) * share)))] ^= 1 << rng.randrange(8)
    return bytes(out)


def damage_bytes(rng: random.Random, files: Files) -> tuple[bytes, bytes]:
    """Flip bits, cut, or add bytes, anywhere in the tensors' file."""
    data = files.packed()
    kind = rng.randrange(6)
    if kind < 3:
        return files.text(), flipped(rng, data, rng.choice([0.01, 0.5, 1.0]))
    if kind == 3:
        return files.text(), data[: rng.randrange(len(data))]
    if kind == 4:
        return files.text(), data + rng.randbytes(rng.randrange(1, 64))
    length = rng.choice([0, 1, 7, len(data), len(data) - 8, 10**8, 2**31, 2**63, 2**64 - 1, rng.randrange(len(data))])
    return files.text(), files.packed(length=length)


def damage_payload(rng: random.Random, files: Files) -> tuple[bytes, bytes]:
    """Flip bits of values only."""
    name = rng.choice([*files.tensors])
    dtype, shape, data = files.tensors[name]
    return intact(replace(files, tensors={**files.tensors, name: (dtype, shape, flipped(rng, data))}))


def damage_header(rng: random.Random, files: Files) -> tuple[bytes, bytes]:
    """Let the header lie about one tensor, or be something else."""
    header = files.entries()
    name = rng.choice([*header])
    entry = header[name]
    start, end = entry["data_offsets"]
    kind = rng.randrange(10)
    text: str | None = None
    if kind == 0:
        step = rng.choice([1, 4, -4, 10**6])
        entry["data_offsets"] = rng.choice([
            *(
                [start, end + step],
                [start + step, end],
                [end, start],
                [-1, 3],
                [0, 2**64],
                [0, 2**63 - 1],
                [0],
                [],
                "ab",
            ),
            *([None, None], [0.5, 1.5], [start, end, end], [0, end - start], [2**64 - 1, 2**64 - 1]),
        ])
    elif kind == 1:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind in (2, 3):
        shape = list(entry["shape"])
        size = math.prod(shape)
        entry["shape"] = rng.choice([
            *(
                shape[::-1],
                [*shape, 1],
                [1, *shape],
                [size],
                [size, 1],
                [1, size],
                shape[1:],
                [0],
                [0, 10**18],
                [10**9, 8],
                [],
            ),
            *(
                [2**63, 2],
                [2**32, 2**32],
                [-1, *shape[1:]],
                [-1, -size],
                [1.0],
                ["2"],
                None,
                [None],
                [[2]],
                [1] * 70,
                [2**64],
            ),
        ])
    elif kind == 4:
        other = rng.choice([*header])
        header[other] = {**header[other], "data_offsets": entry["data_offsets"]}
    elif kind == 5:
        del header[rng.choice([*header])]
    elif kind == 6:
        again = {**entry, **rng.choice([{}, {"dtype": "F16"}, {"shape": entry["shape"][::-1]}])}
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(again)}}}"
    elif kind == 7:
        depth = rng.choice([10, 1000, 100_000])
        text = rng.choice([
            "[" * depth,
            '{"a":' * depth,
            "{}",
            "",
            "null",
            "[]",
            '{"__metadata__": {"a": {}}}',
            "{" * 9,
            "NaN",
        ])
    elif kind == 8:
        header["__metadata__"] = rng.choice([{"format": "pt"}, {"format": 5}, {"a": "b" * 5000}, [], None, "x"])
    else:
        header[rng.choice([*ODD_NAMES, "__metadata__"])] = rng.choice([entry, {}, [], 5, None, {**entry, "more": 1}])
    return files.text(), files.packed(text if text is not None else json.dumps(header))


def damage_tensors(rng: random.Random, files: Files) -> tuple[bytes, bytes]:
    """Write a whole file of other tensors: other names, values, dtypes, shapes; more, or fewer of them."""
    tensors = {name: rebuilt(*parts) for name, parts in files.tensors.items()}
    name = rng.choice([*tensors])
    tensor = tensors[name]
    kind = rng.randrange(9)
    if kind == 0:
        tensors[odd_name(rng, name, [*tensors])] = tensors.pop(name)
    elif kind == 1:
        del tensors[name]
    elif kind == 2:
        tensors[odd_name(rng, name, [*tensors])] = tensor.clone()
    elif kind == 3 and tensor.numel():
        wide = tensor.clone()
        wide.view(-1)[rng.randrange(wide.numel())] = odd_value(rng, wide)
        tensors[name] = wide
    elif kind == 4:
        tensors[name] = tensor.to(torch.complex64 if rng.random() < 0.1 else rng.choice(CASTS))
    elif kind == 5 and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor.double(), rng.choice([1e300, 1e39, 7e4, 1e-310, 0.0, -1.0]))
    elif kind == 6:
        shape = list(tensor.shape) or [1]
        shape[rng.randrange(len(shape))] += rng.choice([-1, 1, 1, 2])
        tensors[name] = torch.ones([max(0, size) for size in shape], dtype=tensor.dtype)
    elif kind == 7:
        shape = rng.choice([
            (),
            (1,),
            (1, *tensor.shape),
            (*tensor.shape, 1),
            (tensor.numel(),),
            (0,),
            tensor.shape[:1],
        ])
        tensors[name] = torch.full(shape, 0.5).to(tensor.dtype)
    else:
        module = re.split(r"\.lora_|/lora_", name)[0]
        for key in [key for key in tensors if key.startswith(module)]:
            tensors[key] = tensors[key].to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.float64]))
    return intact(Files.of(files.config, tensors))


def rebuilt(dtype: str, shape: list[int], data: bytes) -> Tensor:
    own = next(each for each, code in CODES.items() if code == dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(own).reshape(shape) if data else torch.empty(shape)


def odd_value(rng: random.Random, tensor: Tensor) -> Any:  # noqa: ANN401 - a number or a truth value
    if tensor.is_floating_point():
        return rng.choice([math.nan, math.inf, -math.inf, 3e38, 6e4, 1e-40, 0.0, -0.0])
    return rng.choice([0, 1]) if tensor.dtype == torch.bool else rng.choice([0, -1, 2**62, -(2**63)])


def odd_name(rng: random.Random, name: str, others: list[str]) -> str:
    """Change a tensor's name."""
    parts = re.split(r"([./])", name)
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(others)
    if kind == 1:
        parts[2 * rng.randrange(len(parts) // 2 + 1)] = rng.choice(ODD_NAMES)
    elif kind == 2:
        parts.insert(2 * rng.randrange(len(parts) // 2 + 1), rng.choice(ODD_NAMES) + ".")
    elif kind == 3:
        del parts[: rng.choice([1, 2, 3, 4])]
    elif kind == 4:
        return name.replace(
            *rng.choice([("fc", "conv"), ("conv", "fc"), ("lora_A", "lora_B"), ("base_layer.", ""), (".", ":")])
        )
    else:
        return name + rng.choice(["", ".weight", ".bias", ".default", "/x", ":", " ", "\n"])
    return "".join(parts)


def damage_config(rng: random.Random, files: Files) -> tuple[bytes, bytes]:
    """Put something odd somewhere into the configuration."""
    config = json.loads(files.text())
    places = list(nodes(config))
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind < 3:
        holder[key] = rng.choice(ODD)
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice([*ODD_NAMES, *config, "use_dora", "use_rslora", "lora_bias"])] = rng.choice([
            *ODD,
            holder[key],
        ])
    elif kind == 4:
        del holder[key]
    elif "rank_pattern" in config:
        pattern = rng.choice(["rank_pattern", "alpha_pattern"])
        made = {rng.choice(BOMBS): rng.choice([*ODD_NUMBERS, 2, 3]) for _ in range(rng.choice([1, 2]))}
        old = config.get(pattern)
        config[pattern] = {**old, **made} if isinstance(old, dict) and rng.random() < 0.5 else made
    else:
        holder[key] = rng.choice(ODD_NUMBERS)
    return replace(files, config=config).text(), files.packed()


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401 - JSON
    """List the places in a tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from nodes(value)


def damage_text(rng: random.Random, files: Files) -> tuple[bytes, bytes]:
    """Damage the configuration's bytes."""
    text = files.text()
    kind = rng.randrange(5)
    if kind < 2:
        text = flipped(rng, text)
    elif kind == 2:
        text = text[: rng.randrange(len(text))]
    elif kind == 3:
        key = rng.choice([*files.config])
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(ODD))}}}".encode()
    else:
        text = rng.choice([
            b"",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"null",
            b"\xff\xfe",
            b"\xef\xbb\xbf" + text,
            b"[1]" * 3,
        ])
    return text, files.packed()


def intact(files: Files) -> tuple[bytes, bytes]:
    return files.text(), files.packed()


DAMAGES: list[Damage] = [
    damage_bytes,
    damage_payload,
    damage_header,
    damage_tensors,
    damage_tensors,
    damage_config,
    damage_text,
]


def damaged(rng: random.Random, files: Files) -> tuple[bytes, bytes]:
    """Damage the files once or, in one file or in each of them, twice."""
    chosen = rng.choice(DAMAGES if files.config else DAMAGES[:5])
    text, data = chosen(rng, files)
    if rng.random() < 0.25:
        if files.config:
            text = rng.choice([damage_config, damage_text])(rng, files)[0]
        else:
            data = flipped(rng, data)
    return text, data


# The oracle.


def scaling_of(name: str, config: Mapping[str, Any]) -> float:
    """Return s as PEFT has it."""

    def value(pattern: str, default: str) -> float:
        keys = [key for key in config.get(pattern) or {} if re.match(rf"(.*\.)?({key})$", name)]
        return float(config[pattern][keys[0]] if keys else config[default])

    if config["peft_type"] == "ADALORA":
        return float(config["lora_alpha"]) / (config["init_r"] + 1e-5)
    rank = value("rank_pattern", "r")
    return value("alpha_pattern", "lora_alpha") / (math.sqrt(rank) if config.get("use_rslora") else rank)


def product(layer: nn.Module, b: Tensor, a: Tensor) -> Tensor:
    """Multiply factors (m, r) and (r, n·∏k), block by block, and give the product the stored weight's shape."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Embedding):
        return (b @ a).T
    groups = getattr(layer, "groups", 1)
    rows, columns = len(b) // groups, a.shape[1] // groups
    blocks = [b[j * rows : (j + 1) * rows] @ a[:, j * columns : (j + 1) * columns] for j in range(groups)]
    return torch.cat(blocks).reshape(weight.shape)


def dense_of_peft(layer: nn.Module, b: Tensor, a: Tensor) -> Tensor:
    """Multiply PEFT's factors of a layer: those of a grouped convolution see all inputs, and have their own ranks."""
    groups = getattr(layer, "groups", 1)
    if groups == 1 or a.ndim == 2:
        return product(layer, b.flatten(1), a.flatten(1))
    b, rank = b.flatten(1), b.shape[1]
    rows, columns = len(b) // groups, a.shape[1] // groups
    pieces = []
    for j in range(groups):
        own = a[j * rank : (j + 1) * rank]
        assert own.count_nonzero() == own[:, j * columns : (j + 1) * columns].count_nonzero()
        pieces.append(b[j * rows : (j + 1) * rows] @ own[:, j * columns : (j + 1) * columns].flatten(1))
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return torch.cat(pieces).reshape(weight.shape)


def stretched(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Give each row the length that DoRA says."""
    norms = weight.flatten(1).norm(dim=1)
    # ours is rounded to the magnitude's dtype
    return weight * (magnitude.double().flatten() / norms).view(-1, *(1,) * (weight.ndim - 1))


def oracle_of_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> State:
    """Put what PEFT's files say into the weights."""
    model = BASE
    state, plain = (
        copy_of_base(),
        {key.removeprefix("base_model.model."): each.double() for key, each in tensors.items()},
    )
    for key, tensor in plain.items():
        name, _, half = key.partition(".lora_")
        if half in ("A.weight", "embedding_A", "A"):
            layer = model.get_submodule(name)
            b = next(
                plain[f"{name}.lora_{other}"]
                for other in ("B.weight", "embedding_B", "B")
                if f"{name}.lora_{other}" in plain
            )
            e = plain.get(f"{name}.lora_E")
            if len(tensor) == 0:
                continue
            delta = dense_of_peft(layer, b if e is None else b * e.T, tensor) * scaling_of(name, config)
            weight = state[f"{name}.weight"] + delta
            magnitude = plain.get(f"{name}.lora_magnitude_vector")
            if magnitude is not None:
                weight = (
                    stretched(weight.T, magnitude).T
                    if isinstance(layer, nn.Embedding)
                    else stretched(weight, magnitude)
                )
            state[f"{name}.weight"].copy_(weight)
            if f"{name}.lora_B.bias" in plain:
                own = plain.get(f"{name}.base_layer.bias", state[f"{name}.bias"])
                state[f"{name}.bias"].copy_(own + scaling_of(name, config) * plain[f"{name}.lora_B.bias"])
        elif not half and f"{name.removesuffix('.base_layer.bias')}.lora_B.bias" not in plain:
            state[key.replace(".base_layer.bias", ".bias")].copy_(tensor)
    return state


def oracle_of_own(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> State:
    """Put what Flowra's files say into the weights."""
    model = BASE
    state = copy_of_base()
    for key, tensor in tensors.items():
        if key.startswith("saved/"):
            state[key.removeprefix("saved/")].copy_(tensor)
    for name, entry in config["sites"].items():
        own = {
            key.rpartition("/")[2]: each.double() for key, each in tensors.items() if key.startswith(f"site/{name}/")
        }
        if entry["rank"] == 0:
            continue
        if "offset" in own:
            place = name if name in state else f"{name}.weight"
            state[place] += own["offset"].sum(0)
            continue
        layer, place = model.get_submodule(name), f"{name}.weight"
        if "core" in own:
            core = own["core"]
            for axis in range(core.ndim):
                factor = own.get(f"factor_{axis}", torch.ones(1, 1).double())
                core = torch.tensordot(factor, core.movedim(axis, 0), 1).movedim(0, axis)
            delta = core.T if isinstance(layer, nn.Embedding) else core
        else:
            diagonal = own.get("lora_E", torch.ones(len(own["lora_A"])).double()) * own.get(
                "mask", torch.ones(()).double()
            )
            delta = product(layer, own["lora_B"] * diagonal, own["lora_A"])
            if "offset_A" in own:
                delta = delta - product(layer, own["offset_B"], own["offset_A"])
        weight = state[place] + float(entry["scaling"]) * delta
        if "lora_magnitude" in own:
            turned = weight.T if isinstance(layer, nn.Embedding) else weight
            turned = stretched(turned, own["lora_magnitude"])
            weight = turned.T if isinstance(layer, nn.Embedding) else turned
        state[place].copy_(weight)
    return state


def oracle_of_kohya(_: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> State:
    """Put what a file of kohya's says into the weights."""
    state = copy_of_base()
    for key, down in tensors.items():
        module, _, half = key.partition(".")
        if half != "lora_down.weight":
            continue
        name = module.removeprefix("lora_unet_")
        up, mid = tensors[f"{module}.lora_up.weight"].double(), tensors.get(f"{module}.lora_mid.weight")
        rank = len(down)
        scale = float(tensors.get(f"{module}.alpha", torch.tensor(float(rank)))) / rank
        if mid is None:
            delta = up.flatten(1) @ down.double().flatten(1)
        else:
            delta = torch.einsum("op,pqk,qi->oik", up.flatten(1), mid.double(), down.double().flatten(1))
        weight = state[f"{name}.weight"] + scale * delta.reshape(state[f"{name}.weight"].shape)
        if f"{module}.dora_scale" in tensors:
            weight = stretched(weight, tensors[f"{module}.dora_scale"])
        state[f"{name}.weight"].copy_(weight)
    return state


# The inputs: whole adapters of several methods, as they are written.


def mixed(**kinds: str) -> AdapterMethod:
    """Make a method that is another one at each site."""
    return AdapterMethod(
        name="mixed",
        adapter=LoRA,
        scaling=METHODS["lora"].scaling,
        adapts=lambda site: True,
        instead=lambda site: kinds[site.name.replace(".", "_")],
    )


def trained(ranks: Mapping[str, int], **options: Any) -> Net:  # noqa: ANN401
    model = net()
    for one in attach(model, ranks, dtype=torch.float32, **options).values():
        randomise(one)
    return model


def read_pair(folder: Path, config: str, tensors: str) -> Files:
    return Files.of(json.loads((folder / config).read_text()), safetensors.torch.load_file(folder / tensors))


PEFT = ("adapter_config.json", "adapter_model.safetensors")
OWN = ("flowra_config.json", "flowra_model.safetensors")


def peft_lora(folder: Path) -> Files:
    model = trained({"words": 2, "conv": 2, "grouped": 1, "fc": 3}, modules_to_save=["head"], bias="adapted")
    save_adapter(model, folder, modules_to_save=["head"], consumer="peft")
    return read_pair(folder, *PEFT)


def peft_with_biases(folder: Path) -> Files:
    generator = torch.Generator().manual_seed(0)
    shapes = {"fc.lora_A.weight": (2, 6), "fc.lora_B.weight": (5, 2), "fc.lora_B.bias": (5,)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "lora_bias": True, "bias": "none"}
    config |= {"rank_pattern": {"f.": 2}, "alpha_pattern": {"^fc": 3.5}, "target_modules": ["fc"]}
    return Files.of(config, {f"base_model.model.{k}": torch.randn(v, generator=generator) for k, v in shapes.items()})


def peft_dora(folder: Path) -> Files:
    save_adapter(trained({"words": 1, "conv": 2, "fc": 2}, method="dora"), folder)
    return read_pair(folder, *PEFT)


def peft_adalora(folder: Path) -> Files:
    generator = torch.Generator().manual_seed(1)
    shapes = {"fc.lora_A": (1, 6), "fc.lora_B": (5, 1), "fc.lora_E": (1, 1)}
    shapes |= {"head.lora_A": (2, 5), "head.lora_B": (3, 2), "head.lora_E": (2, 1)}
    config = {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 8, "bias": "none", "target_modules": ["fc", "head"]}
    config |= {"rank_pattern": {"fc.lora_E": [True, False], "head.lora_E": [True, True]}}
    return Files.of(config, {f"base_model.model.{k}": torch.randn(v, generator=generator) for k, v in shapes.items()})


def own_tucker_and_svd(folder: Path) -> Files:
    method = mixed(words="dora", conv="flora", fc="svd_masked", fc_bias="bitfit", norm="norm", grouped="svd")
    model = trained({"words": 2, "conv": 2, "fc": 2, "fc.bias": 1, "norm": 1, "grouped": 1}, method=method)
    save_adapter(model, folder)
    return read_pair(folder, *OWN)


def own_starts(folder: Path) -> Files:
    model = trained({"fc": 2, "conv": 0, "grouped": 1}, modules_to_save=["head"])
    fc = adapters(model)["fc"]
    assert isinstance(fc, LoRA)
    fc.start_from(torch.randn(2, 6), torch.randn(5, 2))
    randomise(fc)
    save_adapter(model, folder, modules_to_save=["head"])
    return read_pair(folder, *OWN)


def kohya(folder: Path) -> Files:
    method = mixed(conv="flora", fc="dora", grouped="lora", head="lora")
    save_kohya({"lora_unet": trained({"conv": 2, "fc": 2, "grouped": 1, "head": 1}, method=method)}, folder / KOHYA)
    return Files.of({}, safetensors.torch.load_file(folder / KOHYA))


KOHYA = "all.safetensors"
Oracle = Callable[[Mapping[str, Any], Mapping[str, Tensor]], State]
INPUTS: dict[str, tuple[Callable[[Path], Files], tuple[str, str], Oracle]] = {
    "peft_lora": (peft_lora, PEFT, oracle_of_peft),
    "peft_with_biases": (peft_with_biases, PEFT, oracle_of_peft),
    "peft_dora": (peft_dora, PEFT, oracle_of_peft),
    "peft_adalora": (peft_adalora, PEFT, oracle_of_peft),
    "own_tucker_and_svd": (own_tucker_and_svd, OWN, oracle_of_own),
    "own_starts": (own_starts, OWN, oracle_of_own),
    "kohya": (kohya, ("", KOHYA), oracle_of_kohya),
}


# What must hold for each of them.


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """End the block with an error after so many seconds, even inside a regular expression."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load(model: Net, folder: Path, names: tuple[str, str]) -> dict[str, Adapter]:
    if names[0]:
        return load_adapter(model, folder)
    return load_kohya({"lora_unet": model}, folder / KOHYA)["lora_unet"]


def assert_untouched(model: Net, before: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(isinstance(module, AdapterDict) for module in model.modules())


def assert_loaded_rightly(model: Net, found: Mapping[str, Adapter], files: tuple[bytes, bytes], oracle: Oracle) -> None:
    """Compare W + ΔW, and the output, with the oracle's."""
    config = json.loads(files[0]) if files[0] else {}
    tensors = safetensors.torch.load(files[1])
    for name, one in found.items():
        for key, tensor in one.state_dict().items():
            assert tensor is None or not tensor.is_floating_point() or torch.isfinite(tensor).all(), (name, key)
        if "sites" in config:
            assert one.rank == config["sites"][name]["rank"], name
            own = {key.rpartition("/")[2]: each for key, each in tensors.items() if key.startswith(f"site/{name}/")}
            assert own.keys() == {key for key, each in one.state_dict().items() if each is not None}
            assert all(torch.equal(each, one.state_dict()[key]) for key, each in own.items())
    assert {parameter.requires_grad for one in found.values() for parameter in one.parameters()} <= {True}
    state = oracle(config, tensors)
    with torch.no_grad():
        output = model(IDS)
        expected_output = torch.func.functional_call(BASE, state, IDS)
    values = [float(tensor.double().abs().max()) for tensor in (*tensors.values(), *state.values()) if tensor.numel()]
    if not max([*values, *(abs(one.scaling) for one in found.values())]) < LARGE:
        return  # float32 may have no room for what is made on the way
    merge(model)
    ours = {name: tensor for name, tensor in model.state_dict().items() if ".adapters." not in name}
    widest = max(torch.finfo(each.dtype).eps for each in tensors.values() if each.is_floating_point())
    share = 200 * max(widest, torch.finfo(torch.float32).eps)
    for name, tensor in ours.items():
        size = max(float(state[name].abs().max()), float(BASE.state_dict()[name].abs().max()))
        assert (tensor - state[name]).abs().max() <= share * size, name
    if widest < 1e-6 and all(float(tensor.abs().max()) < 100 for tensor in state.values()):
        assert (output - expected_output).abs().max() < 1e-3 * max(1, float(expected_output.abs().max()))


def assert_one_line(error: ValueError) -> None:
    assert type(error) is ValueError, repr(error)
    assert len(str(error).splitlines()) == 1, repr(error)
    assert len(str(error)) < LONGEST, str(error)[:LONGEST]


def refuse_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was opened")

    for place, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(place, name, explode)


def fuzz(
    name: str, count: int, folder: Path, *, seed: int = 0, first: int = 0, found: Callable[..., None] | None = None
) -> dict[str, int]:
    """Load many damaged copies of one input; count what came of them."""
    make, names, oracle = INPUTS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        files = make(folder)
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_model.bin").write_bytes(b"poison")
    model = net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    outcomes = {"loaded": 0, "refused": 0}
    for index in range(first, first + count):
        rng = random.Random(f"{name}/{seed}/{index}")
        pair = intact(files) if index == 0 else damaged(rng, files)
        for content, file in zip(pair, names, strict=True):
            if file:
                (folder / file).write_bytes(content)
        refusal: ValueError | None = None
        try:
            try:
                with within(SECONDS):
                    loaded = load(model, folder, names)
            except ValueError as error:
                refusal = error
            if refusal is not None:
                outcomes["refused"] += 1
                assert index > 0, refusal
                assert_one_line(refusal)
                assert_untouched(model, before)
                continue
            outcomes["loaded"] += 1
            assert_loaded_rightly(model, loaded, (pair[0] if names[0] else b"", pair[1]), oracle)
            detach(model)
            model.requires_grad_(True).load_state_dict(before)
        except Exception as error:
            error.add_note(f"input {index} of {name!r}, seed {seed}: {pair[0][:1500]!r}, {pair[1][:1500]!r}")
            if found is None:
                raise
            found(name, index, error)
            model = net()
    return outcomes


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("name", INPUTS)
def test_damaged_files_load_rightly_or_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_pickles(monkeypatch)
    outcomes = fuzz(name, 60, tmp_path)
    assert min(outcomes.values()) >= 3  # of both kinds


COUNTS = {
    "peft_lora": 3000,
    "peft_with_biases": 4000,
    "peft_dora": 2000,
    "peft_adalora": 4500,
    "own_tucker_and_svd": 2200,
    "own_starts": 3000,
    "kohya": 2300,
}


@pytest.mark.slow
def test_twenty_thousand_damaged_files_load_rightly_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_pickles(monkeypatch)
    before = peak_megabytes()
    total = 0
    for name, count in COUNTS.items():
        (tmp_path / name).mkdir()
        outcomes = fuzz(name, count, tmp_path / name)
        assert min(outcomes.values()) >= 100
        total += sum(outcomes.values())
    assert total >= 20_000
    assert peak_megabytes() - before < MEGABYTES


@pytest.mark.slow
def test_no_declared_size_takes_memory(tmp_path: Path) -> None:
    """In a process that may have a gigabyte more than it starts with."""
    program = """
        import json, resource, sys
        from pathlib import Path
        import torch
        from test_fuzz import INPUTS, OWN, PEFT, Files, load, net

        folder, limit, refused = Path(sys.argv[1]), 2**30, 0
        for name in INPUTS:
            own = folder / name
            own.mkdir()
            make, names, _ = INPUTS[name]
            files = make(own)
            for path in own.iterdir():
                path.unlink()
            pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (pages + limit, -1))
            headers = []
            for key, entry in files.entries().items():
                start, end = entry["data_offsets"]
                for shape in ([10**9, 8], [10**9, 0], [0, 10**12], [2**40, 2**40]):
                    for offsets in ([start, end], [start, start]):
                        headers.append(files.entries() | {key: {**entry, "shape": shape, "data_offsets": offsets}})
            contents = [(files.text(), files.packed(json.dumps(header))) for header in headers]
            contents += [(files.text(), files.packed(length=size)) for size in (10**8, 2**31, 2**40, 2**64 - 1)]
            for field in ("r", "init_r", "lora_alpha"):
                for value in (10**9, 10**400):
                    config = files.config | {field: value, "rank_pattern": {}}
                    contents.append((json.dumps(config).encode() if field in files.config else b"{", files.packed()))
            for site in files.config.get("sites", {}):
                huge = [{"rank": 10**9}, {"arguments": {"max_rank": 10**9}}]
                for changed in (*huge, {"arguments": {"ranks": {"kernel": 10**9}}}):
                    entries = {**files.config["sites"], site: {**files.config["sites"][site], **changed}}
                    contents.append((json.dumps({**files.config, "sites": entries}).encode(), files.packed()))
            for text, data in contents:
                if names[0]:
                    (own / names[0]).write_bytes(text)
                (own / names[1]).write_bytes(data)
                try:
                    load(net(), own, names)
                except ValueError:
                    refused += 1
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        print(refused)
    """
    roots = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {roots}\n" + textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 300


def test_reading_allocates_no_more_than_the_files_hold(tmp_path: Path) -> None:
    """In Python, where a bomb of nested lists or names would show."""
    files = peft_lora(tmp_path)
    model = net()
    load_adapter(model, tmp_path)
    detach(model)
    for index in range(50):
        pair = damaged(random.Random(f"memory/{index}"), files)
        for content, file in zip(pair, PEFT, strict=True):
            (tmp_path / file).write_bytes(content)
        tracemalloc.start()
        try:
            load_adapter(net(), tmp_path)
        except ValueError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 4 * 2**20 + 100 * (len(pair[0]) + len(pair[1]))


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_pattern_takes_long(bomb: str, tmp_path: Path) -> None:
    files = peft_with_biases(tmp_path)
    name = "c" * 120
    renamed = {key.replace(".fc.", f".layers.0.{name}."): value for key, value in files.tensors.items()}
    config = {**files.config, "rank_pattern": {bomb: 2}, "r": 2, "alpha_pattern": {}}
    (tmp_path / PEFT[0]).write_bytes(replace(files, config=config).text())
    (tmp_path / PEFT[1]).write_bytes(replace(files, tensors=renamed).packed())
    with (
        within(SECONDS),
        pytest.raises(ValueError, match=r"plain patterns|regular expressions|few ways|no layer of it"),
    ):
        load_adapter(net(), tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [
        "fc",
        r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        r".*\.(q_proj|v_proj)",
        r"^model\.layers\.(0|1|2|3|4|5|6|7)\.",
        r"layers\.[0-9]+\.mlp\.(?:up|gate|down)_proj",
        r"(?!model\.layers\.0\.).*down_proj",
        r"[)+*]*x",
    ],
)
def test_patterns_that_people_write_are_read(pattern: str, tmp_path: Path) -> None:
    files = peft_with_biases(tmp_path)
    (tmp_path / PEFT[0]).write_bytes(
        replace(files, config={**files.config, "rank_pattern": {pattern: 2, "fc": 2}}).text()
    )
    (tmp_path / PEFT[1]).write_bytes(files.packed())
    assert_loaded_rightly(model := net(), load_adapter(model, tmp_path), intact_of(tmp_path), oracle_of_peft)


def intact_of(folder: Path) -> tuple[bytes, bytes]:
    return (folder / PEFT[0]).read_bytes(), (folder / PEFT[1]).read_bytes()


# Whole files, whatever they are called.

PARTS = ["weight", "bias", "lora_A", "lora_B", "lora_embedding_A", "base_model", "model", "default", "saved"]
PARTS += ["site", "0", "12", "modules_to_save", "lora_E", "offset", "a", "a.a", "lora_magnitude_vector", "é", "q"]
NAMES = st.lists(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join), min_size=1, max_size=4, unique=True
)


def free(names: list[str]) -> list[str]:
    """Leave out names above others, which would be modules and layers at once."""
    return [name for name in names if not any(other != name and other.startswith(f"{name}.") for other in names)]


@given(names=NAMES, data=st.data(), method=st.sampled_from(["lora", "dora", "svd", "svd_masked", "flora"]))
def test_well_formed_adapters_are_read_as_they_were_written(
    names: list[str], data: st.DataObject, method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names, folder = free(names), tmp_path_factory.mktemp("whole")
    model, copy = nested(*names, size=5), nested(*names, size=5)
    ranks = {name: data.draw(st.integers(0 if method != "lora" else 1, 5)) for name in names}
    if not any(ranks.values()):
        ranks[names[0]] = 1
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    for one in attach(model, ranks, method=method, dtype=dtype).values():
        randomise(one)
    save_adapter(model, folder)
    found = load_adapter(copy, folder)
    written = {name: one for name, one in adapters(model).items() if one.rank > 0 or len(found) == len(names)}
    assert found.keys() == written.keys()
    for name, one in written.items():
        ours, theirs = one.state_dict(), found[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(
            torch.equal(tensor, theirs[key]) and tensor.dtype == theirs[key].dtype for key, tensor in ours.items()
        )
        assert (one.rank, one.scaling) == (found[name].rank, found[name].scaling)


# What the fuzzer does not meet often enough.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site/fc/offset_A": None}, "tensors must be all of .*offset_A.*offset_B.* or none"),
        ({"site/fc/offset_A": torch.ones(1, 6, dtype=torch.float64)}, "must have one dtype"),
        (
            {"saved/head.weight": torch.full((3, 5), 1e300, dtype=torch.float64)},
            "got NaN, infinity, or values beyond it",
        ),
        ({"saved/head.weight": torch.ones(3, 5, dtype=torch.int64)}, "must fit the model"),
        ({"saved/head.weight": torch.ones(3, 5, dtype=torch.complex64)}, "must fit the model"),
    ],
    ids=["half_a_start", "two_dtypes", "beyond_the_dtype", "whole_numbers", "complex"],
)
def test_own_tensors_that_would_mean_something_else_are_refused(
    change: Mapping[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    own_starts(tmp_path)
    tensors = {**safetensors.torch.load_file(tmp_path / OWN[1]), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(kept, tmp_path / OWN[1])
    with pytest.raises(ValueError, match=message):
        load_adapter(net().float(), tmp_path)


@pytest.mark.parametrize(
    ("magnitude", "message"),
    [
        (None, "got none called 'lora_magnitude'"),
        (torch.ones(1), "must have shape"),
        (torch.ones(()), "must have shape"),
    ],
)
def test_a_magnitude_of_another_shape_or_none_is_refused(
    magnitude: Tensor | None, message: str, tmp_path: Path
) -> None:
    own_tucker_and_svd(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / OWN[1])
    del tensors["site/words/lora_magnitude"]
    safetensors.torch.save_file(
        tensors if magnitude is None else {**tensors, "site/words/lora_magnitude": magnitude}, tmp_path / OWN[1]
    )
    with pytest.raises(ValueError, match=message):
        load_adapter(net(), tmp_path)


def test_a_refused_load_keeps_a_bias_that_has_the_name_already(tmp_path: Path) -> None:
    files = peft_with_biases(tmp_path)
    (tmp_path / PEFT[0]).write_bytes(files.text())
    (tmp_path / PEFT[1]).write_bytes(files.packed())
    model = net()
    kept = attach(model, {"fc.bias": 1}, method="bitfit")["fc.bias"]
    with pytest.raises(ValueError, match="adapter must be a new name"):
        load_adapter(model, tmp_path)
    assert adapters(model) == {"fc.bias": kept}


def test_a_file_for_two_models_is_loaded_into_both_or_none(tmp_path: Path) -> None:
    first, second = trained({"fc": 2}), trained({"fc": 2})
    save_kohya({"lora_unet": first, "lora_te": second}, tmp_path / KOHYA)
    untouched = net()
    with pytest.raises(ValueError, match="adapter must be a new name"):
        load_kohya({"lora_unet": untouched, "lora_te": second}, tmp_path / KOHYA)
    assert_untouched(untouched, BASE.state_dict())


def test_names_with_slashes_are_read_from_flowra_s_own_files(tmp_path: Path) -> None:
    model, copy = nested("a", "a/b"), nested("a", "a/b")
    for one in attach(model, {"a": 2, "a/b": 1}, method="svd").values():
        randomise(one)
    save_adapter(model, tmp_path)
    found = load_adapter(copy, tmp_path)
    assert all(torch.equal(one.delta_weight(), found[name].delta_weight()) for name, one in adapters(model).items())
