"""Desired state -> Kubernetes objects, pure: Job and its volumes, pod, inference server."""
