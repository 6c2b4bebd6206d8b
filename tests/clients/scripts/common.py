"""What the scripts of the clients share. They run in an environment of their own, where the project is not installed.

They are called as SCRIPT URL LOOP MODEL. URL: a server with the demo model. LOOP: a server whose model calls `weather` when it
is asked for the weather, and says what came back. The last line of the output is what the client can do.
"""

from __future__ import annotations

import json
import sys

URL, LOOP, MODEL = sys.argv[1:4]
QUESTION = "What should I see in Paris?"
USER = [{"role": "user", "content": QUESTION}]
WEATHER = "What is the weather in Paris?"
RESULT = "21 degrees"
SAID = "It is 21 degrees."
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather of a city", "parameters": PARAMETERS}}
TRIP = {     # nothing in it is without bounds, so that any model ends it soon
    "type": "object", "required": ["city", "days"], "additionalProperties": False,
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
}


def is_trip(value: object) -> bool:
    return isinstance(value, dict) and set(value) == {"city", "days"} and value["city"] in ("Paris", "Rome") and (
        1 <= value["days"] <= 9)


def is_city(value: object) -> bool:
    return isinstance(value, dict) and value.get("city") in ("Paris", "Rome")


def is_stream(pieces: list[str], whole: str) -> bool:
    """Several pieces, which together are the answer."""
    return len(pieces) > 2 and "".join(pieces) == whole != ""


def report(**can: bool) -> None:
    print(json.dumps(can))
