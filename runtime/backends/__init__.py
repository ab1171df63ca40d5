"""One folder for each engine kind, behind `runtime.engine.protocol.Engine`."""
