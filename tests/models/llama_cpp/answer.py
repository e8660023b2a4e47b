"""Asked in the environment of llama-cpp-python: python answer.py REQUEST.json -> JSON on stdout.

A request names the GGUF `model`, a `lora` or null, `texts` to tokenise, and `prompts`, lists of
tokens that are continued greedily by `count` tokens.
"""

import json
import sys
from pathlib import Path

from llama_cpp import Llama

request = json.loads(Path(sys.argv[1]).read_text())
model = Llama(
    model_path=request["model"],
    lora_path=request["lora"],
    n_ctx=512,
    n_threads=1,
    logits_all=True,
    verbose=False,
)
tokens = [model.tokenize(t.encode(), add_bos=False, special=True) for t in request["texts"]]
continued, logits = [], []
for prompt in request["prompts"]:
    model.reset()
    model.eval(prompt)
    logits.append(model.scores[len(prompt) - 1].tolist())
    answer = []
    while len(answer) < request["count"]:
        answer.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(answer[-1:])
    continued.append(answer)
print(json.dumps({"tokens": tokens, "continued": continued, "logits": logits}))
