import json
from typing import Literal

import openai
from common import LOOP, MODEL, PARAMETERS, RESULT, SAID, TOOL, URL, USER, WEATHER, is_city, is_stream, is_trip, report
from pydantic import BaseModel, Field


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
options = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 60}
whole = client.chat.completions.create(**options).choices[0].message.content
pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
trip = client.chat.completions.parse(**options, response_format=Trip).choices[0].message.parsed
calls = client.chat.completions.create(**options, tools=[TOOL], tool_choice="required").choices[0].message.tool_calls

loop = openai.OpenAI(base_url=f"{LOOP}/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": WEATHER}]
asked = loop.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL]).choices[0].message
messages += [asked, {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": RESULT}]
said = loop.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL]).choices[0].message.content

options = {"model": MODEL, "input": USER, "temperature": 0, "max_output_tokens": 60}
newer = client.responses.create(**options)
stream = client.responses.create(**options, stream=True)
events = [event.delta for event in stream if event.type == "response.output_text.delta"]
parsed = client.responses.parse(**options, text_format=Trip).output_parsed
called = client.responses.create(**options, tool_choice="required", tools=[
    {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}]).output[0]
report(
    chat=bool(whole) and newer.output_text == whole, stream=is_stream(pieces, whole) and is_stream(events, whole),
    structured=is_trip(trip.model_dump()) and is_trip(parsed.model_dump()),
    tools=is_city(json.loads(calls[0].function.arguments)) and is_city(json.loads(called.arguments)) and said == SAID,
)
