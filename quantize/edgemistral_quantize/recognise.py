"""Recognizes what a user gave, for an error message that names it instead of only what is missing.

`locate` finds the folder or the file to read. `instead_of_weights` describes a folder without readable weights.
`already_quantized` recognizes the quantization method by the names of tensors.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from edgemistral.errors import BadCheckpoint
from edgemistral.files import regular
from edgemistral.files.safetensors import METADATA
from edgemistral.files.sniff import SNIFFED, describe

CONFIGS = ("config.json", "params.json")
ADAPTER_CONFIG = "adapter_config.json"
NUMBERED = re.compile(r"(.*-)(\d{1,6})-of-(\d{1,6})(\..*)")
SPECIAL = re.compile(r"(consolidated|adapter_model|lora).*\.safetensors")   # not weights in Hugging Face layout
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download", ".tmp", ".aria2__temp")
PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt")
OTHERS = {
    ".gguf": "give that file itself", ".onnx": "an ONNX model, which is not read", ".npz": "NumPy arrays, as old MLX"
    " models are, which are not read", ".h5": "a Keras file, which is not read", ".msgpack": "a Flax file, which is not"
    " read", ".mlmodel": "a Core ML file, which is not read", ".tflite": "a TensorFlow Lite file, which is not read",
    ".xml": "an OpenVINO model, which is not read", ".engine": "a TensorRT engine, which is not read",
}
IN_FOLDERS = {".safetensors": "give that folder", ".distcp": "a part that FSDP wrote; accelerate merge-weights joins them"}
QUANTIZED_BY = (   # a pattern of tensor names that only this method has
    (r"\.(weight_packed|weight_zero_point)$", "compressed-tensors"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(absmax|nested_absmax|quant_map|SCB|weight_format)$|\.quant_state\.|\.nested_quant_map$", "bitsandbytes"),
    (r"\.(q_weight|q_scale|q_groups|q_scale_max|q_invperm)$", "EXL2"),
    (r"\.(trellis|suh|svh)$", "EXL3"),
    (r"\.(codes|codebooks)$", "AQLM"),
    (r"\.(Qidxs|SU|SV)$", "QuIP#"),
    (r"\.(W_q|meta)$|\.W_q\.", "HQQ"),
    (r"\.(centroids|res_centroids)(\.|$)", "VPTQ"),
    (r"_blocks$|\.weight\.(_data|_scale)$", "MXFP4 or Quanto"),
    (r"\.(weight_scale|weight_scale_inv|input_scale|scale_weight)$", "FP8 or INT8"),
    (r"\.(scales|biases)$", "MLX"),
)


def locate(source: Path) -> Path:
    """The folder with a checkpoint, or the GGUF file, that `source` means.

    A folder of the Hugging Face cache means its snapshot. BadCheckpoint: it does not exist, or is another kind of file.
    """
    if source.is_symlink() and not source.exists():
        raise BadCheckpoint(f"{source}: a link to a file that is not there; is the download complete?")
    if not source.exists():
        name = not source.is_absolute() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not source.parent.exists()
        hint = "; nothing is downloaded here: give the folder that holds the model" if name else _similar(source)
        raise BadCheckpoint(f"{source}: no such directory or file{hint}")
    if source.is_file():
        return _check_file(source)
    if not source.is_dir():
        raise BadCheckpoint(f"{source}: neither a directory nor a file")
    if (source / "snapshots").is_dir() and not any((source / name).exists() for name in CONFIGS):
        return _snapshot(source)
    if source.name == "snapshots" and (source.parent / "refs").is_dir():
        return _snapshot(source.parent)
    cached = sorted(path.name for path in source.glob("models--*") if path.is_dir())
    if cached:
        if len(cached) == 1:
            return _snapshot(source / cached[0])
        raise BadCheckpoint(f"{source}: a cache of {len(cached)} models; give the folder of one, as {cached[0]}")
    return source


def _similar(missing: Path) -> str:
    """The end of a message: an existing path with a similar name."""
    try:
        names = [path.name for path in missing.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, names, 1, 0.8)
    return f"; {close[0]} is there" if close else ""


def _check_file(path: Path) -> Path:
    """The path if it is a GGUF file; BadCheckpoint for all others."""
    try:
        with regular.reading(path, BadCheckpoint) as file:
            start = file.read(SNIFFED)
            length = int.from_bytes(start[:8], "little")
            header = start + file.read(max(0, min(length, 1 << 16) - SNIFFED)) if start[8:9] == b"{" else b""
    except OSError as problem:
        raise BadCheckpoint(f"{path}: cannot be read: {problem.strerror or problem}") from None
    if start.startswith(b"GGUF"):
        return path
    what = describe(start)
    if what is not None:
        raise BadCheckpoint(f"{path}: {what}")
    if METADATA.encode() in header and b'"edgemistral' in header:
        raise BadCheckpoint(f"{path}: already a model file made by quantize; use `edgemistral run` with it")
    if path.name.startswith("adapter_"):
        raise BadCheckpoint(f"{path}: a file of a LoRA adapter; use quantize BASE DST --lora {path.parent}")
    kind = "the weights without the config and the tokenizer" if header or path.suffix == ".safetensors" else "a file"
    raise BadCheckpoint(f"{path}: {kind}; give the folder it lies in, {path.parent}")


def _snapshot(cache: Path) -> Path:
    """The snapshot of a folder models--ORG--NAME that `main` refers to, or the only one."""
    snapshots = [path for path in visible(cache / "snapshots") if path.is_dir()] if (cache / "snapshots").is_dir() else []
    reference = cache / "refs" / "main"
    if reference.is_file():
        wanted = regular.read(reference, BadCheckpoint).decode("utf-8", "replace").strip()
        for path in snapshots:
            if path.name == wanted:
                return path
    if len(snapshots) == 1:
        return snapshots[0]
    if not snapshots:
        raise BadCheckpoint(f"{cache}: a Hugging Face cache folder without a snapshot{unfinished(cache)}")
    names = ", ".join(path.name[:12] for path in snapshots[:4])
    raise BadCheckpoint(f"{cache}: has {len(snapshots)} snapshots ({names}); give one of the folders in {snapshots[0].parent}")


def visible(folder: Path) -> list[Path]:
    """The sorted entries of a folder, without names that begin with a dot (such as macOS's ._ files)."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as problem:
        raise BadCheckpoint(f"{folder}: cannot be read: {problem.strerror or problem}") from None


def unfinished(folder: Path) -> str:
    """The end of a message: an unfinished download in or next to the folder, if there is one."""
    places = (folder, folder / ".cache" / "huggingface" / "download", folder / "blobs", folder.parent.parent / "blobs")
    for place in places:
        if place.is_dir():
            for path in sorted(place.rglob("*") if "huggingface" in place.parts else place.iterdir()):
                if path.name.endswith(UNFINISHED):
                    return f"; {path.name[-60:]} is a download that was not finished: download again"
    return ""


def instead_of_weights(folder: Path) -> str:
    """The end of a message about a folder without a config or without weights: what it contains instead."""
    names = [path.name for path in visible(folder)]
    configs = [name for name in names if name in CONFIGS]
    if ADAPTER_CONFIG in names or any(name.startswith("adapter_model.") for name in names):
        return f": this is a LoRA adapter{_base_of(folder)}; use quantize BASE DST --lora {folder}"
    if hint := unfinished(folder):
        return hint
    for suffix, what in OTHERS.items():
        found = [name for name in names if name.endswith(suffix)]
        if found:
            return f"; {found[0]} has a format that is not read here: {what}" if suffix != ".gguf" else f"; {found[0]}: {what}"
    pickles = [name for name in names if name.endswith(PICKLES) and not name.startswith(("training_args", "optimizer"))]
    if pickles:
        return f"; {pickles[0]} has a format that is not read (a pickle, which can run code): get the safetensors files"
    if "zero_to_fp32.py" in names:
        return "; DeepSpeed's own parts are there: run its zero_to_fp32.py, which makes safetensors files of them"
    if not configs:
        if renamed := next((name for name in names if re.fullmatch(r"(config|params)( ?\(\d+\))?\.json(\.\w+)?", name)), None):
            return f"; {renamed} is there: rename it"
        inner = [path.name for path in visible(folder) if path.is_dir() and any((path / c).is_file() for c in CONFIGS)]
        if inner:
            return f"; its folder {inner[0]} has one: give that"
        return ""
    weights = next((name for name in names if name.lower().endswith(".safetensors")), None)
    if weights is not None:     # in another layout than the config
        other = next(name for name in CONFIGS if name not in configs)
        return f"; {weights} belongs to the layout with {other}, which is not there" if len(configs) == 1 else ""
    for inner_folder in (path for path in visible(folder) if path.is_dir()):
        for path in visible(inner_folder):
            if path.name.endswith((*OTHERS, *PICKLES, *IN_FOLDERS)):
                what = IN_FOLDERS.get(path.suffix, "a format that is not read; get the safetensors files")
                return f"; its folder {inner_folder.name} has {path.name}: {what}"
    return "; is the download complete?"


def _base_of(folder: Path) -> str:
    """` for NAME`, the base model that adapter_config.json names."""
    try:
        base = json.loads(regular.read(folder / ADAPTER_CONFIG, BadCheckpoint)).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError):   # BadCheckpoint is a ValueError
        return ""
    return f" for {base[:80]!r}" if isinstance(base, str) else ""


