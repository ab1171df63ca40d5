"""One backend file for each engine kind, behind `runtime.engine.Engine`."""
