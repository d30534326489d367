"""Broker, workers and clients in one process under one seed: time, network, disk and faults are simulated, the rest is real."""
