"""A base model and its adapters behind HTTP (`python -m tuning serve`, docs/serve.md).

    server -> api -> completions -> service -> engine -> runner -> model with multi_lora, attention
               |                      |          |
           middleware             tokenizer   sampling, detokenizer

`adapter_specs`, `options`, `listening`, `rendering` and `schema` need no torch, nor do
`lora_images` and `vllm_plugin`, by which vLLM, not this server, pulls adapters.
"""
