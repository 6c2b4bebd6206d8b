import json
import os
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"      # it would ask the network for prices

import litellm
from common import LOOP, MODEL, RESULT, SAID, TOOL, URL, USER, WEATHER, is_city, is_stream, is_trip, report
from pydantic import BaseModel, Field

litellm.enable_json_schema_validation = True


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def ask(url=URL, messages=USER, **options):
    return litellm.completion(model=f"openai/{MODEL}", api_base=f"{url}/v1", api_key="none", messages=messages, temperature=0,
                              max_tokens=60, max_retries=0, **options)


whole = ask().choices[0].message.content
pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True)]
trip = json.loads(ask(response_format=Trip).choices[0].message.content)
call = ask(tools=[TOOL], tool_choice="required").choices[0].message.tool_calls[0]
messages = [{"role": "user", "content": WEATHER}]
asked = ask(LOOP, messages, tools=[TOOL]).choices[0].message
messages += [asked, {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": RESULT}]
said = ask(LOOP, messages, tools=[TOOL]).choices[0].message.content
try:
    ask(messages=[{"role": "user", "content": "Paris " * 3000}])
    error = None
except litellm.ContextWindowExceededError as problem:      # programs shorten the conversation when they see this class
    error = problem
report(chat=bool(whole), stream=is_stream(pieces, whole), structured=is_trip(trip),
       tools=is_city(json.loads(call.function.arguments)) and said == SAID, context_error=error is not None)
