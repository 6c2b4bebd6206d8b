"""One multiple-choice task of lm-evaluation-harness: it asks /v1/completions for the log probabilities of a prompt (echo)."""

import json
import pathlib
import shutil
import tempfile

from common import MODEL, URL, report
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

TOKENIZER = pathlib.Path(__file__).parents[3] / "models" / "demo" / "tokenizer.model"
QUESTIONS = [     # what the demo model has read of cities, and what nobody has
    {"question": "Paris is the capital of", "choices": ["France", "xqzv jjkw"], "answer": 0},
    {"question": "Rome is the capital of", "choices": ["zzqx wvvk", "Italy"], "answer": 1},
    {"question": "What should I see in", "choices": ["Paris", "qqqq zzzz", "#### ]]]]"], "answer": 0},
]
TASK = """
task: places
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


with tempfile.TemporaryDirectory() as folder:
    data = pathlib.Path(folder, "data.jsonl")
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), "utf-8")
    pathlib.Path(folder, "places.yaml").write_text(TASK.format(data=data), "utf-8")
    shutil.copy(TOKENIZER, folder)
    pathlib.Path(folder, "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}))
    pathlib.Path(folder, "config.json").write_text('{"model_type": "llama"}')
    model = LocalCompletionsAPI(base_url=f"{URL}/v1/completions", model=MODEL, tokenizer_backend="huggingface",
                                tokenizer=folder, add_bos_token=True, max_length=1000, max_retries=1)
    found = simple_evaluate(model, tasks=["places"], task_manager=TaskManager(include_path=folder, include_defaults=False),
                            bootstrap_iters=0)
report(chat=False, stream=False, structured=False, tools=False, accuracy=found["results"]["places"]["acc,none"] == 1.0)
