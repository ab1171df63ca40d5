"""Checkpoint readers: one folder a format, one interface (`exporter.checkpoint.base`)."""
