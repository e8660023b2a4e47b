"""URLs, folders, images and model hubs -> verified local files. No torch.

fetch           the data of a Workspace, from wherever it is
local           data files on this machine, and those of images
download, part  one URL -> one file, resumed and checked against its hash
http            requests, redirects and answers of a data host
stores/         s3://, gs:// and az:// -> signed https
base            base weights: resolve, pin, download
hub             calls to the model hub; hub_download: one file of it
hub_dataset     a dataset of the hub -> commit and files; dataset_files: which, by its own rules
verify          is a folder a base model that can be trained? hashes, remembered
"""
