"""A build that is done but for the compiling, as a folder: what `--prepare` writes and another machine compiles.

The folder holds model.onnx and its weights as TensorRT parses them, the text files of the bundle, the plugins' library
where the graph needs it, and prepared.json, written last: the request, and the manifest of the bundle to be, whose
engine is still the graph and whose files are those of this folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.targets import TARGETS
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.errors import BuildError, BundleError
from qwen_aot.runtime.bundle.files import PREPARED_NAME
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.bundle.strict_json import parse_object, require_keys
from qwen_aot.version import __version__
from qwen_aot.whole_file import file_sha256
from qwen_aot.whole_folder import refuse_unless_as_written

__all__ = [
    "PREPARED_NAME",
    "Prepared",
    "is_prepared",
    "read_prepared",
    "refuse_unless_prepared",
    "require_compiled",
    "require_whole",
]

FORMAT_VERSION = 1
_COUNTS = ("weight_bytes", "int4_bytes", "activation_bytes")
_KEYS = ("format_version", "qwen_aot", "spec", *_COUNTS, "manifest")
_OF_THE_HOST = ("timing_cache", "plugin_library")  # options that name files of the machine that prepared
_NOT_ASKED = "asked"  # of a BuildSpec: it is derived


@dataclass(frozen=True, slots=True)
class Prepared:
    """What prepared.json says.

    Attributes:
        spec: the request, settled by the checkpoint; its options name no files.
        weight_bytes: of all weights as they are stored, without the padding of their file.
        int4_bytes: what of them is of type INT4.
        activation_bytes: that a step will take, estimated.
        manifest: of the bundle to be; `engines.text.file` is the graph, and `files` are those of the folder.
    """

    spec: BuildSpec
    weight_bytes: int
    int4_bytes: int
    activation_bytes: int
    manifest: Manifest

    def to_json(self) -> str:
        """The text of prepared.json."""
        spec = dataclasses.asdict(self.spec)
        del spec[_NOT_ASKED]
        for name in _OF_THE_HOST:
            del spec["tensorrt"][name]
        document = {
            "format_version": FORMAT_VERSION,
            "qwen_aot": __version__,
            "spec": spec,
            **{name: getattr(self, name) for name in _COUNTS},
            "manifest": dataclasses.asdict(self.manifest),
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def is_prepared(path: Path) -> bool:
    """Whether a folder holds a prepared build, sound or not."""
    return (path / PREPARED_NAME).is_file()


def read_prepared(folder: Path) -> Prepared:
    """Reads prepared.json; the files that it lists aren't opened.

    Raises:
        BuildError: it isn't there, is damaged, or was written by another version.
    """
    path = folder / PREPARED_NAME
    try:
        document = parse_object(path.read_text(encoding="utf-8"), PREPARED_NAME)
        found = document.get("format_version")
        if type(found) is not int or found != FORMAT_VERSION:
            raise BuildError(
                f"{path} has format_version {found!r}, and this version of qwen-aot reads {FORMAT_VERSION}: prepare "
                f"and compile with the same version (it was prepared by {document.get('qwen_aot')})"
            )
        require_keys(document, _KEYS, PREPARED_NAME)
        if document["qwen_aot"] != __version__:
            raise BuildError(
                f"{path} was prepared by qwen-aot {document['qwen_aot']}, and this is {__version__}: prepare and "
                "compile with the same version"
            )
        manifest = Manifest.from_json(json.dumps(document["manifest"]))
        counts = [document[name] for name in _COUNTS]
        for name, value in zip(_COUNTS, counts, strict=True):
            if type(value) is not int or value < 0:
                raise BundleError(f"{name} is {value!r}; accepted: whole numbers from 0")
        weight_bytes, int4_bytes, activation_bytes = counts
        spec = _spec_of(document["spec"])
        _require_one_request(spec, manifest)
        return Prepared(spec, weight_bytes, int4_bytes, activation_bytes, manifest)
    except (OSError, UnicodeDecodeError, BundleError) as error:
        raise BuildError(f"{path} can't be read ({error}): prepare the build again") from error


def _require_one_request(spec: BuildSpec, manifest: Manifest) -> None:
    """The request and the manifest tell of one build.

    Raises:
        BundleError: names what they differ in.
    """
    text = manifest.engines.text
    asked = {
        "target": (str(spec.target), manifest.target),
        "precision": (str(spec.precision), text.precision),
        "max_batch": (spec.max_batch, manifest.max_batch),
        "prefill_chunk": (spec.prefill_chunk, manifest.prefill_chunk),
        "speculate": (spec.speculate, text.logits_rows),
    }
    if differing := [name for name, (one, other) in asked.items() if one != other]:
        raise BundleError(f"its request and its manifest differ in {', '.join(differing)}")


def _spec_of(document: Any) -> BuildSpec:
    """The request, by the names of its fields.

    Raises:
        BundleError: a field is unknown, or a value isn't one.
    """
    try:
        fields = dict(document)
        if named := [name for name in _OF_THE_HOST if name in fields["tensorrt"]]:  # native code among them
            raise BundleError(f"its request names files of a machine ({', '.join(named)}); accepted: none")
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields["tensorrt"].items()
        }
        return BuildSpec(**{**fields, "tensorrt": TensorRtOptions(**options)})
    except (BuildError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise BundleError(f"its request isn't one of this version of qwen-aot ({error})") from error


def require_whole(folder: Path, manifest: Manifest, on_progress: Callable[[int, int], None]) -> None:
    """Compares every file of a prepared build with its entry.

    Args:
        folder: of the prepared build.
        manifest: of it.
        on_progress: called with bytes done and bytes in all.

    Raises:
        BuildError: a file is missing, or isn't as it was written.
    """
    total, done = sum(entry.bytes for entry in manifest.files.values()), 0
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            is_whole = path.stat().st_size == entry.bytes and file_sha256(path) == entry.sha256
        except OSError as error:
            raise BuildError(
                f"{path} can't be read ({error.strerror or error}): copy the whole folder again"
            ) from error
        if not is_whole:
            raise BuildError(f"{path} isn't as it was prepared (changed, or not copied whole): copy the folder again")
        done += entry.bytes
        on_progress(done, total)


def require_compiled(spec: BuildSpec) -> None:
    """Refuses a target whose bundles are done without compiling.

    Raises:
        BuildError: the target is one of them.
    """
    if not spec.facts.compiles:
        able = ", ".join(str(target) for target, facts in TARGETS.items() if facts.compiles)
        raise BuildError(
            f"target {spec.target} has nothing to compile on the device, so nothing to prepare: build the bundle "
            f"itself; --prepare is for {able}"
        )


def refuse_unless_prepared(out: Path) -> None:
    """Checks that `out` is free, an empty folder, or a prepared build with nothing else in it.

    Raises:
        BuildError: replacing it would destroy something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise BuildError(f"{out} is a file; give a folder for the prepared build")
    if not any(out.iterdir()):
        return
    advice = "give another folder, or move this one away; delete it, if nothing in it is yours"
    if not is_prepared(out):
        raise BuildError(f"{out} isn't empty and isn't a prepared build (no {PREPARED_NAME}); {advice}")
    try:
        files = read_prepared(out).manifest.files
    except BuildError as error:
        raise BuildError(f"{error}; {advice}") from error
    listed: Mapping[str, tuple[int, str]] = {name: (entry.bytes, entry.sha256) for name, entry in files.items()}
    refuse_unless_as_written(out, listed, PREPARED_NAME, PREPARED_NAME, advice)
