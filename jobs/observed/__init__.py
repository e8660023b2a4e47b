"""Observed state of a Workspace: its objects, phase, conditions and status."""
