"""Streams an answer from Python without the package: python stream.py LIBQWEN_AOT.SO BUNDLE QUESTION."""

import ctypes
import sys

library, bundle, question = sys.argv[1:]
lib = ctypes.CDLL(library)
for name in ("qwen_aot_error_message", "qwen_aot_event_text"):
    getattr(lib, name).restype = ctypes.c_char_p
    getattr(lib, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p]
Callback = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
size, pointer = ctypes.c_size_t, ctypes.c_void_p


def call(function, *arguments):
    error = pointer()
    if function(*arguments, ctypes.byref(error)):
        sys.exit("error: " + lib.qwen_aot_error_message(error, None).decode())


@Callback
def show(user, event):
    print(lib.qwen_aot_event_text(event, None).decode(), end="", flush=True)
    return 0


model, generator, chat = pointer(), pointer(), pointer()
path, text = bundle.encode(), question.encode()
call(lib.qwen_aot_model_open, path, size(len(path)), None, ctypes.byref(model))
call(lib.qwen_aot_generator_create, model, ctypes.byref(generator))
call(lib.qwen_aot_chat_create, generator, None, None, size(0), ctypes.byref(chat))
call(lib.qwen_aot_chat_send, chat, text, size(len(text)), show, None, None)
print()
for free, handle in (("chat", chat), ("generator", generator), ("model", model)):
    getattr(lib, f"qwen_aot_{free}_free")(handle)
