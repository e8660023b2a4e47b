"""Adapters and models as GGUF, the files that llama.cpp and Ollama load. Needs the extra `gguf`.

families    which models are converted, and what their tensors and settings become
vocabulary  a tokenizer -> the keys from which llama.cpp makes the same tokens
modelfile   Ollama's Modelfile: its template and stops from the chat template
export      one folder with all of it
"""
