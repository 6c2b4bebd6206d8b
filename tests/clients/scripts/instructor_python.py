from typing import Literal

import instructor
import openai
from common import MODEL, URL, USER, is_trip, report
from pydantic import BaseModel, Field


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


client = instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0))      # its default mode
options = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 60, "max_retries": 0}
trip, completion = client.chat.completions.create_with_completion(response_model=Trip, **options)
text = client.chat.completions.create(response_model=None, **options).choices[0].message.content
*_, last = client.chat.completions.create_partial(response_model=Trip, **options)
report(chat=bool(text), stream=is_trip(last.model_dump()), structured=is_trip(trip.model_dump()),
       tools=completion.choices[0].message.tool_calls[0].function.name == "Trip")
