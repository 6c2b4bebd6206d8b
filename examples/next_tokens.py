"""The five most likely next tokens after a text, with their probabilities."""

import sys

import numpy as np

import edgemistral

path = sys.argv[1] if len(sys.argv) > 1 else edgemistral.demo_model()
text = "The capital of France is"
with edgemistral.load(path, context=256) as model:
    ids = [model.config.bos_id, *model.tokenizer.encode(text)]
    logits = model.logits(ids)[-1].astype(np.float64)     # (vocab_size,) after the last token
    p = np.exp(logits - logits.max())
    p /= p.sum()
    for token in np.argsort(-p)[:5].tolist():
        print(f"{p[token]:6.1%}  {text}{model.tokenizer.decode([*ids, token]).removeprefix(text)}")
