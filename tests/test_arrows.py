"""Who may import whom: the allowed arrows between folders, and that no import goes round in a circle."""

from __future__ import annotations

from pathlib import Path

import pytest

import qwen_aot
from tests.arrows import Arrow, Import, circles, downwards, edges_between, forbidden, is_within, read_imports, unused

TREE = Path(qwen_aot.__file__).parent

# Inside each package, from the lowest up: a layer imports those above its line, never the other way.
EXPORTER = (
    ("exporter.model", "a model's facts and its engine's inputs and outputs"),
    ("exporter.checkpoint", "readers give a model's facts and tensors"),
    ("exporter.weights", "recipes name a checkpoint's tensors, stitching reads them"),
    ("exporter.graph", "a traced graph carries the recipes of its weights"),
    ("exporter.quantize", "quantized weights are recipes with another transform"),
    ("exporter.calibration", "sample texts, and what a quantizer learns of them"),
    ("exporter.rounding", "rounds weights by what calibration shows"),
    ("exporter.lowering", "rewrites a traced graph and the recipes of its weights"),
)
ENGINES = (
    ("engines.spec", "what can be asked for, decided before anything is built"),
    ("engines.bundle", "how any bundle is written and what a build costs"),
    ("engines.planner | engines.profiles", "sizes of what can be asked for"),
    ("engines.calibrate", "what is learned of sample texts before a build"),
    ("engines.builders", "the interface of a target's builder"),
    ("engines.onnxruntime | engines.tensorrt", "a target's builder"),
    ("engines.mixed_bits | engines.plain_share", "the codes of a quantized folder, chosen by what they lose"),
    ("engines.vision", "the second engine of a bundle, by a target's builder"),
    ("engines.build | engines.export | engines.quantize", "from checkpoint to folder: a builder, a lowering, or codes"),
    ("engines.prepared_folder", "a build between two machines"),
    ("engines.build_quantized | engines.prepare | engines.compile_prepared", "builds in several steps"),
    ("engines.verify", "judges what was built, and builds what it compares with"),
)
RUNTIME = (
    ("runtime.bundle", "the bundle format"),
    ("runtime.engine | runtime.text", "one step of an engine; text to tokens and back"),
    ("runtime.vision", "images to what a vision engine takes; boxes of answers"),
    ("runtime.backends", "an engine for each kind of file in a bundle"),
    ("runtime.generation | runtime.capi", "drives any engine; builds the C library, which does the same"),
    ("runtime.measure | runtime.server", "times it under load; lets many clients drive it over HTTP"),
    ("runtime.cli", "shows all of it on a terminal"),
)
PLUGINS = (
    ("plugins.kernels", "the kernels' own source"),
    ("plugins.signatures", "names the kernels' arguments"),
    ("plugins.variants", "the kernels as they are compiled"),
    ("plugins.aot | plugins.launch", "compiles variants, or launches them"),
    ("plugins.kernel_table", "what C++ reads of them"),
    ("plugins.library | plugins.performance | plugins.wheel", "the library of them all; a model of their speed"),
    ("plugins.cpu", "the CPU's kernels, which share nothing with the others"),
)

