"""Translates the field names and values of other servers to ours, before anything is checked.

The tables: names of other servers, their ways to say "none", and fields that are not supported. A field that limits or shapes
an answer is obeyed or refused, never ignored. Only harmless fields are ignored; the `warnings` header names them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgemistral.errors import BadRequest

# Names of llama.cpp, vLLM, Ollama, Mistral, text-generation-inference: ours.
ALIASES = {
    "repeat_penalty": "repetition_penalty", "repetition_penality": "repetition_penalty", "random_seed": "seed",
    "n_predict": "max_tokens", "num_predict": "max_tokens", "max_new_tokens": "max_tokens", "max_output_tokens": "max_tokens",
    "stop_sequences": "stop", "stop_strings": "stop", "min_new_tokens": "min_tokens", "typ_p": "typical_p",
    "temp": "temperature", "topP": "top_p", "topK": "top_k", "num_return_sequences": "n", "regex": "guided_regex",
    "ebnf": "guided_grammar", "grammar_string": "grammar",
}
# Fields that would change the answer and are not supported, with the neutral values that are accepted.
REFUSED: dict[str, tuple[Any, ...]] = {
    "typical_p": (1, 0), "tfs_z": (1, 0), "mirostat": (0, False), "xtc_probability": (0,), "dry_multiplier": (0,),
    "top_a": (0,), "eta_cutoff": (0,), "epsilon_cutoff": (0,), "dynatemp_range": (0,), "suffix": ("",),
    "smoothing_factor": (0,), "guidance_scale": (1, 0), "negative_prompt": ("",), "bad_words": ([], ()),
    "use_beam_search": (False,), "length_penalty": (1,), "num_beams": (1,), "logits_processors": ([],), "prompt_logprobs": (),
    "include_stop_str_in_output": (False,), "ignore_eos": (False,), "skip_special_tokens": (True,), "image_data": ([],),
    "images": ([],), "audio": (), "lora": ([],), "web_search_options": (), "truncate_prompt_tokens": (),
    "add_special_tokens": (True, False), "chat_template": (), "chat_template_kwargs": ({}, {"enable_thinking": False}),
    "continue_final_message": (False,), "add_generation_prompt": (True,), "allowed_token_ids": ([],), "context_shift": (False,),
    "best_of": (), "n_probs": (0,), "max_length": (), "min_length": (0,), "truncate": (), "repeat_last_n": (64, -1),
    "penalty_last_n": (64, -1), "no_repeat_ngram_size": (0,), "top_n_sigma": (-1, 0), "bad_words_ids": ([],),
    "force_words_ids": ([],), "suppress_tokens": ([],), "sequence_bias": ({},), "banned_tokens": ("", []),
    "stop_regex": ([], ""), "watermark": (False,), "top_n_tokens": (0,), "max_time": (), "mirostat_mode": (0,),
    "encoder_repetition_penalty": (1,), "structural_tag": (), "options": ({},), "extra_body": ({},),
    "return_full_text": (False,),
}
INTEGERS = (
    "max_new_tokens", "max_tokens", "max_completion_tokens", "min_tokens", "n", "top_k",
    "seed", "top_logprobs", "logprobs", "best_of",
)
NO_LIMIT = ("max_new_tokens", "max_tokens", "max_completion_tokens")      # -1 means no limit


def check_texts(body: Any) -> None:
    """Raises BadRequest, whose `field` is a path, for a text with half a surrogate pair, which JSON can smuggle in."""
    waiting: list[tuple[str, Any]] = [("", body)]
    while waiting:      # no recursion: a body may be deep
        path, value = waiting.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise BadRequest(f"{path} has half a surrogate pair at character {error.start}", path) from None
        elif isinstance(value, Mapping):
            waiting += [(f"{path}.{ascii(name)[1:-1]}" if path else ascii(name)[1:-1], one) for name, one in value.items()]
            waiting += [(f"a name in {path or 'the body'}", name) for name in value]
        elif isinstance(value, list):
            waiting += [(f"{path}[{i}]", one) for i, one in enumerate(value) if isinstance(one, str | list | Mapping)]


def normalised(body: Any) -> Any:
    """A request's object under our names. BadRequest: a field is not supported; `field` is its name in the request."""
    if not isinstance(body, Mapping):
        return body
    made: dict[str, Any] = dict(body)
    for theirs, ours in ALIASES.items():
        if theirs in made:
            value = made.pop(theirs)
            if ours in made and made[ours] is not None and made[ours] != value and value is not None:
                raise BadRequest(f"{theirs} and {ours} are both given, and mean the same here", theirs)
            made.setdefault(ours, value)
    for name, neutral in REFUSED.items():
        if name not in made:
            continue
        value = made[name]
        if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            del made[name]
        elif name != "best_of":
            raise BadRequest(f"{name} is {str(value)[:60]!r}: this server does not support it", name)
    if made.pop("do_sample", None) is False:
        made["temperature"] = 0         # transformers' do_sample: false means greedy
    if "modalities" in made and made.pop("modalities") not in (None, ["text"]):
        raise BadRequest("modalities: this server answers in text only", "modalities")
    made = without_none(made)
    best_of = made.pop("best_of", None)
    if best_of is not None and best_of not in (1, made.get("n") or 1):
        raise BadRequest(f"best_of is {str(best_of)[:20]}: it must be 1 or equal to n", "best_of")
    return made


def without_none(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters, with null for -1, "" and the like, and integers for whole floats."""
    made = dict(parameters)
    for name in INTEGERS:
        value = made.get(name)
        if isinstance(value, float) and value.is_integer():
            made[name] = int(value)
    for name in NO_LIMIT:
        if _is_number(made.get(name)) and made[name] < 0:
            made[name] = None
    if _is_number(made.get("top_k")) and made["top_k"] < 0:
        made["top_k"] = 0
    if _is_number(made.get("seed")) and made["seed"] < 0:
        made["seed"] = None             # a new random one each time
    if "stop" in made:
        made["stop"] = _stops(made["stop"])
    return made


def _stops(value: Any) -> Any:
    """Leave out empty strings, and read null as no stop string."""
    if value == "":
        return None
    if isinstance(value, list):
        return [stop for stop in value if stop not in ("", None)]
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))
