"""A checkpoint folder in Hugging Face layout or in Mistral layout.

A folder in Hugging Face layout has a config.json and weights in `*.safetensors` (those listed in
`model.safetensors.index.json`, if it exists). A folder in Mistral layout has params.json and
`consolidated*.safetensors`. If both exist, as in Mistral's own repositories, the first complete one is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgemistral.config import ModelConfig
from edgemistral.errors import BadCheckpoint, BadConfig, BadInput
from edgemistral.files import regular, strict_json
from edgemistral.files.safetensors import read_header
from edgemistral.files.sniff import describe_file, refuse_other_files
from edgemistral.text.tokenizer import Tokenizer
from edgemistral_quantize import recognise
from edgemistral_quantize.sources.names import HUGGING_FACE, MISTRAL, Naming, expected_tensors, match, without_prefix
from edgemistral_quantize.sources.opened import Opened
from edgemistral_quantize.sources.tensor import DTYPES, HalvedPairs, StoredTensor, Tensor
from edgemistral_quantize.text_files import SENTENCEPIECE, TextFiles, read_text_files, within_vocabulary

TEXT_FILES = (*SENTENCEPIECE, "tokenizer.json", "tekken.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "generation_config.json", "chat_template.json", "chat_template.jinja")


def open_folder(folder: Path, chat_template: Path | None = None) -> Opened:
    """Check everything about a folder except the values of its weights. chat_template: a file that replaces its own.

    Raises BadConfig for the config, BadCheckpoint for everything else, naming file and tensor. If both layouts exist and
    neither is complete, the error is about Hugging Face's.
    """
    present = [naming for naming in (HUGGING_FACE, MISTRAL) if regular.there(folder / naming.config)]
    if not present:
        neither = "neither config.json (Hugging Face) nor params.json (Mistral) is there"
        raise BadCheckpoint(f"{folder}: {neither}{recognise.instead_of_weights(folder)}")
    problems: list[BadInput] = []
    for naming in present:
        try:
            shards = _find_weights(folder, naming)
            if shards:
                return _open(folder, naming, shards, chat_template)
        except BadInput as problem:
            problems.append(problem)
    if problems:
        raise problems[0]
    raise BadCheckpoint(f"{folder}: no safetensors files with weights{recognise.instead_of_weights(folder)}")


def _open(folder: Path, naming: Naming, shards: list[Path], chat_template: Path | None) -> Opened:
    config_file = folder / naming.config
    refuse_other_files(config_file, BadConfig)
    fields = read_object(config_file, BadConfig)
    for name in TEXT_FILES:
        if regular.there(folder / name):
            refuse_other_files(folder / name, BadCheckpoint)
    text = read_text_files(folder, fields, chat_template)
    config, text, tokenizer = _read_config(folder, naming, fields, text)
    stored = list_tensors(shards)
    quantized = recognise.already_quantized((name, tensor.entry.dtype) for name, tensor in stored.items())
    if quantized:
        raise BadCheckpoint(f"{folder}: its weights are already quantized ({quantized}); get the original model, "
                            "whose weights are BF16, F16 or F32")
    found = without_prefix(stored, naming, folder)
    expected = expected_tensors(config, naming, tied=fields.get(naming.tied) is True)
    spare = naming.names["output"] + ".weight"   # some checkpoints store it although it is tied to the embeddings
    matched = match(expected, found, spare, folder)
    for tensor in matched.values():
        if tensor.entry.dtype not in DTYPES:
            raise BadCheckpoint(f"{tensor} has dtype {tensor.entry.dtype}; supported: {', '.join(DTYPES)}")
    tensors: dict[str, Tensor] = dict(matched)
    if naming.neighbours_rotate:
        for name, tensor in matched.items():
            if name.endswith((".wq", ".wk")):
                tensors[name] = HalvedPairs(tensor, config.head_dim)
    files = [config_file, text.path, *shards, *([] if chat_template is None else [chat_template])]
    return Opened(config, text, tokenizer, files, tensors)


def _read_config(
    folder: Path, naming: Naming, fields: Mapping[str, Any], text: TextFiles
) -> tuple[ModelConfig, TextFiles, Tokenizer]:
    bos_id = text.eos_id if text.bos_id is None else text.bos_id   # not used if there is no bos_id
    try:
        if naming is HUGGING_FACE:
            config = ModelConfig.from_hf({**fields, "bos_token_id": bos_id, "eos_token_id": text.eos_id})
        else:
            config = ModelConfig.from_mistral(fields, bos_id, text.eos_id)
        text = replace(text, spec=within_vocabulary(text, config.vocab_size))
        tokenizer = text.spec.tokenizer(text.data, config.vocab_size, text.path.name, text.eos_id)
    except BadConfig as problem:
        raise BadConfig(f"{folder / naming.config}: {problem}") from None
    except BadCheckpoint:
        raise
    except BadInput as problem:
        raise BadCheckpoint(f"{folder}: {problem}") from None
    return config, text, tokenizer


def list_tensors(shards: list[Path]) -> dict[str, StoredTensor]:
    """All tensors of the given safetensors files, by their names there."""
    found: dict[str, StoredTensor] = {}
    for path in shards:
        try:
            with regular.reading(path, BadCheckpoint) as file:
                header = read_header(file, path, BadCheckpoint)
        except OSError as problem:
            link = ": it links to a file that is not there" if path.is_symlink() else ""
            raise BadCheckpoint(f"{path}: cannot be read: {problem.strerror or problem}{link}") from None
        for name, entry in header.tensors.items():
            if name in found:
                raise BadCheckpoint(f"{path}: tensor {name} is in {found[name].path.name} too; leave only one of the files")
            found[name] = StoredTensor(name, path, entry)
    return found


def _find_weights(folder: Path, naming: Naming) -> list[Path]:
    """The files with the weights in one layout, or an empty list."""
    of_mistral = naming is MISTRAL
    index = folder / ("consolidated.safetensors.index.json" if of_mistral else "model.safetensors.index.json")
    whole = folder / ("consolidated.safetensors" if of_mistral else "model.safetensors")
    if regular.there(index):
        # transformers reads model.safetensors first, even if there is an index.
        return [whole] if whole.is_file() and not describe_file(whole) else sorted(_indexed(index))
    own = [path for path in recognise.visible(folder) if path.name.lower().endswith(".safetensors")]
    if whole in own and any(recognise.NUMBERED.fullmatch(path.name) for path in own):
        own = [path for path in own if not recognise.NUMBERED.fullmatch(path.name)]
    if of_mistral:
        own = [path for path in own if path.name.startswith("consolidated")]
    else:
        own = [path for path in own if not recognise.SPECIAL.fullmatch(path.name)]
    if gap := recognise.numbered_gap(own):
        raise BadCheckpoint(f"{folder}: {gap}{recognise.unfinished(folder) or '; is the download complete?'}")
    return own


def _indexed(index: Path) -> list[Path]:
    refuse_other_files(index, BadCheckpoint)
    weight_map = read_object(index, BadCheckpoint).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadCheckpoint(f"{index}: no weight_map of file names")
    names = set(weight_map.values())
    for name in sorted(names):
        if Path(name).name != name or len(name.encode("utf-8", "replace")) > 255 or not (index.parent / name).is_file():
            hint = recognise.unfinished(index.parent)
            if not hint and not any(len(other) < 64 and (index.parent / other).is_file() for other in names):
                hint = recognise.instead_of_weights(index.parent)   # for example, pickles instead of the listed files
            raise BadCheckpoint(f"{index}: lists {name[:80]!r}, which is not there{hint or '; is the download complete?'}")
    return [index.parent / name for name in names]


def read_bytes(path: Path) -> bytes:
    """The content; BadCheckpoint if it cannot be read."""
    return regular.read(path, BadCheckpoint)


def read_object(path: Path, error: type[BadInput]) -> dict[str, Any]:
    """The JSON object in a file; `error` if it is something else."""
    fields = strict_json.parse(read_bytes(path), str(path), error)
    if not isinstance(fields, dict):
        raise error(f"{path}: not a JSON object")
    return fields