ARROWS = (
    Arrow("", "errors", "one error tree"),
    Arrow("", "extras", "one answer to which extra brings a package"),
    Arrow("", "figures", "one look of every plot"),
    Arrow("", "jetson", "one answer to which board this is"),
    Arrow("", "machine", "one answer to what the process may use"),
    Arrow("", "portable_compiler", "one compiler of what is given to others"),
    Arrow("", "str_enum", "a class of newer Pythons"),
    Arrow("", "version", "one version"),
    Arrow("", "whole_file", "one way to write a file that may replace another"),
    Arrow("", "whole_folder", "one way to write a folder that may replace another"),
    *(arrow for layers in (EXPORTER, ENGINES, RUNTIME, PLUGINS) for arrow in downwards(layers)),
    Arrow("engines", "exporter", "engines are made of exported graphs"),
    Arrow("engines", "runtime.bundle", "bundles are written in the format that the runtime owns"),
    Arrow("engines.bundle", "runtime.text", "a build renders chat templates by the code that will render them"),
    Arrow("engines.verify", "runtime.engine", "a graph is fed what a step of any engine is"),
    Arrow("engines.onnxruntime", "runtime.backends.cpu", "a build's graph for own kernels is opened by their library"),
    Arrow("plugins.wheel", "runtime.bundle", "where a runtime looks for the library"),
    Arrow("runtime.capi", "plugins.cpu", "the C library is installed with own CPU kernels beside it"),
    Arrow("plugins.performance", "engines.planner", "the GPUs that `plan` knows"),
    Arrow("plugins.performance", "exporter.model", "the shapes of the variants"),
    # A target's row names its builder, which is imported when a build needs it: the target's library may be absent.
    Arrow("engines", "engines.onnxruntime", "a table of builders", in_tables_only=True),
    Arrow("engines", "engines.tensorrt", "the same", in_tables_only=True),
    # The command line's build side, file by file; the device's verbs (generate, chat, bench, inspect of a bundle,
    # doctor) know nothing that builds.
    Arrow("runtime.cli.build", "engines", "the verb builds", in_functions_only=True),
    Arrow("runtime.cli.build_prepared", "engines", "the same, on the device", in_functions_only=True),
    Arrow("runtime.cli.build_shown", "engines", "shows what was built", in_functions_only=True),
    Arrow("runtime.cli.export", "engines", "the verb writes graphs", in_functions_only=True),
    Arrow("runtime.cli.export", "exporter", "it opens a checkpoint", in_functions_only=True),
    Arrow("runtime.cli.quantize", "engines", "the verb quantizes", in_functions_only=True),
    Arrow("runtime.cli.quantize", "exporter", "it names the algorithms", in_functions_only=True),
    Arrow("runtime.cli.plan", "engines", "the verb plans builds", in_functions_only=True),
    Arrow("runtime.cli.plan", "exporter", "it reads a checkpoint's configuration", in_functions_only=True),
    Arrow("runtime.cli.verify", "engines", "the verb compares with what was built from", in_functions_only=True),
    Arrow("runtime.cli.verify", "exporter", "which is a checkpoint", in_functions_only=True),
    Arrow("runtime.cli.verify_layers", "engines", "the same, layer by layer", in_functions_only=True),
    Arrow("runtime.cli.verify_layers", "exporter", "which is a checkpoint", in_functions_only=True),
    Arrow("runtime.cli.compare", "engines", "the verb compares with what was built from", in_functions_only=True),
    Arrow("runtime.cli.compare", "exporter", "which is a checkpoint, and the texts", in_functions_only=True),
    Arrow("runtime.cli.comparison_table", "engines", "shows what was found", in_functions_only=True),
    Arrow("runtime.cli.doctor", "plugins.cpu", "whether the library is of these sources", in_functions_only=True),
    Arrow("runtime.cli.gpu_check", "engines", "the verb builds and compares", in_functions_only=True),
    Arrow("runtime.cli.gpu_check", "exporter", "a model of its own", in_functions_only=True),
    Arrow("runtime.cli.gpu_check", "plugins", "it builds the library for this GPU", in_functions_only=True),
    Arrow("runtime.cli.source", "exporter", "opens what the build side's verbs name", in_functions_only=True),
    Arrow("runtime.cli.inspect_checkpoint", "exporter", "reads one, on a build machine", in_functions_only=True),
    Arrow("runtime.cli.inspect_checkpoint", "engines.planner", "says what builds make of it", in_functions_only=True),
    Arrow("__init__", "engines", "the public face re-exports, when a name is used", in_functions_only=True),
    Arrow("__init__", "exporter", "the same", in_functions_only=True),
    Arrow("__init__", "runtime", "the same", in_functions_only=True),
    Arrow("__main__", "runtime.cli", "`python -m qwen_aot` is the command line"),
)

FOLDERS = [
    folder for layers in (EXPORTER, ENGINES, RUNTIME, PLUGINS) for units, _ in layers for folder in units.split(" | ")
]
# Seen from afar: the runtime in four parts, since builds write its format, its command line starts builds, and what
# installs the C library compiles kernels.
PACKAGES = ["exporter", "engines", "plugins", "runtime.bundle", "runtime.capi", "runtime.cli", "runtime"]


def innermost_folders(tree: Path) -> list[str]:
    """Folders of modules that hold no folders, dotted; a module beside folders stands for itself."""
    folders = {path.parent.relative_to(tree) for path in _modules(tree)}
    return sorted(
        ".".join(folder.parts) for folder in folders if not any(other.parent == folder for other in folders - {folder})
    )


def _modules(folder: Path) -> list[Path]:
    inside = [path for child in sorted(folder.iterdir()) if child.is_dir() for path in _modules(child)]
    return [*folder.glob("*.py"), *inside]


@pytest.fixture(scope="module")
def ours() -> list[Import]:
    return read_imports(TREE)


def test_every_import_follows_an_allowed_arrow(ours: list[Import]) -> None:
    assert forbidden(ours, ARROWS, FOLDERS) == []


def test_no_arrow_is_left_over(ours: list[Import]) -> None:
    between_packages = [arrow for arrow in ARROWS if arrow.source.partition(".")[0] != arrow.target.partition(".")[0]]
    assert unused(ours, between_packages) == []


