"""The CPU that the runtime finds: its features and its memory."""
