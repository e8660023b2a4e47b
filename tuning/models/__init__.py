"""Base models with LoRA layers: loaded, made fast, asked, merged. Needs torch.

load        base folder -> tokenizer + model (4-bit or 16-bit) + LoRA layers, counted
packed      4-bit weights, packed once and cached
generate    base and adapter answer a question side by side
merge       base + adapter -> full model
gguf_files/ adapter or full model -> GGUF and Modelfile; needs the extra gguf
kernels/    attention by document, fused LoRA layers, norms and loss
"""
