"""Images: their bytes, the registry protocol, and who may read, write or sign them.

layout/         adapter folder <-> OCI layout, deterministic
registry/       push exactly once, pull verified, attach and find statements
access, policy  how a registry is reached, and which signatures an administrator asks for
delivery        where an adapter is pushed to or pulled from: registry, layout, folder
inspection      describe an image from manifests and its first kilobytes
model_image     full models as images
signature, provenance   cosign signatures by key; run directory -> in-toto statement
"""
