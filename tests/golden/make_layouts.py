"""Remakes layouts.json: `python -m tests.golden.make_layouts`.

Folders as they may lie on a disk, that every reader of a bundle must open or refuse: links, hub snapshots, and the data
files that a graph names. Written from the format's rules alone; no code of ours is asked. A case is a list of nodes to
be made under a folder of its own, in their order:

    {"path": ..., "file": base64 of its content}   {"path": ..., "folder": true}
    {"path": ..., "link": what the link says, "{root}" standing for the case's folder}   {"path": ..., "pipe": true}

and which of them is opened (`open`), with what limit on hashes (`skip_hash_above`, bytes, or null), and the answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import posixpath
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from tests.golden.make_manifests import BASE

DATA = b"weights of a model"
NAME = "models--me--tiny"
REVISION = "0123456789abcdef0123456789abcdef01234567"
SNAPSHOT = f"{NAME}/snapshots/{REVISION}"
GRAPH, WEIGHTS, MANIFEST = "model.onnx", "model.onnx.data", "manifest.json"

Node = dict[str, Any]


def external(location: str) -> onnx.TensorProto:
    """A tensor whose bytes lie in another file."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.INT8, dims=[len(DATA)])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", str(len(DATA)))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph(location: str = WEIGHTS, where: str = "initializer") -> bytes:
    """A model with one tensor in another file, at a place where a model may have tensors."""
    tensor = external(location)
    inner = helper.make_graph([], "inner", [], [], [tensor])
    node = helper.make_node("Constant", [], ["y"])
    initializers, sparse = [], []
    if where == "initializer":
        initializers = [tensor]
    elif where == "sparse initializer":
        sparse = [onnx.SparseTensorProto(values=tensor, dims=[1])]
    elif where == "attribute":
        node.attribute.append(helper.make_attribute("value", tensor))
    elif where == "attribute of tensors":
        node.attribute.append(helper.make_attribute("values", [tensor]))
    elif where == "subgraph":
        node.attribute.append(helper.make_attribute("then_branch", inner))
    elif where == "list of subgraphs":
        node.attribute.append(helper.make_attribute("bodies", [inner]))
    outer = helper.make_graph([node], "g", [], [], initializers, sparse_initializer=sparse)
    model = helper.make_model(outer, producer_name="any", ir_version=10)
    if where == "function":
        body = helper.make_node("Constant", [], ["z"], value=tensor)
        model.functions.append(helper.make_function("d", "f", [], ["z"], [body], [helper.make_opsetid("", 20)]))
    elif where == "training":
        model.training_info.add().algorithm.CopyFrom(inner)
    return bytes(model.SerializeToString(deterministic=True))


def manifest(files: dict[str, bytes]) -> bytes:
    """The manifest that lists them."""
    listed = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    return json.dumps(BASE | {"files": listed}).encode()


SOUND = {GRAPH: graph(), WEIGHTS: DATA}
SOUND[MANIFEST] = manifest(SOUND)


def file(path: str, content: bytes) -> Node:
    """A file."""
    return {"path": path, "file": base64.b64encode(content).decode()}


def link(path: str, to: str) -> Node:
    """A symbolic link."""
    return {"path": path, "link": to}


def folder(path: str, files: dict[str, bytes] = SOUND) -> list[Node]:
    """A folder of files."""
    return [file(f"{path}/{name}", content) for name, content in files.items()]


def blob(content: bytes) -> str:
    """What a hub's cache calls a content."""
    return hashlib.sha256(content).hexdigest()


def blobs(model: str = NAME, files: dict[str, bytes] = SOUND) -> list[Node]:
    """A model's blobs."""
    return [file(f"{model}/blobs/{blob(SOUND[name])}", content) for name, content in files.items()]


def snapshot(path: str = SNAPSHOT, model: str = NAME, names: tuple[str, ...] = tuple(SOUND)) -> list[Node]:
    """A folder of links to a model's blobs."""
    return [link(f"{path}/{name}", posixpath.relpath(f"{model}/blobs/{blob(SOUND[name])}", path)) for name in names]


def but(nodes: list[Node], *changed: Node) -> list[Node]:
    """The nodes with some in the place of those of the same path; others are added."""
    paths = {node["path"] for node in changed}
    return [*(node for node in nodes if node["path"] not in paths), *changed]


ALTERED = DATA.upper()
CHANGED_BLOB = file(f"{NAME}/blobs/{blob(DATA)}", ALTERED)
PLAIN, HUB = folder("bundle"), [*blobs(), *snapshot()]
IN_SNAPSHOT = f"{SNAPSHOT}/{WEIGHTS}"
OTHER = "models--me--other"


def named(location: str, where: str = "initializer", *more: Node) -> list[Node]:
    """A bundle whose graph names a data file."""
    files = {GRAPH: graph(location, where), WEIGHTS: DATA}
    return [*folder("bundle", files | {MANIFEST: manifest(files)}), *more]


