import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import pytest

from qwen_aot.errors import BuildError
from qwen_aot.extras import install_command
from qwen_aot.plugins import kernel_table, launch, library
from qwen_aot.plugins.library import build_library, tensorrt_headers
from qwen_aot.plugins.variants import LINEAR_WIDEST_PROGRAM, TACTICS, variants
from qwen_aot.whole_file import file_sha256
from tests.plugins.builds import CPP_TESTS, SELECTION_SOURCES, compile_cpp_test, cpp_test_names
from tests.shared import once
from tests.tools import require_package

REPOSITORY = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++")


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- The library through its interface (tests/plugins/src) ----


@pytest.fixture(scope="module")
def cpp_tests(plugin_build: Path, shared_folder: Path) -> Path:
    def make(folder: Path) -> Path:
        return compile_cpp_test(plugin_build, folder / "test", CPP_TESTS / "test_plugins.cpp", compiler=COMPILER)

    return once(shared_folder / "cpp_tests", make)


@pytest.mark.parametrize("name", cpp_test_names("test_plugins.cpp"))
def test_interface(cpp_tests, plugin_library, name):
    if name == "without_a_driver_a_step_is_a_logged_error" and shutil.which("nvidia-smi"):
        pytest.skip("this machine has a CUDA driver")
    done = subprocess.run([cpp_tests, plugin_library, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == done.stderr == ""  # what is logged goes to the logger


@pytest.fixture(scope="module")
def selection_tests(plugin_build: Path, shared_folder: Path) -> Path:
    def make(folder: Path) -> Path:
        return compile_cpp_test(plugin_build, folder / "test", *SELECTION_SOURCES, compiler=COMPILER)

    return once(shared_folder / "selection_tests", make)


@pytest.mark.parametrize("name", cpp_test_names("test_selection.cpp"))
def test_selection(selection_tests, name):
    done = subprocess.run([selection_tests, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_desktop_gpus_of_major_8_take_the_cubins_of_another_sm():
    assert kernel_table.COMPATIBLE == {"8.6": ("8.0",), "8.9": ("8.6", "8.0")}


def aligned(size: int) -> int:
    return -(-size // 256) * 256


ITEM_BYTES = {"fp16": 2, "fp32": 4, "i32": 4, "i64": 8}


def workspace_bytes(shapes: dict[str, tuple[tuple[int, ...], str]]) -> int:
    total = 0
    for shape, dtype in shapes.values():
        count = 1
        for size in shape:
            count *= size
        total += aligned(count * ITEM_BYTES[dtype])
    return total


# rows, fewest and most tokens of a step, H, Hkv, D, bits of the cache, C
GQA_PROFILES = [
    (1, 1, 1, 16, 16, 64, 16, 4096),
    (1, 1, 512, 16, 16, 64, 16, 4096),
    (1, 16, 512, 16, 16, 64, 16, 32768),  # never decodes
    (4, 1, 1, 40, 8, 128, 16, 32768),
    (4, 1, 1, 64, 8, 128, 8, 32768),
    (8, 1, 1, 9, 3, 64, 16, 200),  # too short to be split
    (256, 1, 8192, 64, 8, 128, 8, 32768),  # 34 GB: more than 32 bits count
]


@pytest.mark.parametrize("profile", GQA_PROFILES)
def test_workspace_of_attention_suffices_for_each_step_on_each_gpu(cpp_tests, plugin_library, profile):
    batch, fewest, most, num_heads, num_kv_heads, head_dim, cache_bits, capacity = profile
    given = int(output_of(cpp_tests, plugin_library, "workspace-gqa", *map(str, profile)))
    cache = "int8" if cache_bits == 8 else "same"
    needed = [
        workspace_bytes(
            launch.gqa_workspace(
                batch=rows,
                steps=steps,
                num_heads=num_heads,
                head_dim=head_dim,
                splits=launch.num_splits(
                    rows, num_kv_heads, capacity, num_heads // num_kv_heads, cache, sm_count, tactic
                ),
                dtype="fp16",
                is_timed=True,
            )
        )
        for tactic in TACTICS
        for rows in range(1, batch + 1)
        for steps in {fewest, most}
        for sm_count in (8, 128, 10_000)  # the last: as many parts as there may be
    ]
    assert given == max(needed)


MOE_PROFILES = [  # rows, fewest and most tokens of a step, E, k, weight bits, M, F
    (1, 1, 1, 60, 4, 16, 2048, 1408),
    (2, 1, 8, 60, 4, 16, 2048, 1408),  # 16 tokens: the last that decode
    (1, 1, 17, 60, 4, 16, 2048, 1408),
    (1, 1, 512, 60, 4, 16, 2048, 1408),
    (1, 1, 1, 64, 9, 16, 128, 256),  # too many experts a token to decode
    (1, 1, 3, 2, 1, 16, 128, 128),
    (64, 8000, 8192, 60, 4, 16, 2048, 1408),  # 23 GB
]


@pytest.mark.parametrize("profile", MOE_PROFILES)
def test_workspace_of_experts_suffices_for_each_step(cpp_tests, plugin_library, profile):
    batch, fewest, most, num_experts, k, _, hidden_size, inner_size = profile
    given = int(output_of(cpp_tests, plugin_library, "workspace-moe", *map(str, profile)))
    needed = [
        workspace_bytes(
            launch.moe_workspace(
                num_tokens=batch * steps,
                k=k,
                num_experts=num_experts,
                hidden_size=hidden_size,
                inner_size=inner_size,
                dtype="fp16",
                is_timed=True,
            )
        )
        for steps in range(fewest, most + 1)
    ]
    assert given == max(needed)


LINEAR_PROFILES = [  # rows, fewest and most tokens of a step, N, K
    (1, 1, 1, 1024, 1024),
    (8, 1, 1, 4096, 11008),
    (4, 1, 8, 2048, 2048),
    (1, 1, 512, 151936, 4096),
    (1, 17, 512, 4096, 4096),  # never decodes
    (1, 1, 1, 16, 128),
]


@pytest.mark.parametrize("profile", LINEAR_PROFILES)
def test_workspace_of_a_projection_suffices_for_each_step_on_each_gpu(cpp_tests, plugin_library, profile):
    batch, fewest, most, rows, columns = profile
    given = int(output_of(cpp_tests, plugin_library, "workspace-linear", *map(str, profile)))
    needed = {
        block_n: max(
            workspace_bytes(
                launch.linear_workspace(
                    num_tokens=tokens, rows=rows, splits=launch.linear_split(rows, columns, block_n, sm_count)[1]
                )
            )
            for tokens in {fewest, max(fewest, min(batch * most, 16)), batch * most}
            for sm_count in (8, 128, 10_000)
        )
        for block_n in (32, 64, LINEAR_WIDEST_PROGRAM)
    }
    assert given == max(needed.values()) == needed[LINEAR_WIDEST_PROGRAM]


# ---- The digest, by which TensorRT knows what it has timed ----


def digest_of(folder: Path) -> str:
    source, _ = kernel_table.source_and_assembly(folder, ["8.9"])
    (digest,) = re.findall(r'kDigest\[\] = "(\w{16})"', source)
    return digest


def other_cubin(entry):
    entry["sha256"] = entry["sha256"][::-1]


def other_match(entry):
    entry["match"] = {**entry["match"], "group": 7}


def other_grid(entry):
    entry["grid"][0]["per"] = 3


@pytest.mark.parametrize("change", [other_cubin, other_match, other_grid], ids=lambda change: change.__name__)
def test_other_kernels_have_another_digest(change, plugin_build, tmp_path):
    kernels = plugin_build / "build" / "kernels"
    (tmp_path / "sm_89").mkdir()
    manifest = json.loads((kernels / "sm_89" / "manifest.json").read_bytes())
    (tmp_path / "sm_89" / "manifest.json").write_text(json.dumps(manifest))
    assert digest_of(tmp_path) == digest_of(kernels)  # wherever they lie
    change(manifest["variants"][0])
    (tmp_path / "sm_89" / "manifest.json").write_text(json.dumps(manifest))
    assert digest_of(tmp_path) != digest_of(kernels)


def test_other_thresholds_have_another_digest(plugin_build, monkeypatch):
    before = digest_of(plugin_build / "build" / "kernels")
    monkeypatch.setitem(kernel_table.CONSTANTS, "kMinSplit", 512)
    assert digest_of(plugin_build / "build" / "kernels") != before


# ---- The file ----


def test_nothing_of_cuda_or_tensorrt_is_linked(plugin_library):
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", output_of("readelf", "--dynamic", plugin_library)))
    system = {"libc.so.6", "libdl.so.2", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "libstdc++.so.6"}
    assert needed and needed <= system


def test_the_two_entry_points_are_all_that_is_seen(plugin_library):
    symbols = output_of("nm", "--dynamic", "--defined-only", plugin_library).split()[2::3]
    assert symbols == ["getCreators", "setLoggerFinder"]


def test_every_cubin_is_embedded_and_aligned(plugin_build, plugin_library):
    data = plugin_library.read_bytes()
    cubins = sorted((plugin_build / "build" / "kernels" / "sm_89").glob("*.cubin"))
    assert len(cubins) == len(variants("8.9"))
    for cubin in cubins:
        place = data.find(cubin.read_bytes())
        assert place >= 0 and place % 16 == 0, cubin.name


def test_hash(plugin_library):
    assert file_sha256(plugin_library) == hashlib.sha256(plugin_library.read_bytes()).hexdigest()


# ---- Building ----


def test_command_line_builds_what_the_function_does(plugin_build, plugin_library):
    before = file_sha256(plugin_library)
    command = [sys.executable, "-m", "qwen_aot.plugins.library", "-o", plugin_build, "--sm", "8.9", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["library"] == str(plugin_library) and facts["bytes"] == plugin_library.stat().st_size
    assert facts["sha256"] == before  # nothing changed, and nothing was compiled again
    assert "[1/" not in done.stderr


def test_command_line_says_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "qwen_aot.plugins.library", "-o", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    unknown = subprocess.run([*command, "--sm", "7.5"], capture_output=True, text=True, env=environment)
    assert unknown.returncode == 2 and "7.5" in unknown.stderr
    none = subprocess.run([*command, "--jobs", "0"], capture_output=True, text=True, env=environment)
    assert none.returncode == 2 and "--jobs: invalid" in none.stderr
    headers = ["--tensorrt-include", tmp_path]
    without = subprocess.run([*command, *headers], capture_output=True, text=True, env=environment)
    assert without.returncode == 1
    assert without.stderr.startswith(f"error: {tmp_path} has no NvInferRuntime.h; give the include folder")
    (tmp_path / "file").touch()
    inside = [*command[:-1], tmp_path / "file" / "folder", *headers]
    unwritable = subprocess.run(inside, capture_output=True, text=True, env=environment)
    assert unwritable.returncode == 1
    assert unwritable.stderr == f"error: {tmp_path / 'file' / 'folder' / 'build'}: Not a directory\n"


def test_a_full_disk_and_ctrl_c_leave_the_standing_library(tmp_path, monkeypatch, capsys):
    def make_library(*_):
        (tmp_path / "made").write_bytes(b"new")
        return tmp_path / "made"

    def fill_disk(source, target):
        target.write_bytes(b"n")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    out.mkdir()
    (out / library.FILE_NAME).write_bytes(b"old")
    (tmp_path / "NvInferRuntime.h").touch()
    monkeypatch.setattr(sys, "argv", ["library", "-o", str(out), "--tensorrt-include", str(tmp_path)])
    monkeypatch.setattr(library.aot, "build", lambda *_, **__: {})
    monkeypatch.setattr(library.kernel_table, "write", lambda *_: None)
    for step, code, said in (
        (("shutil.copyfile", fill_disk), 1, f"error: {out / 'libqwen_aot_plugins.part'}: No space left on device\n"),
        (("_compile", interrupt), 130, "interrupted\n"),
    ):
        monkeypatch.setattr(library, "_compile", make_library)
        monkeypatch.setattr(f"qwen_aot.plugins.library.{step[0]}", step[1])
        assert library.main() == code
        assert capsys.readouterr().err == said
        assert (out / library.FILE_NAME).read_bytes() == b"old"
        assert sorted(path.name for path in out.iterdir()) == ["build", library.FILE_NAME]


def test_a_build_folder_of_another_project_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(library.aot, "build", lambda *_, **__: pytest.fail("something was built"))
    project = tmp_path / "build"
    (project / "cmake").mkdir(parents=True)
    for name in ("cmake/mine.txt", "CMakeCache.txt"):
        (project / name).write_text("mine")
    with pytest.raises(BuildError, match=r"holds files that no build of the plugins writes \(CMakeCache\.txt\)"):
        build_library(tmp_path, ["8.9"])
    assert sorted(path.name for path in project.rglob("*")) == ["CMakeCache.txt", "cmake", "mine.txt"]


@pytest.mark.parametrize(
    ("there", "message"),
    [([], "no cmake; install it with `COMMAND`"), (["cmake"], "no C++ compiler; install one")],
)
def test_a_missing_tool_is_named_with_its_remedy(tmp_path, monkeypatch, there, message):
    for tool in there:
        (tmp_path / tool).symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(library.aot, "build", lambda *_, **__: pytest.fail("kernels were compiled before the check"))
    (tmp_path / "NvInferRuntime.h").touch()
    message = message.replace("COMMAND", install_command("plugins"))  # with the Python that now runs
    with pytest.raises(BuildError, match=re.escape(message)):
        build_library(tmp_path / "out", ["8.9"], tensorrt_include=tmp_path)


def test_cmake_is_found_beside_this_python(tmp_path, monkeypatch):
    (tmp_path / "cmake").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "NvInferRuntime.h").touch()
    with pytest.raises(BuildError, match="no C"):
        build_library(tmp_path / "out", ["8.9"], tensorrt_include=tmp_path)


def test_another_compiler_is_taken_in_the_same_folder(plugin_build, tmp_path, monkeypatch):
    """A cross compiler above all: CMake by itself would go on with the one that it found first."""
    (tmp_path / "NvInferRuntime.h").touch()
    compiler = tmp_path / "other-c++"
    compiler.write_text(f'#!/bin/sh\necho other >> {tmp_path}/calls\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    folder = tmp_path / "copy" / "build"
    for part in ("kernels", "table"):
        shutil.copytree(plugin_build / "build" / part, folder / part)
    for name in ("", str(compiler)):
        monkeypatch.setenv("CXX", name)
        with pytest.raises(BuildError, match="compiling the library failed"):
            library._compile(library.find_cmake(), folder, tmp_path, 2)
        assert (tmp_path / "calls").exists() == bool(name)


def test_a_failing_step_shows_the_tools_own_words(plugin_build, tmp_path):
    (tmp_path / "NvInferRuntime.h").write_text("#error these are no headers\n")
    copy = tmp_path / "copy"
    shutil.copytree(plugin_build / "build" / "kernels", copy / "build" / "kernels")
    with pytest.raises(BuildError, match=r"compiling the library failed:(.|\n)*these are no headers"):
        build_library(copy, ["8.9"], tensorrt_include=tmp_path)
    assert not (copy / library.FILE_NAME).exists()


def test_one_process_at_a_time_builds_in_a_folder(tmp_path, monkeypatch):
    def build(*_, **__):
        with pytest.raises(BuildError, match=r"another process builds in .*build; wait for it"):
            build_library(tmp_path, ["8.9"], tensorrt_include=tmp_path)
        raise ZeroDivisionError

    (tmp_path / "NvInferRuntime.h").touch()
    monkeypatch.setattr(library.aot, "build", build)
    for _ in range(2):  # a build that failed leaves no lock
        with pytest.raises(ZeroDivisionError):
            build_library(tmp_path, ["8.9"], tensorrt_include=tmp_path)


@pytest.mark.parametrize("name", ["a#b", "a;b", 'a"b'])
def test_a_folder_that_cmake_cannot_build_in_is_refused(name, tmp_path):
    with pytest.raises(BuildError, match=rf"CMake can't build in .*, whose name has {name[1]}; choose another folder"):
        build_library(tmp_path / name, ["8.9"])
    assert not (tmp_path / name).exists()


def test_an_sm_given_twice_is_refused(tmp_path):
    with pytest.raises(BuildError, match=r"each once; not 8\.9, 8\.9"):
        build_library(tmp_path, ["8.9", "8.9"])


def test_only_headers_are_taken_out_of_the_package(tmp_path, monkeypatch):
    def download(command, failure):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "package.whl", "w") as wheel:
            wheel.writestr("kernel_lens/include/tensorrt/NvInferRuntime.h", "// header")
            wheel.writestr("kernel_lens/include/tensorrt/readme.txt", "")
            wheel.writestr("kernel_lens/__init__.py", "")

    monkeypatch.setattr(library, "_SDK_FOLDERS", ())
    monkeypatch.setattr(library, "_run", download)
    with pytest.raises(BuildError, match=r"package\.whl has SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}"):
        tensorrt_headers(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(library, "HEADERS_SHA256", hash_of_download(tmp_path, download))
    folder = tensorrt_headers(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["NvInferRuntime.h"]


def hash_of_download(folder: Path, download) -> str:
    scratch = folder / "scratch"
    scratch.mkdir()
    download(["--dest", scratch], "")
    digest = file_sha256(scratch / "package.whl")
    shutil.rmtree(scratch)
    return digest


@pytest.mark.parametrize("major", ["NV_TENSORRT_MAJOR 8 //!< old", "TRT_MAJOR_ENTERPRISE 9"])
def test_an_installed_sdk_goes_before_a_download_unless_it_is_too_old(tmp_path, monkeypatch, major):
    new, old = tmp_path / "new", tmp_path / "old"
    for folder in (new, old):
        folder.mkdir()
        (folder / "NvInferRuntime.h").touch()
    (new / "NvInferVersion.h").write_text("#define TRT_MAJOR_ENTERPRISE 11\n#define NV_TENSORRT_MAJOR TRT_MAJOR\n")
    (old / "NvInferVersion.h").write_text(f"#define {major}\n")
    monkeypatch.setattr(library, "_SDK_FOLDERS", ("/nowhere", str(old), str(new)))
    assert tensorrt_headers(tmp_path / "build") == new
    version = re.search(r"\d+", major)[0]
    with pytest.raises(BuildError, match=rf"old has the headers of TensorRT {version}; accepted: 10 or later"):
        tensorrt_headers(tmp_path / "build", old)


# ---- A real TensorRT's registry and parser ----

HALF, FLOAT, INT8, INT32, INT64 = (
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT8,
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
)
CACHE = [1, 8, 1024, 128]
GQA = {
    "op": "QwenGQA",
    "attributes": {
        "num_heads": 40,
        "num_kv_heads": 8,
        "head_dim": 128,
        "cache_bits": 8,
        "norm_epsilon": 0.0,
        "scale": 0.0625,
    },
    "inputs": [
        (HALF, ["B", "S", 7168]),
        *[(INT8, CACHE)] * 2,
        *[(FLOAT, [4096, 64])] * 2,
        (INT64, ["B", "S"]),
        *[(INT64, ["B"])] * 2,
        *[(HALF, CACHE[:3])] * 2,
    ],
    "outputs": [(HALF, ["B", "S", 5120]), *[(INT8, CACHE)] * 2, *[(HALF, CACHE[:3])] * 2],
}
MOE = {
    "op": "QwenMoE",
    "attributes": {"num_experts": 60, "experts_per_token": 4, "weight_bits": 4, "has_zeros": 1},
    "inputs": [
        (HALF, ["B", "S", 2048]),
        (INT32, ["B", "S", 4]),
        (FLOAT, ["B", "S", 4]),
        (INT8, [60, 2816, 1024]),
        (INT8, [60, 2048, 704]),
        (HALF, [60, 2816, 16]),
        (HALF, [60, 2048, 11]),
        (INT8, [60, 2816, 16]),
        (INT8, [60, 2048, 11]),
    ],
    "outputs": [(HALF, ["B", "S", 2048])],
}

LINEAR = {
    "op": "QwenLinear",
    "attributes": {"weight_bits": 4, "group_size": 128, "has_zeros": 1, "has_bias": 1},
    "inputs": [
        (HALF, ["B", "S", 2048]),
        (INT8, [1024, 2048]),
        (HALF, [16, 2048]),
        (INT8, [16, 2048]),
        (HALF, [2048]),
    ],
    "outputs": [(HALF, ["B", "S", 2048])],
}


def parse(plugin_library: Path, node: dict | None = None) -> list[list]:
    """What the child printed. It ends with an abort where a plugin was created: TensorRT-RTX has no plugin layers."""
    require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")
    command = [sys.executable, Path(__file__).parent / "parse_plugin.py", plugin_library]
    command += [] if node is None else [json.dumps(node)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    return lines


@pytest.mark.tools
@pytest.mark.trt
def test_a_real_registry_finds_all_creators(plugin_library):
    assert [line for line in parse(plugin_library) if line[0] == "creator"] == [
        [
            "creator",
            node["op"],
            "qwen_aot",
            "1",
            [[name, "FLOAT32" if isinstance(value, float) else "INT32"] for name, value in node["attributes"].items()],
        ]
        for node in (GQA, MOE, LINEAR)
    ]


@pytest.mark.tools
@pytest.mark.trt
@pytest.mark.parametrize(
    ("node", "fields"),
    [
        (GQA, "num_heads=40, num_kv_heads=8, head_dim=128, cache_bits=8, norm_epsilon=0, scale=0.0625"),
        (MOE, "num_experts=60, experts_per_token=4, weight_bits=4, has_zeros=1"),
        (LINEAR, "weight_bits=4, group_size=128, has_zeros=1, has_bias=1"),
    ],
    ids=["gqa", "moe", "linear"],
)
def test_a_real_parser_creates_the_plugin_with_the_nodes_attributes(plugin_library, node, fields):
    lines = parse(plugin_library, node)
    assert ["log", "VERBOSE", f"qwen_aot {node['op']}: created with {fields}"] in lines
    assert ["log", "INFO", f"Successfully created plugin: {node['op']}"] in lines


@pytest.mark.tools
@pytest.mark.trt
@pytest.mark.parametrize(
    ("node", "name", "value", "message"),
    [
        (GQA, "head_dim", 96, "serves dtype=fp16, cache=int8, head_dim=96, group=5"),
        (GQA, "scale", None, "field scale, one float32, is missing"),
        (GQA, "scale", 1, "field scale must be one float32"),
        (MOE, "weight_bits", 3, "field weight_bits is 3; it must be 16, 8 or 4"),
        (LINEAR, "group_size", 96, "field group_size is 96; it must be 32, 64, 128, or -1 for all of K"),
    ],
)
def test_what_is_wrong_with_a_node_reaches_tensorrts_logger(plugin_library, node, name, value, message):
    attributes = {**node["attributes"], name: value}
    if value is None:
        del attributes[name]
    errors = [line[2] for line in parse(plugin_library, {**node, "attributes": attributes}) if line[1] == "ERROR"]
    assert any(error.startswith(f"qwen_aot {node['op']}: ") and message in error for error in errors), errors
