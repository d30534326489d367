"""Where durable tasks are kept: records of tasks on disk, committed in groups, read once at the start.

Knows records, files and commits; does not know what a record means. `store.py` is the interface, with a twin in memory
that can lose what was not committed.
"""
