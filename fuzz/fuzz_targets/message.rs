//! Any payload as a message and as a request: no panic, and what is understood is written and read back the same.
#![no_main]

use dev_box_comm::message::{Message, Request, decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = decode::<Message>(bytes) {
        // For people's eyes: no control characters, whatever the guest wrote.
        if let Message::Failed(error) = &message {
            assert!(!error.to_string().chars().any(char::is_control));
        }
        if message != Message::Unknown {
            // Reading may cut text and repeat defaults, so it can grow; within the limit it is the same again.
            if let Ok(written) = encode(&message) {
                assert_eq!(decode::<Message>(&written), Ok(message));
            }
        }
    }
    if let Ok(request) = decode::<Request>(bytes) {
        if let Request::Exec(exec) = &request {
            let _ = exec.validate();
        }
        if request != Request::Unknown
            && let Ok(written) = encode(&request)
        {
            assert_eq!(decode::<Request>(&written), Ok(request));
        }
    }
});
