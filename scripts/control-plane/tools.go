//go:build tools

// Package tools pins the Kubernetes control plane that the demo, the tests and the benchmarks run against.
// Nothing here is linked into Moxlet.
package tools
