"""Connections: which hosts may be reached, over which TLS, with which login. No torch.

policy              allowed hosts, proxies and certificates
session             HTTP to registries, hubs and token services
docker_config       logins from docker configs and credential helpers
workload_identity   logins from a pod's own token
federation          a cloud's token service
sigv4               Amazon's request signature
"""
