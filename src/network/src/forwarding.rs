//! The host's `net.ipv4.ip_forward`: CNI's bridge switches it on and leaves it so; whoever takes Moxlet off the host
//! wants it as it was.
