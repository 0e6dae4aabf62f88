//! An engine in memory, for tests of those who use one.
