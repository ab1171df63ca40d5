#!/bin/sh
# Makes what a user installs, into a folder (default: dist): the sdist and the wheel, the C library for both processors, the
# plugins' library for both processors, and checksums. Needs g++, and g++-aarch64-linux-gnu for the second plugins' library.
# PLUGIN_SMS: architectures of the kernels, such as "8.7 8.9" (default: all; the whole takes minutes).
. "$(dirname "$0")/setup.sh"
out=${1:-dist}
install dev,release
python=.venv/bin/python
version=$($python -c 'from qwen_aot.version import __version__; print(__version__)')
rm -rf "$out.part"
mkdir -p "$out.part"

.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$out.part" .
$python - "$out.part" <<'PY'
import sys
from setuptools import build_meta

build_meta.build_sdist(sys.argv[1])
PY

for processor in x86_64 aarch64; do
    name=libqwen_aot-$version-linux-$processor
    $python -m qwen_aot capi --prefix "$out.part/$name" --portable --processor $processor
    cp LICENSE docs/capi.md "$out.part/$name"
    tar -C "$out.part" --sort=name --owner=0 --group=0 --numeric-owner -czf "$out.part/$name.tar.gz" "$name"
    rm -r "$out.part/$name"
done

sms=""
for sm in ${PLUGIN_SMS:-}; do sms="$sms --sm $sm"; done
for processor in x86_64 aarch64; do
    [ "$(uname -m)" = $processor ] && compiler=g++ || compiler=$processor-linux-gnu-g++
    name=libqwen_aot_plugins-$version-linux-$processor
    # shellcheck disable=SC2086 # options, one or none for each architecture
    CXX=$compiler $python -m qwen_aot.plugins.library -o "build/release/$processor" $sms
    mkdir "$out.part/$name"
    cp LICENSE "build/release/$processor/libqwen_aot_plugins.so" "$out.part/$name"
    tar -C "$out.part" --sort=name --owner=0 --group=0 --numeric-owner -czf "$out.part/$name.tar.gz" "$name"
    rm -r "$out.part/$name"
done

(cd "$out.part" && sha256sum -- * >SHA256SUMS)
rm -rf "$out"
mv "$out.part" "$out"
ls -l "$out"
