"""openai, litellm and langchain-openai as their guides have it: `python python.py URL`."""

import sys

import litellm
import openai
from langchain_openai import ChatOpenAI, OpenAI

url, messages = f"{sys.argv[1]}/v1", [{"role": "user", "content": "hello"}]
greedy = {"temperature": 0, "max_tokens": 5}

client = openai.OpenAI(base_url=url, api_key="none")
answer = client.chat.completions.create(model="tiny", messages=messages, n=2, **greedy)
assert answer.usage.prompt_tokens < answer.usage.completion_tokens == 10
expected = answer.choices[0].message.content
options = {"include_usage": True}
chunks = [
    *client.chat.completions.create(
        model="tiny", messages=messages, stream=True, stream_options=options, **greedy
    )
]
assert expected == "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert 5 == chunks[-1].usage.completion_tokens
text = client.completions.create(
    model="tiny", prompt="hello", echo=True, logprobs=1, max_tokens=0
).choices[0]
assert text.logprobs.token_logprobs[0] is None
print("openai", openai.__version__)

known = {"api_base": url, "api_key": "none"}
answer = litellm.completion(model="openai/tiny", messages=messages, **known, **greedy)
assert expected == answer.choices[0].message.content
stream = litellm.completion(model="openai/tiny", messages=messages, stream=True, **known, **greedy)
assert expected == "".join(chunk.choices[0].delta.content or "" for chunk in stream)
several = litellm.text_completion(
    model="text-completion-openai/tiny", prompt=["hello", "cat"], **known, **greedy
)
assert 2 == len(several.choices)
print("litellm")

chat = ChatOpenAI(model="tiny", base_url=url, api_key="none", **greedy)
assert expected == chat.invoke("hello").content
assert expected == "".join(chunk.content for chunk in chat.stream("hello"))
assert 5 == chat.invoke("hello").usage_metadata["output_tokens"]
plain = OpenAI(model="tiny", base_url=url, api_key="none", **greedy)
assert 2 == len(plain.generate(["hello", "cat"]).generations)
print("langchain-openai")
