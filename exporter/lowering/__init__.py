"""One file a target: each rewrites the traced high-level ops into what that target runs best."""
