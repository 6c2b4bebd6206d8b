import json
from typing import Literal

from common import LOOP, MODEL, RESULT, SAID, TOOL, URL, USER, WEATHER, is_city, is_stream, is_trip, report
from mistralai.client import Mistral
from pydantic import BaseModel, Field


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


client, loop = Mistral(api_key="none", server_url=URL), Mistral(api_key="none", server_url=LOOP)
options = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 60, "random_seed": 1}
assert [card.id for card in client.models.list().data] == [MODEL]
whole = client.chat.complete(**options).choices[0].message.content
with client.chat.stream(**options) as stream:
    pieces = [event.data.choices[0].delta.content or "" for event in stream]
trip = client.chat.parse(response_format=Trip, **options).choices[0].message.parsed
call = client.chat.complete(**options, tools=[TOOL], tool_choice="any").choices[0].message.tool_calls[0]
messages = [{"role": "user", "content": WEATHER}]
asked = loop.chat.complete(model=MODEL, messages=messages, tools=[TOOL]).choices[0].message
messages += [asked, {"role": "tool", "name": "weather", "tool_call_id": asked.tool_calls[0].id, "content": RESULT}]
said = loop.chat.complete(model=MODEL, messages=messages, tools=[TOOL]).choices[0].message.content
report(chat=bool(whole), stream=is_stream(pieces, whole), structured=is_trip(trip.model_dump()),
       tools=is_city(json.loads(call.function.arguments)) and said == SAID)