def already_quantized(tensors: Iterable[tuple[str, str]]) -> str | None:
    """From (name, dtype) of tensors: `METHOD: tensor NAME` if another program has quantized them."""
    listed = list(tensors)
    for pattern, method in QUANTIZED_BY:
        for name, _ in listed:
            if re.search(pattern, name):
                return f"{method}: tensor {name[:80]}"
    for name, dtype in listed:
        if dtype.startswith("F8"):
            return f"FP8: tensor {name[:80]} has dtype {dtype}"
    return None


def numbered_gap(paths: list[Path]) -> str | None:
    """The first missing name of files ...-00001-of-0000N..., or another error in their numbers."""
    groups: dict[tuple[str, str, str], dict[int, Path]] = {}
    for path in paths:
        if match := NUMBERED.fullmatch(path.name):
            stem, number, total, end = match.groups()
            groups.setdefault((stem, total, end), {})[int(number)] = path
    for (stem, total, end), found in groups.items():
        for number in range(1, int(total) + 1):
            if number not in found:
                return f"{stem}{number:0{len(total)}}-of-{total}{end} is missing"
            if number > len(found):
                break
    if len({(stem, end) for stem, _, end in groups}) < len(groups):
        first, second = (next(iter(found.values())).name for found in list(groups.values())[:2])
        return f"{first} and {second} belong to two different sets of files; leave only one"
    return None
