"""The API server and what it is told: client, CRD and CEL rules, operator options."""
