"""Trackers that show a run: MLflow, W&B, TensorBoard, Trackio. No torch.

A run has one child process a tracker (`feed`), which follows metrics.jsonl and sends what is new:
whatever happens to a tracker, its client or its server happens to that child alone. The run is
named by the Workspace and the run id, so that a resumed run goes on in the same curve, and what a
tracker has is asked of it, or of the run directory, so that no step is shown twice.

place        where a tracker is, with which login, and what is refused before the run
feed         the child: metrics.jsonl -> points -> a tracker
mlflow       MLflow's REST interface
tensorboard  event files
clients      W&B and Trackio, by their own packages
"""
