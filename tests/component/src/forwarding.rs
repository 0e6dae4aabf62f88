//! `net.ipv4.ip_forward`, which a network of pods switches on, as it was before the tests.

use std::{
    fs,
    sync::{Mutex, PoisonError},
};

const SWITCH: &str = "/proc/sys/net/ipv4/ip_forward";
/// How many tests of this program use the network, and the value that the first of them found.
static USERS: Mutex<(usize, String)> = Mutex::new((0, String::new()));

/// Held by a test that makes a network; the last one puts the switch back.
#[derive(Debug)]
pub struct Forwarding(());

impl Forwarding {
    /// Remembers the present value unless another test has.
    #[must_use]
    pub fn keep() -> Self {
        let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
        if users.0 == 0 {
            users.1 = fs::read_to_string(SWITCH).unwrap();
        }
        users.0 += 1;
        Self(())
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
        users.0 -= 1;
        if users.0 == 0 && users.1.trim() == "0" {
            let _ = fs::write(SWITCH, "0");
        }
    }
}
