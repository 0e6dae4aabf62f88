//! Benchmarks: tables with the peer measured in the same run.