# (what, nodes, opened, skip_hash_above, accepted)
CASES: list[tuple[str, list[Node], str, int | None, bool]] = [
    ("a folder of files", PLAIN, "bundle", None, True),
    ("a link to the folder", [*PLAIN, link("current", "bundle")], "current", None, True),
    (
        "a link within the folder",
        but(PLAIN, file("bundle/w", DATA), link(f"bundle/{WEIGHTS}", "w")),
        "bundle",
        None,
        True,
    ),
    ("a link out of it", but(PLAIN, file("w", DATA), link(f"bundle/{WEIGHTS}", "../w")), "bundle", None, False),
    (
        "an absolute link out of it",
        but(PLAIN, file("w", DATA), link(f"bundle/{WEIGHTS}", "{root}/w")),
        "bundle",
        None,
        False,
    ),
    (
        "a link to a folder whose name begins with the bundle's",
        but(PLAIN, file("bundle-2/w", DATA), link(f"bundle/{WEIGHTS}", "../bundle-2/w")),
        "bundle",
        None,
        False,
    ),
    (
        "a manifest linked from outside",
        but(PLAIN, *folder("m"), link(f"bundle/{MANIFEST}", f"../m/{MANIFEST}")),
        "bundle",
        None,
        False,
    ),
    ("a link to nothing", but(PLAIN, link(f"bundle/{WEIGHTS}", "none")), "bundle", None, False),
    ("a link to itself", but(PLAIN, link(f"bundle/{WEIGHTS}", WEIGHTS)), "bundle", None, False),
    (
        "two links to each other",
        but(PLAIN, link(f"bundle/{WEIGHTS}", "b"), link("bundle/b", WEIGHTS)),
        "bundle",
        None,
        False,
    ),
    ("a manifest that is a link to itself", but(PLAIN, link(f"bundle/{MANIFEST}", MANIFEST)), "bundle", None, False),
    ("a file that is a folder", but(PLAIN, {"path": f"bundle/{WEIGHTS}", "folder": True}), "bundle", None, False),
    ("a file that is a pipe", but(PLAIN, {"path": f"bundle/{WEIGHTS}", "pipe": True}), "bundle", None, False),
    ("a manifest that is a pipe", but(PLAIN, {"path": f"bundle/{MANIFEST}", "pipe": True}), "bundle", None, False),
    ("a changed file", but(PLAIN, file(f"bundle/{WEIGHTS}", ALTERED)), "bundle", None, False),
    ("a changed file whose hash is skipped", but(PLAIN, file(f"bundle/{WEIGHTS}", ALTERED)), "bundle", 0, True),
    ("a file cut short whose hash is skipped", but(PLAIN, file(f"bundle/{WEIGHTS}", DATA[1:])), "bundle", 0, False),
    # Hub snapshots.
    ("a snapshot", HUB, SNAPSHOT, None, True),
    ("a snapshot whose hashes are skipped", HUB, SNAPSHOT, 0, True),
    (
        "a snapshot of files and one link",
        but(folder(SNAPSHOT), *blobs(), *snapshot(names=(WEIGHTS,))),
        SNAPSHOT,
        None,
        True,
    ),
    (
        "a revision that is a link to another",
        [*HUB, link(f"{NAME}/snapshots/main", REVISION)],
        f"{NAME}/snapshots/main",
        None,
        True,
    ),
    ("a snapshot behind a link to the cache", [*HUB, link("cache", ".")], f"cache/{SNAPSHOT}", None, True),
    ("a link to a snapshot", [*HUB, link("bundle", SNAPSHOT)], "bundle", None, True),
    ("a bundle in a folder of a snapshot", [*blobs(), *snapshot(f"{SNAPSHOT}/int4")], f"{SNAPSHOT}/int4", None, True),
    (
        "links over links that end in the blobs",
        but(HUB, link(IN_SNAPSHOT, "w"), link(f"{SNAPSHOT}/w", f"../../blobs/{blob(DATA)}")),
        SNAPSHOT,
        None,
        True,
    ),
    (
        "links over a place outside that end in the blobs",
        but(HUB, link(IN_SNAPSHOT, "{root}/w"), link("w", f"{NAME}/blobs/{blob(DATA)}")),
        SNAPSHOT,
        None,
        True,
    ),
    (
        "an absolute link to the blobs",
        but(HUB, link(IN_SNAPSHOT, f"{{root}}/{NAME}/blobs/{blob(DATA)}")),
        SNAPSHOT,
        None,
        True,
    ),
    ("a changed blob", but(HUB, CHANGED_BLOB), SNAPSHOT, None, False),
    ("a changed blob whose hash is skipped", but(HUB, CHANGED_BLOB), SNAPSHOT, 0, False),
    ("a blob cut short", but(HUB, file(f"{NAME}/blobs/{blob(DATA)}", DATA[1:])), SNAPSHOT, 0, False),
    ("a blob that is missing", [node for node in HUB if not node["path"].endswith(blob(DATA))], SNAPSHOT, None, False),
    (
        "another model's blobs",
        but(HUB, *blobs(OTHER), link(IN_SNAPSHOT, f"../../../{OTHER}/blobs/{blob(DATA)}")),
        SNAPSHOT,
        None,
        False,
    ),
    (
        "a manifest in another model's blobs",
        but(HUB, *blobs(OTHER), link(f"{SNAPSHOT}/{MANIFEST}", f"../../../{OTHER}/blobs/{blob(SOUND[MANIFEST])}")),
        SNAPSHOT,
        None,
        False,
    ),
    (
        "another snapshot's file",
        but(HUB, file(f"{NAME}/snapshots/old/{WEIGHTS}", DATA), link(IN_SNAPSHOT, f"../old/{WEIGHTS}")),
        SNAPSHOT,
        None,
        False,
    ),
    ("a file beside the blobs", but(HUB, file(f"{NAME}/w", DATA), link(IN_SNAPSHOT, "../../w")), SNAPSHOT, None, False),
    (
        "a file in a folder of the blobs",
        but(HUB, file(f"{NAME}/blobs/more/w", DATA), link(IN_SNAPSHOT, "../../blobs/more/w")),
        SNAPSHOT,
        None,
        False,
    ),
    (
        "a folder of the blobs",
        but(HUB, {"path": f"{NAME}/blobs/more", "folder": True}, link(IN_SNAPSHOT, "../../blobs/more")),
        SNAPSHOT,
        None,
        False,
    ),
    ("the blobs themselves", but(HUB, link(IN_SNAPSHOT, "../../blobs")), SNAPSHOT, None, False),
    (
        "blobs that are a link",
        [
            *[file(f"store/{node['path'].rpartition('/')[2]}", base64.b64decode(node["file"])) for node in blobs()],
            *snapshot(),
            link(f"{NAME}/blobs", "../store"),
        ],
        SNAPSHOT,
        None,
        False,
    ),
    (
        "a blob that is a link out of the model",
        but(HUB, file("w", DATA), link(f"{NAME}/blobs/{blob(DATA)}", "../../w")),
        SNAPSHOT,
        None,
        False,
    ),
    (
        "a revision that is a link to a folder elsewhere",
        [*blobs(), *snapshot("elsewhere"), link(SNAPSHOT, "../../elsewhere")],
        SNAPSHOT,
        None,
        False,
    ),
    ("a snapshot that was copied with its links", [*HUB, *snapshot("bundle")], "bundle", None, False),
    (
        "a copy whose links lead nowhere",
        [*HUB, *[link(node["path"].replace(SNAPSHOT, "a/b/bundle"), node["link"]) for node in snapshot()]],
        "a/b/bundle",
        None,
        False,
    ),
    (
        "a data set's snapshot",
        [*blobs("datasets--me--it"), *snapshot("datasets--me--it/snapshots/1", "datasets--me--it")],
        "datasets--me--it/snapshots/1",
        None,
        False,
    ),
    ("a snapshot of another name", [*blobs(), *snapshot(f"{NAME}/snapshot/1")], f"{NAME}/snapshot/1", None, False),
    # Files that a graph names.
    (
        "a data file outside the folder",
        named(f"../{WEIGHTS}", "initializer", file(WEIGHTS, DATA)),
        "bundle",
        None,
        False,
    ),
    ("an absolute data file", named(f"/{WEIGHTS}"), "bundle", None, False),
    ("a data file that isn't listed", named("w", "initializer", file("bundle/w", DATA)), "bundle", None, False),
    (
        "a data file behind a link that isn't listed",
        named("w", "initializer", file("w", DATA), link("bundle/w", "../w")),
        "bundle",
        None,
        False,
    ),
    ("a data file that is the program's memory", named("*/_ORT_MEM_ADDR_/*"), "bundle", None, False),
    ("a data file without a name", named(""), "bundle", None, False),
    *(
        (f"a data file {what}: {where}", named(location, where), "bundle", None, accepted)
        for where in (
            "sparse initializer",
            "attribute",
            "attribute of tensors",
            "subgraph",
            "list of subgraphs",
            "function",
            "training",
        )
        for what, location, accepted in (("that is listed", WEIGHTS, True), ("that isn't listed", "../w", False))
    ),
    (
        "a graph that was cut short before it was hashed",
        folder("bundle", (cut := {GRAPH: graph()[:-1], WEIGHTS: DATA}) | {MANIFEST: manifest(cut)}),
        "bundle",
        None,
        False,
    ),
    (
        "a graph that is something else",
        folder("bundle", (text := {GRAPH: b"not a model", WEIGHTS: DATA}) | {MANIFEST: manifest(text)}),
        "bundle",
        None,
        False,
    ),
]


def main() -> None:
    """Writes layouts.json beside this script."""
    cases = [
        {"what": what, "nodes": nodes, "open": opened, "skip_hash_above": limit, "accepted": accepted}
        for what, nodes, opened, limit, accepted in CASES
    ]
    document = json.dumps({"cases": cases}, indent=1)
    Path(__file__).with_name("layouts.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
