"""Simon Willison's `llm`, by its command line, with a configuration of its own."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from common import LOOP, MODEL, QUESTION, SAID, TRIP, URL, WEATHER, is_trip, report

CONFIG = """
- model_id: {name}
  model_name: {model}
  api_base: {url}/v1
  supports_tools: true
  supports_schema: true
"""
TOOLS = '''
def weather(city: str) -> str:
    "The weather of a city"
    return "21 degrees"
'''
with tempfile.TemporaryDirectory() as folder:
    config = "".join(CONFIG.format(name=name, model=MODEL, url=url) for name, url in (("demo", URL), ("loop", LOOP)))
    pathlib.Path(folder, "extra-openai-models.yaml").write_text(config, "utf-8")

    def llm(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-m", "llm", *arguments], capture_output=True, text=True, check=False,
                              env={**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    options = ("-m", "demo", "-o", "temperature", "0", "-o", "max_tokens", "60")
    whole = llm(QUESTION, *options, "--no-stream")
    streamed = llm(QUESTION, *options)
    trip = json.loads(llm(QUESTION, *options, "--schema", json.dumps(TRIP)))
    said = llm(WEATHER, "-m", "loop", "--functions", TOOLS)      # it has no way to force a call
report(chat=bool(whole), stream=streamed == whole, structured=is_trip(trip), tools=said.endswith(SAID))
