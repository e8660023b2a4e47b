"""Workspace and ConfigMap documents -> typed spec."""

from tuning.spec.values import Destination, Method, Overrides, Settings, Source, Spec

__all__ = ["Destination", "Method", "Overrides", "Settings", "Source", "Spec"]
