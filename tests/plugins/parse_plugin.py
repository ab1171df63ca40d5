"""Lets TensorRT-RTX's registry load the library and its parser read a node: python parse_plugin.py LIBRARY [NODE].

A process of its own, because TensorRT-RTX has no plugin layers: after it has created the plugin, it ends the process.
NODE is JSON: `op`, `attributes`, and `inputs` and `outputs` as lists of (TensorProto type, shape). Prints one JSON
array a line: ["creator", name, namespace, version, [[field, type] …]] for all, and each message as ["log", severity,
text].
"""

import json
import sys

import onnx
import tensorrt_rtx as trt
from onnx import helper


def say(*facts: object) -> None:
    print(json.dumps(facts), flush=True)


class Logger(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        say("log", severity.name, message)


def model(node: dict) -> bytes:
    inputs, outputs = (
        [helper.make_tensor_value_info(f"{kind}_{i}", *tensor) for i, tensor in enumerate(node[f"{kind}s"])]
        for kind in ("input", "output")
    )
    made = helper.make_node(
        node["op"],
        [value.name for value in inputs],
        [value.name for value in outputs],
        domain="qwen_aot",
        plugin_namespace="qwen_aot",
        plugin_version="1",
        **node["attributes"],
    )
    graph = helper.make_graph([made], "one_node", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("qwen_aot", 1)]
    return onnx.ModelProto.SerializeToString(helper.make_model(graph, opset_imports=opsets))


logger = Logger()
builder = trt.Builder(logger)
registry = trt.get_plugin_registry()
if registry.load_library(sys.argv[1]) is None:
    sys.exit("the registry didn't load the library")
for name in ("QwenGQA", "QwenMoE", "QwenLinear"):
    creator = registry.get_creator(name, "1", "qwen_aot")
    fields = [(field.name, field.type.name) for field in creator.field_names]
    say("creator", creator.name, creator.plugin_namespace, creator.plugin_version, fields)
if len(sys.argv) > 2:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parser.parse(model(json.loads(sys.argv[2])))
