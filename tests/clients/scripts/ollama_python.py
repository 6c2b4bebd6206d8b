import json

import ollama
from common import LOOP, MODEL, RESULT, SAID, TOOL, TRIP, URL, USER, WEATHER, is_stream, is_trip, report

client, loop = ollama.Client(host=URL), ollama.Client(host=LOOP)
options = {"model": MODEL, "messages": USER, "options": {"temperature": 0, "num_predict": 60}}
whole = client.chat(**options).message.content
pieces = [part.message.content for part in client.chat(**options, stream=True) if part.message.content]
trip = json.loads(client.chat(**options, format=TRIP).message.content)
messages = [{"role": "user", "content": WEATHER}]
asked = loop.chat(model=MODEL, messages=messages, tools=[TOOL]).message      # it has no way to force a call
messages += [asked, {"role": "tool", "tool_name": "weather", "content": RESULT}]
said = loop.chat(model=MODEL, messages=messages, tools=[TOOL]).message.content
report(chat=bool(whole), stream=is_stream(pieces, whole), structured=is_trip(trip),
       tools=asked.tool_calls[0].function.arguments["city"] == "Paris" and said == SAID)
