"""Adapter folder -> OCI image layout, and an image layout -> a folder of its files. No network.

package     files -> an image: a function of the files and the annotations alone
platforms   one image, or an index for several platforms and CNCF ModelPack
write       deterministic tar layers and JSON blobs
manifest    manifests, indexes and descriptors, parsed strictly
tar, layer  untrusted layers, read as a stream
extract     an untrusted image's files -> a folder

Formats: OCI image specification 1.1 (layout, manifest, config), POSIX.1-1988 USTAR.
"""
