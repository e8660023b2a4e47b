"""Desired state of a Workspace, pure: tuning Job and inference server, and the names of objects."""
