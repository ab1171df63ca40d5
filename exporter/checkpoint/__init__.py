"""Checkpoint readers: one file a format, one interface (`exporter.checkpoint.base`)."""
