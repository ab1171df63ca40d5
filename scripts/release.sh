#!/bin/sh
# Makes what a user installs, into a folder (default: dist): the sdist, the wheel of any platform, for both processors one with
# own CPU kernels, the C library and the plugins' library, and checksums. Needs g++, and g++-aarch64-linux-gnu for the second
# plugins' library.
# A folder that an earlier run made is replaced when all is made. Variables:
#   PLUGIN_SMS      architectures of the kernels, such as "8.7 8.9" (default: all; the whole takes minutes)
#   RELEASE_PARTS   of "python capi plugins" (default: all three)
#   RELEASE_PYTHON  a Python that has the extra `release` and finds this checkout's package (default: .venv's, installed here)
. "$(dirname "$0")/setup.sh"

make_python() {
    for hook in build_sdist build_wheel; do
        $python -c "import sys; from setuptools import build_meta; build_meta.$hook(sys.argv[1])" "$out.part" >"$out.log" 2>&1 || {
            cat "$out.log" >&2
            exit 1
        }
        rm "$out.log"
    done
    for processor in x86_64 aarch64; do
        library=build/release/$processor/libqwen_aot_cpu.so
        $python -m qwen_aot.plugins.cpu.build --portable $processor -o "$library"
        $python -m qwen_aot.plugins.cpu.wheel "$out.part/qwen_aot-$version-py3-none-any.whl" "$library" -o "$out.part"
    done
}

# pack NAME: the folder of that name as a tar.gz, the same for the same files
pack() {
    tar -C "$out.part" --sort=name --owner=0 --group=0 --numeric-owner -czf "$out.part/$1.tar.gz" "$1"
    rm -r "${out:?}.part/$1"
}

make_capi() {
    for processor in x86_64 aarch64; do
        name=libqwen_aot-$version-linux-$processor
        $python -m qwen_aot capi --prefix "$out.part/$name" --portable --processor $processor
        cp LICENSE docs/capi.md "$out.part/$name"
        pack "$name"
    done
}

make_plugins() {
    sms=""
    for sm in ${PLUGIN_SMS:-}; do sms="$sms --sm $sm"; done
    for processor in x86_64 aarch64; do
        [ "$(uname -m)" = $processor ] && compiler=g++ || compiler=$processor-linux-gnu-g++
        name=libqwen_aot_plugins-$version-linux-$processor
        # shellcheck disable=SC2086 # options, one or none for each architecture
        CXX=$compiler $python -m qwen_aot.plugins.library -o "build/release/$processor" $sms
        $python -m qwen_aot.plugins.wheel "build/release/$processor/libqwen_aot_plugins.so" -o "$out.part"
        mkdir "$out.part/$name"
        cp LICENSE "build/release/$processor/libqwen_aot_plugins.so" "$out.part/$name"
        pack "$name"
    done
}

out=${1:-dist}
[ ! -e "$out" ] || [ -f "$out/SHA256SUMS" ] || [ -z "$(ls -A "$out")" ] || {
    echo "$out is there and no release (it has no SHA256SUMS); give another folder or empty it" >&2
    exit 1
}
[ -n "${RELEASE_PYTHON:-}" ] || install release
python=${RELEASE_PYTHON:-.venv/bin/python}
version=$($python -c 'from qwen_aot.version import __version__; print(__version__)')
rm -rf "$out.part"
mkdir -p "$out.part"
for part in ${RELEASE_PARTS:-python capi plugins}; do
    case $part in
    python | capi | plugins) "make_$part" ;;
    *) echo "RELEASE_PARTS has $part; accepted: python, capi, plugins" >&2 && exit 1 ;;
    esac
done
(cd "$out.part" && sha256sum -- * >SHA256SUMS)
rm -rf "$out"
mv "$out.part" "$out"
ls -l "$out"
