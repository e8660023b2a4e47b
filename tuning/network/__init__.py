"""Connections: which hosts may be reached, over which TLS, with which login. No torch.

policy              allowed hosts, proxies and certificates
connect, tls        connections to checked addresses; trusted authorities
session             every HTTP request of our own
retry               which failures are tried again, and when
docker_config       logins from docker configs and credential helpers
workload_identity   logins to registries from a pod's own token
federation          token services of the clouds
sigv4               Amazon's request signature
"""
