"""Observed state of a Workspace: what the cluster says, its phase, conditions and status."""
