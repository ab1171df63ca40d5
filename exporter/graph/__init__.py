"""The traced graph: the project's ops, the decoder written in them, its trace and its file."""