def test_every_folder_has_its_place_in_the_order() -> None:
    files = (path.relative_to(TREE).with_suffix("") for path in _modules(TREE) if path.stem != "__init__")
    inside = {".".join(file.parts) for file in files}
    outside = {module for module in inside if not any(is_within(module, folder) for folder in FOLDERS)}
    assert outside == {
        "__main__",
        "errors",
        "extras",
        "figures",
        "jetson",
        "machine",
        "portable_compiler",
        "str_enum",
        "version",
        "whole_file",
        "whole_folder",
    }


@pytest.mark.parametrize(
    "folders",
    [[], FOLDERS, PACKAGES, innermost_folders(TREE)],
    ids=["modules", "folders", "packages", "innermost folders"],
)
def test_no_imports_go_round_in_a_circle(ours: list[Import], folders: list[str]) -> None:
    assert circles(edges_between(ours, folders)) == []


# The checker itself, on made-up trees.


def write(root: Path, files: dict[str, str]) -> Path:
    for name in ("", "exporter", "engines", "runtime", "plugins"):
        (root / name).mkdir(exist_ok=True)
    for name, text in files.items():
        path = root / name
        for folder in path.parents:
            if not folder.is_relative_to(root):
                break
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
        path.write_text(text)
    return root


ALL = {  # one module for each place of the table, so that imports of it resolve
    **{
        f"{name}.py": ""
        for name in (
            "errors",
            "extras",
            "figures",
            "jetson",
            "machine",
            "portable_compiler",
            "str_enum",
            "version",
            "whole_file",
            "whole_folder",
        )
    },
    **{f"{folder.replace('.', '/')}/it.py": "" for folder in FOLDERS},
    **{f"runtime/cli/{verb}.py": "" for verb in ("build", "doctor", "bench", "generate", "chat", "inspect")},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tree"), ALL)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("exporter/model/it.py", "exporter.weights.it"),
        ("exporter/weights/it.py", "exporter.graph.it"),
        ("exporter/graph/it.py", "exporter.lowering.it"),
        ("exporter/lowering/it.py", "engines.spec.it"),
        ("exporter/checkpoint/it.py", "runtime.bundle.it"),
        ("exporter/lowering/it.py", "plugins.variants.it"),
        ("engines/spec/it.py", "engines.bundle.it"),
        ("engines/planner/it.py", "engines.build.it"),
        ("engines/tensorrt/it.py", "engines.verify.it"),
        ("engines/bundle/it.py", "runtime.engine.it"),
        ("engines/verify/it.py", "runtime.generation.it"),
        ("engines/tensorrt/it.py", "plugins.library.it"),
        ("runtime/bundle/it.py", "engines.spec.it"),
        ("runtime/backends/it.py", "exporter.model.it"),
        ("runtime/text/it.py", "runtime.engine.it"),
        ("runtime/backends/it.py", "runtime.generation.it"),
        ("runtime/generation/it.py", "runtime.cli.it"),
        ("runtime/cli/doctor.py", "engines.spec.it"),
        ("runtime/cli/bench.py", "engines.bundle.it"),
        ("runtime/cli/generate.py", "exporter.model.it"),
        ("runtime/cli/chat.py", "engines.build.it"),
        ("runtime/cli/inspect.py", "exporter.checkpoint.it"),
        ("plugins/library/it.py", "engines.tensorrt.it"),
        ("plugins/performance/it.py", "runtime.bundle.it"),
        ("plugins/performance/it.py", "engines.build.it"),
        ("plugins/kernels/it.py", "plugins.variants.it"),
        ("errors.py", "runtime.bundle.it"),
        ("machine.py", "exporter.model.it"),
    ],
)
@pytest.mark.parametrize(
    "form",
    [
        "\nimport qwen_aot.{module}\n",
        "\nfrom qwen_aot.{folder} import {name}\n",
        "\nfrom qwen_aot.{module} import something\n",
        "def f():\n    from qwen_aot.{module} import something\n",
        "if TYPE_CHECKING:\n    from qwen_aot.{module} import something\n",
        "try:\n    import qwen_aot.{module} as other\nexcept ImportError: pass\n",
        'TABLE = {{\n"x": "qwen_aot.{module}"}}\n',
        'def f():\n    return importlib.import_module("qwen_aot.{module}")\n',
    ],
    ids=["import", "from folder", "from module", "function", "type checking", "try", "table", "import_module"],
)
def test_the_checker_reports_a_forbidden_arrow(tree: Path, importer: str, imported: str, form: str) -> None:
    folder, _, name = imported.rpartition(".")
    (tree / importer).write_text(form.format(module=imported, folder=folder, name=name))
    found = forbidden(read_imports(tree), ARROWS, FOLDERS)
    (tree / importer).write_text("")
    source = importer.removesuffix(".py").replace("/", ".")
    assert found == [f"{importer}:2: {source} imports {imported}, and no arrow allows it"]


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ("def f():\n    from qwen_aot.engines.spec.it import x\n", True),
        ("if TYPE_CHECKING:\n    from qwen_aot.engines.spec.it import x\n", True),
        ("\nfrom qwen_aot.engines.spec.it import x\n", False),
        ("if True:\n    from qwen_aot.engines.spec.it import x\n", False),
        ("class C:\n    from qwen_aot.engines.spec.it import x\n", False),
        ("if not TYPE_CHECKING:\n    from qwen_aot.engines.spec.it import x\n", False),
        ("if TYPE_CHECKING: pass\nelse: from qwen_aot.engines.spec.it import x\n", False),
        ("\ndef f(a=__import__('qwen_aot.engines.spec.it')): pass\n", False),
        ("\n@__import__('qwen_aot.engines.spec.it').x\ndef f(): pass\n", False),
    ],
    ids=["function", "type checking", "top", "if", "class", "not type checking", "else", "default", "decorator"],
)
def test_a_build_verb_may_import_what_builds_in_functions_only(tmp_path: Path, text: str, is_allowed: bool) -> None:
    root = write(tmp_path, {**ALL, "runtime/cli/build.py": text})
    expected = "runtime/cli/build.py:2: runtime.cli.build imports engines.spec.it at its top: do it in a function"
    assert forbidden(read_imports(root), ARROWS, FOLDERS) == ([] if is_allowed else [expected])


