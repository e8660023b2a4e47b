"""One training rank, from packed rows to an adapter. Needs torch.

train           the child process of the phase: load, fit, evaluate, write the adapter
trainer         trl's SFTTrainer with exact resume, stop between micro-batches, finite checks
checkpoint      atomic, verified training state without pickle
batches         what goes into an optimizer step, over all ranks
distributed     the ranks that share a step
evaluation      evaluation split: the best weights so far, samples of the answers
simulate/       memory coefficients of a model class, measured on the meta device
"""
