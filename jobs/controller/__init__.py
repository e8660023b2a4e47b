"""The running operator: leader election, watches, workqueue, reconcile, probes, preflight."""
