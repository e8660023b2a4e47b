"""Prints what a tracker's own reader finds: [[step, loss], ...] for each tag, as JSON."""

import json
import os
import sys
from pathlib import Path


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(folder)
    read.Reload()
    return {
        tag: [[event.step, event.value] for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def mlflow(address):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(address)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    curves = {
        name: [[each.step, each.value] for each in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    return {"status": run.info.status, "params": run.data.params, "tags": run.data.tags, **curves}


def trackio(folder):
    os.environ["TRACKIO_DIR"] = folder
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("tuning")
    found = {}
    for each in SQLiteStorage.get_logs("tuning", name):
        for tag, value in each.items():
            if "/" in tag:
                found.setdefault(tag, []).append([each["step"], value])
    return found


def records(data):
    """The records of a LevelDB log, which a W&B file is after seven bytes of its own."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if 32768 - at % 32768 < 7 or not kind:  # the rest of a block
            at += 32768 - at % 32768
            continue
        whole = (b"" if kind in (1, 2) else whole) + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4) and at <= len(data):
            yield whole


def wandb(folder):
    from wandb.proto import wandb_internal_pb2

    found = {}
    last = max(Path(folder).rglob("*.wandb"), key=lambda path: path.stat().st_mtime)
    for data in records(last.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for tag, value in row.items():
            if not tag.startswith("_") and tag != "train/global_step":
                found.setdefault(tag, []).append([row["train/global_step"], value])
    return found


READERS = {"tensorboard": tensorboard, "mlflow": mlflow, "trackio": trackio, "wandb": wandb}
print(json.dumps(READERS[sys.argv[1]](sys.argv[2])))
