"""URLs, folders, images and model hubs -> verified local files. No torch.

fetch       the data of a Workspace, from wherever it is
download    one file, resumed and checked against its hash
http        requests, redirects and answers of a data host
stores/     s3://, gs:// and az:// -> signed https
base        base weights: resolve, pin, download
hub         calls to the model hub
verify      base weights against the hub's hashes
"""
