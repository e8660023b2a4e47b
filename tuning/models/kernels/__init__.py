"""What makes a step fast and leaves its results what they are, to rounding.

Everything here is placement, never recipe: it computes what transformers, peft and trl compute, to
rounding, and each part can be left out. `tuning.plan.backends` chooses, before torch is loaded.

    attention   every document of a packed row by itself, over torch's own variable-length kernel
    linear      LoRA layers and whole MLPs, each one autograd function over `addmm`
    rotary      rotary positions of queries and keys
    shadows     16-bit copies of adapters, made once a step
    fuse        puts them, and liger's kernels where it is installed, into a model with LoRA layers
    parity      compares each with the module it would replace, before it does
    head        the loss and its gradient in one pass over the labelled tokens, logits never kept
"""
