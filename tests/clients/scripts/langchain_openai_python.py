from typing import Literal

from common import LOOP, MODEL, QUESTION, RESULT, SAID, URL, WEATHER, is_city, is_stream, is_trip, report
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Trip(BaseModel):
    """A trip."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return RESULT


def chat(url: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=60, max_retries=0)


llm, loop = chat(URL), chat(LOOP).bind_tools([weather])
whole = llm.invoke(QUESTION).content
pieces = [chunk.content for chunk in llm.stream(QUESTION)]
trips = [llm.with_structured_output(Trip, method=method).invoke(QUESTION)      # the first is its default
         for method in ("json_schema", "function_calling")]
call = llm.bind_tools([weather], tool_choice="any").invoke(QUESTION).tool_calls[0]
asked = loop.invoke(WEATHER)
result = ToolMessage(weather.invoke(asked.tool_calls[0]["args"]), tool_call_id=asked.tool_calls[0]["id"])
said = loop.invoke([HumanMessage(WEATHER), asked, result]).content
report(chat=bool(whole), stream=is_stream(pieces, whole), structured=all(is_trip(trip.model_dump()) for trip in trips),
       tools=is_city(call["args"]) and said == SAID)
