import asyncio
from typing import Literal

from common import LOOP, MODEL, QUESTION, RESULT, SAID, URL, WEATHER, is_stream, is_trip, report
from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def model(url: str) -> OpenAIChatModel:
    return OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))


async def streamed(agent: Agent) -> list[str]:
    async with agent.run_stream(QUESTION, model_settings=settings) as result:
        return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]


settings = {"temperature": 0, "max_tokens": 60}
agent = Agent(model(URL))
whole = agent.run_sync(QUESTION, model_settings=settings).output
pieces = asyncio.run(streamed(agent))
trip = Agent(model(URL), output_type=Trip, retries=0).run_sync(QUESTION, model_settings=settings).output      # its default mode
loop, asked = Agent(model(LOOP)), []


@loop.tool_plain
def weather(city: str) -> str:
    """The weather of a city."""
    asked.append(city)
    return RESULT


said = loop.run_sync(WEATHER).output
report(chat=bool(whole), stream=is_stream(pieces, whole), structured=is_trip(trip.model_dump()),
       tools=asked == ["Paris"] and said == SAID)
