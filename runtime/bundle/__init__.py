"""The bundle format: manifest, strict JSON, and opening one."""
