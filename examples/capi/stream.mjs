// Streams an answer from Node with npm's koffi: node stream.mjs LIBQWEN_AOT.SO BUNDLE QUESTION
import koffi from "koffi";

const [library, bundle, question] = process.argv.slice(2);
const lib = koffi.load(library);
koffi.opaque("Handle");
koffi.proto("int32_t Show(void *user, Handle *event)");
const message = lib.func("const char *qwen_aot_error_message(Handle *error, void *length)");
const text = lib.func("const char *qwen_aot_event_text(Handle *event, void *length)");
const open = lib.func(
  "int32_t qwen_aot_model_open(str path, size_t length, void *options, _Out_ Handle **model, _Out_ Handle **error)");
const generator = lib.func(
  "int32_t qwen_aot_generator_create(Handle *model, _Out_ Handle **generator, _Out_ Handle **error)");
const chat = lib.func("int32_t qwen_aot_chat_create(Handle *generator, void *config, void *system, size_t length, " +
  "_Out_ Handle **chat, _Out_ Handle **error)");
const send = lib.func("int32_t qwen_aot_chat_send(Handle *chat, str text, size_t length, Show *show, void *user, " +
  "void *completion, _Out_ Handle **error)");

// Calls a function whose last two arguments come out: what it made, and the error.
function made(func, ...args) {
  const handle = [null], error = [null];
  if (func(...args, handle, error)) throw new Error(message(error[0], null));
  return handle[0];
}

const talk = made(chat, made(generator, made(open, bundle, Buffer.byteLength(bundle), null)), null, null, 0);
const error = [null];
const show = (user, event) => { process.stdout.write(text(event, null)); return 0; };
if (send(talk, question, Buffer.byteLength(question), show, null, null, error)) throw new Error(message(error[0], null));
console.log();
