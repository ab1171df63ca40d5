#!/bin/sh
# Installs qwen-aot, builds a bundle from a real model and lets it talk. Can be run again.
. "$(dirname "$0")/setup.sh"
install build,cpu
fetch_model
.venv/bin/build-engine "$MODEL" --output bundles/smollm2
.venv/bin/qwen-aot generate bundles/smollm2 --chat --prompt "What is the capital of France? Answer briefly."
