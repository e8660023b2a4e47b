"""The cluster side: a Workspace on Kubernetes becomes a Job that runs `python -m tuning run`.

Never imports torch. Of `tuning` it imports spec, presets, plan, network, errors and files only.
"""