def test_relative_imports_and_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "code", {"model/it.py": "from ..lowering import it\n", "lowering/it.py": ""})
    (tmp_path / "src").mkdir()
    (tmp_path / "src/exporter").symlink_to(tmp_path / "code")
    (found,) = forbidden(read_imports(tmp_path / "src"), ARROWS, FOLDERS)
    assert found == "exporter/model/it.py:1: exporter.model.it imports exporter.lowering.it, and no arrow allows it"


def test_other_packages_names_and_prose_are_no_imports(tmp_path: Path) -> None:
    text = (
        'import torch\nimport qwen_aot_other\nLOGGER = "qwen_aot.no_such_module"\n"""See qwen_aot.engines.spec.it."""\n'
    )
    root = write(tmp_path, {**ALL, "exporter/model/it.py": text})
    assert read_imports(root) == []


@pytest.mark.parametrize("importer", ["engines/builders/it.py", "engines/onnxruntime/it.py"])
def test_a_builder_may_be_named_in_a_table_and_not_imported(tree: Path, importer: str) -> None:
    found = []
    for text in ('TABLE = {"x": "qwen_aot.engines.tensorrt.it"}\n', "import qwen_aot.engines.tensorrt.it\n"):
        (tree / importer).write_text(text)
        found.append(len(forbidden(read_imports(tree), ARROWS, FOLDERS)))
    (tree / importer).write_text("")
    assert found == [0, 1]


def test_arrows_that_nothing_needs_are_found(tmp_path: Path) -> None:
    root = write(tmp_path, {**ALL, "engines/spec/it.py": "import qwen_aot.exporter.model.it\n"})
    needed, idle = Arrow("engines", "exporter", "used"), Arrow("engines", "plugins", "not used")
    assert unused(read_imports(root), (needed, idle)) == [idle]


def test_circles_of_modules_count_imports_in_functions(tmp_path: Path) -> None:
    files = {
        "runtime/text/a.py": "import qwen_aot.runtime.text.b\n",
        "runtime/text/b.py": "def f():\n    import qwen_aot.runtime.text.c\n",
        "runtime/text/c.py": 'def f():\n    import_module("qwen_aot.runtime.text.a")\n',
        "runtime/text/d.py": "import qwen_aot.runtime.text.a\n",
    }
    imports = read_imports(write(tmp_path, files))
    assert circles(edges_between(imports)) == [["runtime.text.a", "runtime.text.b", "runtime.text.c"]]
    assert circles(edges_between(imports, ["runtime.text"])) == []


def test_circles_of_folders_need_no_circle_of_modules(tmp_path: Path) -> None:
    files = {
        "runtime/text/a.py": "import qwen_aot.runtime.engine.a\n",
        "runtime/text/b.py": "",
        "runtime/engine/a.py": "",
        "runtime/engine/b.py": "if TYPE_CHECKING:\n    import qwen_aot.runtime.text.b\n",
    }
    imports = read_imports(write(tmp_path, files))
    assert circles(edges_between(imports)) == []
    assert circles(edges_between(imports, innermost_folders(tmp_path))) == [["runtime.engine", "runtime.text"]]


def test_a_table_does_not_need_what_it_names(tmp_path: Path) -> None:
    """As the table of builders, whose modules import the interface beside it."""
    files = {
        "engines/builders.py": 'TABLE = {"cpu": "qwen_aot.engines.tensorrt.it"}\n',
        "engines/tensorrt/it.py": "import qwen_aot.engines.builders\n",
    }
    assert circles(edges_between(read_imports(write(tmp_path, files)))) == []
