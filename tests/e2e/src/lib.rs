//! End-to-end tests: kubectl against a real control plane and moxlet up.
