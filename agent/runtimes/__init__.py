"""OCI runtimes behind a narrow interface."""
