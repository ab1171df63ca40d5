"""The command line: the group in `main`, one verb a file; heavy imports stay inside the verbs."""
