"""Registering the ops: what ONNX Runtime's failures leave, by a double of its functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import ctypes, sys

POINTER = ctypes.c_void_p
library = ctypes.CDLL(sys.argv[1])
calls = []
failures = {name: 0 for name in ("create_domain", "add_op", "add_domain")}  # so many times each fails


def answer(name, status):
    calls.append(name)
    if failures[name] > 0:
        failures[name] -= 1
        return status
    return None


def create_status(code, text):
    calls.append(text.decode())
    return 7000


def create_domain(name, made):
    status = answer("create_domain", 7001)
    if status is None:
        made[0] = 9001
    return status


functions = {
    0: ctypes.CFUNCTYPE(POINTER, ctypes.c_int32, ctypes.c_char_p)(create_status),
    26: ctypes.CFUNCTYPE(POINTER, ctypes.c_char_p, ctypes.POINTER(POINTER))(create_domain),
    27: ctypes.CFUNCTYPE(POINTER, POINTER, POINTER)(lambda domain, op: answer("add_op", 7002)),
    28: ctypes.CFUNCTYPE(POINTER, POINTER, POINTER)(lambda options, domain: answer("add_domain", 7003)),
    101: ctypes.CFUNCTYPE(None, POINTER)(lambda domain: calls.append(f"release {domain}")),
}


def runtime():
    table = (POINTER * 400)()
    for place, function in functions.items():
        table[place] = ctypes.cast(function, POINTER).value
    get = ctypes.CFUNCTYPE(POINTER, ctypes.c_uint32)(lambda version: ctypes.addressof(table))
    base = (POINTER * 2)(ctypes.cast(get, POINTER).value, None)
    return base, table, get


def register(base):
    calls.clear()
    return library.RegisterCustomOps(POINTER(1), base), list(calls)


library.RegisterCustomOps.restype = POINTER
one, other = runtime(), runtime()
failures["create_domain"] = 1
assert register(one[0]) == (7001, ["create_domain"])
failures["add_op"] = 1  # what was made is given back, and ONNX Runtime's own status is the answer
assert register(one[0]) == (7002, ["create_domain", "add_op", "release 9001"])
failures["add_domain"] = 1  # the domain is whole: the next session takes it
assert register(other[0]) == (7003, ["create_domain", *["add_op"] * 5, "add_domain"])
assert register(other[0]) == (None, ["add_domain"])
status, said = register(one[0])
assert status == 7000 and "serves another ONNX Runtime in this process already" in said[0], said
assert register(other[0]) == (None, ["add_domain"])
print("as it should")
"""


def test_a_failed_registration_is_told_and_tried_again(library: Path) -> None:
    """In a process of its own: the library's state is the process's."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(library)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "as it should\n"), done.stderr
