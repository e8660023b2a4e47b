"""The API server: client and kinds, CRD and CEL rules, the operator's options."""
