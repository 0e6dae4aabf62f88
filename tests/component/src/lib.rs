//! Component tests: the crates against real LXC, OverlayFS, CNI and a registry.
