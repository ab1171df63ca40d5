// Streams an answer from Rust: rustc stream.rs -L PREFIX/lib, then ./stream BUNDLE QUESTION

use std::ffi::{c_char, c_void, CStr};
use std::io::Write;
use std::ptr::{null, null_mut};

type Handle = *mut c_void;
type Show = extern "C" fn(Handle, Handle) -> i32;

#[link(name = "qwen_aot")]
extern "C" {
    fn qwen_aot_model_open(path: *const u8, length: usize, options: Handle, model: *mut Handle, error: *mut Handle) -> i32;
    fn qwen_aot_generator_create(model: Handle, generator: *mut Handle, error: *mut Handle) -> i32;
    fn qwen_aot_chat_create(generator: Handle, config: Handle, system: *const u8, length: usize, chat: *mut Handle,
        error: *mut Handle) -> i32;
    fn qwen_aot_chat_send(chat: Handle, text: *const u8, length: usize, show: Show, user: Handle, completion: Handle,
        error: *mut Handle) -> i32;
    fn qwen_aot_event_text(event: Handle, length: *mut usize) -> *const c_char;
    fn qwen_aot_error_message(error: Handle, length: *mut usize) -> *const c_char;
    fn qwen_aot_chat_free(chat: Handle);
    fn qwen_aot_generator_free(generator: Handle);
    fn qwen_aot_model_free(model: Handle);
}

extern "C" fn show(_user: Handle, event: Handle) -> i32 {
    let text = unsafe { CStr::from_ptr(qwen_aot_event_text(event, null_mut())) };
    print!("{}", text.to_string_lossy());
    std::io::stdout().flush().is_err() as i32
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let (bundle, question) = (&arguments[1], &arguments[2]);
    let (mut model, mut generator, mut chat, mut error): (Handle, Handle, Handle, Handle) =
        (null_mut(), null_mut(), null_mut(), null_mut());
    unsafe {
        let failed = qwen_aot_model_open(bundle.as_ptr(), bundle.len(), null_mut(), &mut model, &mut error) != 0
            || qwen_aot_generator_create(model, &mut generator, &mut error) != 0
            || qwen_aot_chat_create(generator, null_mut(), null(), 0, &mut chat, &mut error) != 0
            || qwen_aot_chat_send(chat, question.as_ptr(), question.len(), show, null_mut(), null_mut(), &mut error) != 0;
        if failed {
            eprintln!("error: {}", CStr::from_ptr(qwen_aot_error_message(error, null_mut())).to_string_lossy());
            std::process::exit(1);
        }
        println!();
        qwen_aot_chat_free(chat);
        qwen_aot_generator_free(generator);
        qwen_aot_model_free(model);
    }
}
