"""Fine-tuning jobs from one YAML: which model, which data, where to push."""

__version__ = "0.1.0"
