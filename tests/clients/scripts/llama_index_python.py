from typing import Literal

from common import LOOP, MODEL, QUESTION, RESULT, SAID, URL, WEATHER, is_city, is_stream, is_trip, report
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class Trip(BaseModel):
    """A trip."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return RESULT


def model(url: str) -> OpenAILike:
    return OpenAILike(model=MODEL, api_base=f"{url}/v1", api_key="none", is_chat_model=True, is_function_calling_model=True,
                      temperature=0, max_tokens=60, context_window=1024, max_retries=0)


llm, loop, user = model(URL), model(LOOP), [ChatMessage(role="user", content=QUESTION)]
whole = llm.chat(user).message.content
pieces = [piece.delta or "" for piece in llm.stream_chat(user)]
trip = llm.as_structured_llm(Trip).chat(user).raw
tool = FunctionTool.from_defaults(weather)
call = llm.get_tool_calls_from_response(llm.chat_with_tools([tool], user_msg=QUESTION, tool_required=True))[0]
history = [ChatMessage(role="user", content=WEATHER)]
asked = loop.chat_with_tools([tool], chat_history=history)
wanted = loop.get_tool_calls_from_response(asked)[0]
history += [asked.message, ChatMessage(role="tool", content=weather(**wanted.tool_kwargs),
                                       additional_kwargs={"tool_call_id": wanted.tool_id})]
said = loop.chat_with_tools([tool], chat_history=history).message.content
report(chat=bool(whole), stream=is_stream(pieces, whole), structured=is_trip(trip.model_dump()),
       tools=is_city(call.tool_kwargs) and said == SAID)
