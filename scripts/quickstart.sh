#!/bin/sh
# Installs qwen-aot, builds a bundle from a real model and lets it talk. Can be run again.
. "$(dirname "$0")/setup.sh"
install build,cpu
fetch_model
# int8, not the default int4: four bits cost a model of 135M parameters some of what it knows.
.venv/bin/build-engine "$MODEL" --output bundles/smollm2 --precision int8
.venv/bin/qwen-aot generate bundles/smollm2 --chat --prompt "What is the capital of France? Answer briefly."
cat >&2 <<EOF

To go on in this shell, from any folder:

  export PATH="$PWD/.venv/bin:\$PATH"
  qwen-aot chat "$PWD/bundles/smollm2"
EOF
