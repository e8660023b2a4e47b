"""A base model and its adapters behind HTTP (`python -m tuning serve`, docs/serve.md).

    server -> api -> talk -> service -> engine -> runner -> model with mixture, attention
               |                |         |
             guard            voice     sampling, text

`names`, `options`, `memory`, `text` and `schema` are plain values and need no torch.
"""
