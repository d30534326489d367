"""The worker: one process per device that runs kernels on the batches that a broker leases to it."""
