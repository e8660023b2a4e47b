"""Adapter folder -> OCI image layout, and an image layout -> a folder of its files. No network.

`package` writes: the image is a function of the files and the annotations alone. `manifest` knows
what manifests say, `tar` reads layers, `extract` lays their files down: nothing of a foreign image
is trusted before its digest is checked, nor its names ever.

Formats: OCI image specification 1.1 (layout, manifest, config), POSIX.1-1988 USTAR.
"""

from tuning.oci.layout.extract import LARGEST_TOTAL, unpack
from tuning.oci.layout.layer import peek
from tuning.oci.layout.manifest import (
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    INDEX,
    LARGEST_JSON,
    MANIFEST,
    MODEL_NAME,
    RUN_ID,
    Blob,
    Document,
    Image,
    blob_path,
    blobs_of,
    choose,
    documents,
    entries,
    is_index,
    parse_json,
    parse_manifest,
    read,
    refused,
)
from tuning.oci.layout.package import (
    ADAPTER_FILES,
    MODEL_DOCUMENTS,
    MODEL_FILES,
    Built,
    build,
    build_model,
)
from tuning.oci.layout.platforms import MODELPACK, Base, base_of

__all__ = [
    "ADAPTER_FILES",
    "DOCKER_INDEX",
    "DOCKER_MANIFEST",
    "INDEX",
    "LARGEST_JSON",
    "LARGEST_TOTAL",
    "MANIFEST",
    "MODELPACK",
    "MODEL_DOCUMENTS",
    "MODEL_FILES",
    "MODEL_NAME",
    "RUN_ID",
    "Base",
    "Blob",
    "Built",
    "Document",
    "Image",
    "base_of",
    "blob_path",
    "blobs_of",
    "build",
    "build_model",
    "choose",
    "documents",
    "entries",
    "is_index",
    "parse_json",
    "parse_manifest",
    "peek",
    "read",
    "refused",
    "unpack",
]
