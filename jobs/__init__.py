"""The cluster side: a Workspace on Kubernetes becomes a Job that runs `python -m tuning run`.

Never imports torch. Of `tuning` it knows the spec, the presets, the plan, results and errors.
"""
