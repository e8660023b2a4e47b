"""Adapter folder -> OCI image layout, and an image layout -> a folder of its files. No network.

`package` writes: the image is a function of the files and the annotations alone. `manifest` knows
what manifests say, `tar` reads layers, `extract` lays their files down: nothing of a foreign image
is trusted before its digest is checked, nor its names ever.

Formats: OCI image specification 1.1 (layout, manifest, config), POSIX.1-1988 USTAR.
"""

from tuning.image.extract import unpack
from tuning.image.manifest import (
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    INDEX,
    LARGEST_JSON,
    MANIFEST,
    MODEL_NAME,
    RUN_ID,
    Blob,
    Image,
    blob_path,
    choose,
    is_index,
    parse_json,
    parse_manifest,
    read,
    refused,
)
from tuning.image.package import ADAPTER_FILES, Built, build

__all__ = [
    "ADAPTER_FILES",
    "DOCKER_INDEX",
    "DOCKER_MANIFEST",
    "INDEX",
    "LARGEST_JSON",
    "MANIFEST",
    "MODEL_NAME",
    "RUN_ID",
    "Blob",
    "Built",
    "Image",
    "blob_path",
    "build",
    "choose",
    "is_index",
    "parse_json",
    "parse_manifest",
    "read",
    "refused",
    "unpack",
]
