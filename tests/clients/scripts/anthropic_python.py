import anthropic
from common import LOOP, MODEL, PARAMETERS, RESULT, SAID, TRIP, URL, USER, WEATHER, is_city, is_stream, is_trip, report

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
options = {"model": MODEL, "max_tokens": 60, "messages": USER, "extra_body": {"temperature": 0}}
tools = [{"name": "weather", "description": "The weather of a city", "input_schema": PARAMETERS}]
whole = client.messages.create(**options).content[0].text
with client.messages.stream(**options) as stream:
    pieces = list(stream.text_stream)
trip = client.messages.create(**options, tool_choice={"type": "tool", "name": "trip"},
                              tools=[{"name": "trip", "input_schema": TRIP}]).content[0].input
call = client.messages.create(**options, tools=tools, tool_choice={"type": "any"}).content[0]

loop = anthropic.Anthropic(base_url=LOOP, api_key="none", max_retries=0)
messages = [{"role": "user", "content": WEATHER}]
asked = loop.messages.create(model=MODEL, max_tokens=60, messages=messages, tools=tools)
messages += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [
    {"type": "tool_result", "tool_use_id": asked.content[-1].id, "content": RESULT}]}]
said = loop.messages.create(model=MODEL, max_tokens=60, messages=messages, tools=tools).content[0].text
report(chat=bool(whole), stream=is_stream(pieces, whole), structured=is_trip(trip), tools=is_city(call.input) and said == SAID)
